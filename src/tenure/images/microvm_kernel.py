"""The kernel of a microVM: found on this machine, made ready to be booted without a boot loader, with its modules.

A bzImage's payload is unpacked where the program for it is here: the kernel then need not do so at every start. Its symbols
and sections, which nothing reads at run time, stay away. Not for: booting it (`runtimes.microvm`).
"""

from __future__ import annotations

import glob
import gzip
import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenure.errors import CorruptData, NotFound, SpecError

MODULES = (
    *("virtio_ring", "virtio", "virtio_mmio", "failover", "net_failover", "virtio_net", "virtio_blk"),
    *("squashfs",),
)
"""What a guest loads, in an order that each finds what it needs loaded; one that is built into the kernel is left out."""
KERNELS = "kernels"
"""Folder of the home in which kernels are looked for: each a folder with a vmlinuz and its modules."""
_UNPACK_MAX_S = 120.0
_MAGIC = (
    (b"\x1f\x8b", ()),
    (b"\xfd7zXZ\0", ()),
    (b"\x5d\0\0", ()),
    (b"\x02\x21\x4c\x18", ("lz4", "-dc", "-")),
    (b"\x28\xb5\x2f\xfd", ("zstd", "-dcq", "-")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel file and where its modules lie."""

    image: Path
    """A bzImage or an ELF vmlinux."""
    release: str
    """As `uname -r` says it, e.g. ``6.1.0-56-cloud-amd64``; empty: unknown."""
    modules: Path | None
    """The folder that holds `kernel/`; None: everything that is needed is built in."""


def find_kernel(given: Path | None = None, *, home: Path | None = None) -> Kernel:
    """Return the kernel to use: the one given, else the newest of the home's, else this machine's own for clouds.

    given: a kernel file, with its modules beside it or in /lib/modules, or a folder into which a kernel package was unpacked.
    Raises NotFound, with how to get one.
    """
    if given is not None:
        if given.is_dir():
            found = _in_folder(given)
            if found is None:
                raise NotFound(f"no vmlinuz or vmlinux in {given} or {given}/boot; {_how_to_get(home)}")
            return found
        if not given.is_file():
            raise NotFound(f"no kernel at {given}; {_how_to_get(home)}")
        return _kernel(given, [given.parent, given.parent.parent])
    looked = [*(sorted((home / KERNELS).glob("*"), reverse=True) if home else []), Path("/")]
    for folder in looked:
        if (found := _in_folder(folder, "*cloud*" if folder == Path("/") else "*")) is not None:
            return found
    where = f"{home / KERNELS} and /boot" if home else "/boot"
    raise NotFound(f"no kernel for microVMs in {where}; {_how_to_get(home)}")


def _how_to_get(home: Path | None) -> str:
    folder = (home or Path("$TENURE_HOME")) / KERNELS / "debian"
    return (
        f"get Debian's without installing it: mkdir -p {folder} && cd {folder} && apt-get download "
        "$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p' | head -1) && dpkg-deb -x linux-image-*.deb ."
    )


def _in_folder(folder: Path, release: str = "*") -> Kernel | None:
    for pattern in (f"vmlinuz-{release}", "vmlinuz", f"vmlinux-{release}", "vmlinux"):
        for below in (folder / "boot", folder):
            if found := sorted(glob.glob(str(below / pattern)), reverse=True):
                return _kernel(Path(found[0]), [folder])
    return None


def _kernel(image: Path, around: Iterable[Path]) -> Kernel:
    release = image.name.partition("-")[2]
    for root in (*around, Path("/")):
        for modules in (root / "lib/modules", root / "usr/lib/modules"):
            names = [release] if release else sorted(path.name for path in modules.glob("*"))
            for name in names:
                if (modules / name / "kernel").is_dir():
                    return Kernel(image=image, release=name, modules=modules / name)
    return Kernel(image=image, release=release, modules=None)


def read_modules(kernel: Kernel, names: Sequence[str] = MODULES) -> list[tuple[str, bytes]]:
    """Return file name and content of each module that the kernel does not have built in, in the order given.

    Raises SpecError when the modules are not there at all, NotFound when one is missing.
    """
    if kernel.modules is None:
        raise SpecError(
            f"{kernel.image} has no modules beside it nor in /lib/modules/{kernel.release or 'RELEASE'}, and a guest needs "
            f"{', '.join(names)}. Give a folder with both, as a kernel package has them: --kernel FOLDER"
        )
    built_in = _built_in(kernel.modules)
    there = {path.name.split(".")[0].replace("-", "_"): path for path in (kernel.modules / "kernel").rglob("*.ko*")}
    found = []
    for name in names:
        if name in there:
            found.append((f"{name}.ko", _unpacked(there[name])))
        elif name not in built_in:
            raise NotFound(f"kernel {kernel.release} has no module {name} in {kernel.modules}; a guest cannot do without it")
    return found


def _built_in(modules: Path) -> set[str]:
    try:
        lines = (modules / "modules.builtin").read_text().splitlines()
    except OSError:
        return set()
    return {os.path.basename(line).split(".")[0].replace("-", "_") for line in lines}


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    return data if path.suffix == ".ko" else _inflate(data, str(path))


def bootable(image: Path) -> tuple[bytes, bool]:
    """Return a kernel as it is to be booted, and whether that is an ELF image: a bzImage whose packing is unknown stays one.

    Raises CorruptData when it is no kernel.
    """
    data = image.read_bytes()
    if data[:4] == b"\x7fELF":
        return _slim_elf(data), True
    if data[0x202:0x206] != b"HdrS":
        raise CorruptData(f"{image} is neither a Linux bzImage nor an ELF kernel; give the file vmlinuz of a kernel package")
    # Linux, Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
    sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = data[start : start + length]
    try:
        elf = _inflate(payload, str(image))
    except (SpecError, CorruptData):
        return data, False
    # Only the entry named in a Xen note (PVH) can be used without a boot loader.
    return (_slim_elf(elf), True) if elf[:4] == b"\x7fELF" and _has_pvh(elf) else (data, False)


def _inflate(data: bytes, what: str) -> bytes:
    """Return packed data unpacked. Raises SpecError where the program for it is missing, CorruptData."""
    for magic, tool in _MAGIC:
        if not data.startswith(magic):
            continue
        try:
            if not tool:
                return gzip.decompress(data) if magic == b"\x1f\x8b" else lzma.LZMADecompressor().decompress(data)
            if shutil.which(tool[0]) is None:
                raise SpecError(f"{what} is packed with {tool[0]}, and there is no program of that name; install {tool[0]}")
            # The kernel's build appends four bytes of length, which the programs take for a broken next part.
            done = subprocess.run(tool, input=data, capture_output=True, check=False, timeout=_UNPACK_MAX_S)
            if done.stdout:
                return done.stdout
            raise CorruptData(f"{what} cannot be unpacked: {done.stderr.decode(errors='replace').strip()[:200]}")
        except (OSError, EOFError, lzma.LZMAError, subprocess.TimeoutExpired) as error:
            raise CorruptData(f"{what} cannot be unpacked: {error}") from error
    raise SpecError(f"{what} is packed in a way that is not known here (it begins with {data[:6].hex()})")


def _has_pvh(elf: bytes) -> bool:
    """Return whether an ELF kernel has a Xen note of type 18, XEN_ELFNOTE_PHYS32_ENTRY."""
    return struct.pack("<III", 4, 8, 18) + b"Xen\0" in elf or struct.pack("<III", 4, 4, 18) + b"Xen\0" in elf


def _slim_elf(data: bytes) -> bytes:
    """Return an ELF64 image up to the end of its last segment, without its table of sections."""
    offset, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    ends = [sum(struct.unpack_from("<QxxxxxxxxxxxxxxxxQ", data, offset + 56 * number + 8)) for number in range(count)]
    if data[4] != 2 or not ends or max(ends) > len(data):
        raise CorruptData("the kernel is no whole ELF64 image")
    slim = bytearray(data[: max(ends)])
    struct.pack_into("<Q", slim, 40, 0)
    struct.pack_into("<HHH", slim, 58, 0, 0, 0)
    return bytes(slim)
