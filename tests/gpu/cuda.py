"""CUDA's driver API through ctypes, as far as the checks need it: memory, and one kernel that keeps a device busy.

No toolkit and no package: the driver alone, which compiles the kernel's PTX for whatever device it finds.
"""

import ctypes
import os

THREADS = 256
LOOPS = 20_000
_OUT_OF_MEMORY = 2
_MULTIPROCESSORS = 16
_PLACES = ("libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1", "/usr/lib/x86_64-linux-gnu/libcuda.so.1")

# x := x / 2 + 1, from any start: 2 after some tens of rounds, so that every thread's answer can be checked.
PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry burn(.param .u64 out, .param .u32 loops)
{
  .reg .pred %p;
  .reg .f32 %x, %half, %one;
  .reg .b32 %n, %i, %block, %size, %thread, %index;
  .reg .b64 %base, %offset, %place;
  ld.param.u64 %base, [out];
  ld.param.u32 %n, [loops];
  mov.u32 %block, %ctaid.x;
  mov.u32 %size, %ntid.x;
  mov.u32 %thread, %tid.x;
  mad.lo.s32 %index, %block, %size, %thread;
  cvt.rn.f32.u32 %x, %thread;
  mov.f32 %half, 0f3F000000;
  mov.f32 %one, 0f3F800000;
  mov.u32 %i, 0;
again:
  fma.rn.f32 %x, %x, %half, %one;
  fma.rn.f32 %x, %x, %half, %one;
  fma.rn.f32 %x, %x, %half, %one;
  fma.rn.f32 %x, %x, %half, %one;
  fma.rn.f32 %x, %x, %half, %one;
  fma.rn.f32 %x, %x, %half, %one;
  fma.rn.f32 %x, %x, %half, %one;
  fma.rn.f32 %x, %x, %half, %one;
  add.u32 %i, %i, 1;
  setp.lt.u32 %p, %i, %n;
  @%p bra again;
  mul.wide.u32 %offset, %index, 4;
  cvta.to.global.u64 %place, %base;
  add.s64 %place, %place, %offset;
  st.global.f32 [%place], %x;
  ret;
}
\0"""


class CudaError(Exception):
    """A call of the driver failed; `code` is its CUresult."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} failed with CUresult {code}")
        self.call, self.code = call, code


class Cuda:
    """The first visible device, with its primary context."""

    def __init__(self) -> None:
        self._driver = _load()
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        processors = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(processors), _MULTIPROCESSORS, device)
        self.multiprocessors, self.visible = processors.value, count.value
        self._burn = ctypes.c_void_p()

    def allocate(self, size_bytes: int) -> int | None:
        """Return the address of device memory, None when the driver says that there is no more. Raises CudaError."""
        place = ctypes.c_uint64()
        code = self._driver.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(size_bytes))
        if code == _OUT_OF_MEMORY:
            return None
        if code:
            raise CudaError("cuMemAlloc_v2", code)
        return place.value

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes as this program is told."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def burn(self, out: int, blocks: int, loops: int) -> None:
        """Run the kernel and wait for it."""
        if not self._burn:
            module = ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), PTX)
            self._call("cuModuleGetFunction", ctypes.byref(self._burn), module, b"burn")
        first, second = ctypes.c_uint64(out), ctypes.c_uint32(loops)
        parameters = (ctypes.c_void_p * 2)(ctypes.addressof(first), ctypes.addressof(second))
        self._call("cuLaunchKernel", self._burn, blocks, 1, 1, THREADS, 1, 1, 0, None, parameters, None)
        self._call("cuCtxSynchronize")

    def floats(self, place: int, count: int) -> list[float]:
        """Return numbers from device memory."""
        found = (ctypes.c_float * count)()
        self._call("cuMemcpyDtoH_v2", found, ctypes.c_uint64(place), ctypes.c_size_t(4 * count))
        return list(found)

    def _call(self, name: str, *args: object) -> None:
        if code := getattr(self._driver, name)(*args):
            raise CudaError(name, code)


def open_device() -> Cuda:
    """Return the device; the one that tests make up where TENURE_FAKE_GPU names its folder."""
    if os.environ.get("TENURE_FAKE_GPU"):
        from tests.gpu.fakes.device import FakeCuda

        return FakeCuda()  # type: ignore[return-value]
    return Cuda()


def _load() -> ctypes.CDLL:
    for place in _PLACES:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise CudaError("libcuda.so.1 cannot be loaded: no driver", -1)
