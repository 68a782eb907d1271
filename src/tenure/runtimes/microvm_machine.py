"""The machine that a guest runs in: QEMU's or Firecracker's command for it, and whether this processor can carry it.

Standard library only: the attendant uses it between fork and exec. Not for: starting either (`microvm_job`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import platform
import shutil
import time
from collections.abc import Mapping
from typing import Any

QEMU = "qemu-system-x86_64"
FIRECRACKER = "firecracker"
GUEST = "10.0.2.15"
"""The guest's address, and below it the host's in QEMU's own network (QEMU, docs/system/devices/net.rst)."""
GATEWAY = "10.0.2.2"
WORKER_DIR = "/run/tenure/worker"
"""TENURE_WORKER_DIR inside."""
TRANSLATION_MIB = 64
"""Of translated code, under emulation: QEMU's default is a gigabyte, which a small guest would fill with what it used once."""
OVERHEAD_BYTES = {"kvm": 96 << 20, "tcg": 192 << 20}
"""What the machine's process and its attendant may take beside the guest's memory; measured: docs/microvm.md."""
_KERNEL_WORDS = (
    # A guest that ends for any reason is not started again; what it says of that reason is read on the console.
    *("console=ttyS0", "loglevel=4", "panic=-1", "reboot=t", "8250.nr_uarts=1"),
    # One program has the machine to itself: what keeps programs of one kernel apart costs a start a fifth of a second.
    *("mitigations=off", "audit=0", "cryptomgr.notests", "random.trust_cpu=on", "no_timer_check"),
)
_RDTSC = bytes.fromhex("0f3148c1e2204809d0c3")
_tsc_khz: list[int] = []


def qemu_command(asked: Mapping[str, Any], *, accel: str, initrd: str, qmp_fd: int) -> list[str]:
    """Return QEMU's command. asked: kernel, root, memory_bytes, cpus, ports, as `microvm` plans them; initrd: path.

    The console is the process's standard input and output. The guest reaches nothing; what it listens on is reached at
    127.0.0.1 under the same number.
    """
    cpus = max(1, math.ceil(asked["cpus"]))
    # With one virtual processor a thread of its own for it gains nothing.
    threads = "multi" if cpus > 1 else "single"
    accelerator = "kvm" if accel == "kvm" else f"tcg,thread={threads},tb-size={TRANSLATION_MIB}"
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{port}-{GUEST}:{port}" for port in asked["ports"])
    words = [*_KERNEL_WORDS, *([f"tsc_early_khz={khz}"] if accel != "kvm" and (khz := tsc_khz()) else [])]
    return [
        *(asked["qemu"], "-M", "microvm", "-accel", accelerator, "-cpu", "host" if accel == "kvm" else "max"),
        *("-smp", str(cpus), "-m", f"{math.ceil(asked['memory_bytes'] / (1 << 20))}M"),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"),
        *("-kernel", asked["kernel"], "-initrd", initrd, "-append", " ".join(words)),
        *("-drive", f"id=root,file={_quoted(asked['root'])},format=raw,if=none,readonly=on"),
        *("-device", "virtio-blk-device,drive=root"),
        *("-netdev", f"user,id=net,restrict=on{forwards}", "-device", "virtio-net-device,netdev=net"),
    ]


def _quoted(path: str) -> str:
    """Return a path as QEMU's options take it: a comma doubled."""
    return path.replace(",", ",,")


def firecracker_config(asked: Mapping[str, Any], *, initrd: str) -> str:
    """Return Firecracker's configuration file for the same guest, which has no network then.

    Source: firecracker, docs/getting-started.md, "Configuring the microVM without sending API requests".
    """
    return json.dumps(
        {
            "boot-source": {"kernel_image_path": asked["kernel"], "initrd_path": initrd, "boot_args": " ".join(_KERNEL_WORDS)},
            "drives": [{"drive_id": "root", "path_on_host": asked["root"], "is_root_device": False, "is_read_only": True}],
            "machine-config": {
                "vcpu_count": max(1, math.ceil(asked["cpus"])),
                "mem_size_mib": math.ceil(asked["memory_bytes"] / (1 << 20)),
            },
        }
    )


def find_qemu() -> str:
    """Return the path of QEMU for x86-64; empty when there is none."""
    return shutil.which(QEMU) or ""


def find_firecracker() -> str:
    """Return the path of Firecracker; empty when there is none."""
    return shutil.which(FIRECRACKER) or ""


def tsc_khz() -> int:
    """Return the frequency of this processor's time stamp counter, measured once over 20 ms; 0 when it cannot be.

    An emulated guest reads this counter, and measures it against a timer that a busy host delivers late: it then finds no
    clock at all and stands still for ever (10 of 12 starts beside two busy loops). Told the frequency, it need not measure.
    """
    if not _tsc_khz:
        _tsc_khz.append(_measured_tsc_khz())
    return _tsc_khz[0]


def _measured_tsc_khz() -> int:
    if platform.machine() != "x86_64":
        return 0
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return 0  # a hardened system lets nobody write what it executes
    page.write(_RDTSC)
    first = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(first))
    begun, begun_ns = int(read()), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    time.sleep(0.02)
    ended, ended_ns = int(read()), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    del read, first
    with contextlib.suppress(BufferError):
        page.close()
    return round((ended - begun) * 1e6 / (ended_ns - begun_ns))


def kvm_may_be_opened() -> bool:
    """Return whether this process may open /dev/kvm. That a guest boots there is another matter (`microvm_probe`)."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
