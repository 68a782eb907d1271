"""Form microvm: a directory tree as a compressed read-only root for one kernel, and the small archive that mounts it.

    <folder>/kernel           ready to be booted (`microvm_kernel.bootable`)
    <folder>/initrd           first program (`data/microvm/init.c`) and modules
    <folder>/root.squashfs    the tree; all of root's, all times 0: the same tree gives the same bytes

Not for: what belongs into the tree (`closures`), starting it (`runtimes.microvm`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from tenure.closures import files_hash
from tenure.cpio import Archive
from tenure.errors import JobFailed, NotFound, SpecError, Unavailable, Unsupported
from tenure.forms import FormRecord
from tenure.images.build import Made, Maker
from tenure.images.microvm_kernel import Kernel, bootable, find_kernel, read_modules
from tenure.images.tree import scan

FOLDER = "microvm"
MAKER = "mksquashfs"
COMPRESSION = ("-comp", "lz4", "-Xhc")
"""LZ4 at its hardest: of lz4, lz4hc, zstd, none and erofs the quickest to start from under emulation."""
MAKE_MAX_S = 900.0
MOUNT_POINTS = ("dev", "proc", "sys", "tmp", "run")
"""Folders that the guest mounts something on; made in the root where the tree has none."""


def first_program() -> bytes:
    """Return the first program of a guest (x86-64), as it was built from the source beside it."""
    return (resources.files("tenure.data") / "microvm/init-x86_64").read_bytes()


def check_tools() -> None:
    """Raise Unsupported when the program that makes compressed roots is missing."""
    if shutil.which(MAKER) is None:
        raise Unsupported(
            "form microvm",
            f"there is no program named {MAKER} here",
            "Install squashfs-tools (apt-get install squashfs-tools).",
        )


def build_microvm(
    tree: Path,
    into: Path,
    *,
    kernel: Kernel,
    done: Callable[[str], None] = lambda _: None,
    compression: tuple[str, ...] = COMPRESSION,
) -> FormRecord:
    """Make form microvm of a directory tree in the folder `into`, which appears whole or not at all.

    done: told what was made. Raises Unsupported without mksquashfs, SpecError, NotFound, CorruptData for a kernel that will
    not do, JobFailed when mksquashfs fails.
    """
    check_tools()
    if not tree.is_dir():
        raise SpecError(f"form microvm is made of a directory tree; {tree} is none")
    into.parent.mkdir(parents=True, exist_ok=True)
    modules = read_modules(kernel)
    with tempfile.TemporaryDirectory(prefix=f".{into.name}-", dir=into.parent) as name:
        draft = Path(name) / into.name
        draft.mkdir()
        data, is_elf = bootable(kernel.image)
        (draft / "kernel").write_bytes(data)
        done(f"kernel {kernel.release or kernel.image.name}: {len(data)} bytes" + ("" if is_elf else ", packed"))
        (draft / "initrd").write_bytes(initrd(modules))
        _make_root(tree, draft / "root.squashfs", compression)
        done(f"root.squashfs: {(draft / 'root.squashfs').stat().st_size} bytes")
        record = _record(draft, kernel, [name for name, _ in modules], is_elf)
        if into.exists():
            shutil.rmtree(into)
        os.rename(draft, into)
    return record


def microvm_form(home: Path | None = None, kernel: Path | None = None) -> Maker:
    """Return what makes form microvm (`build.Maker`) with the kernel given, else with one that is found (`find_kernel`)."""

    def make(made: Made) -> FormRecord:
        check_tools()
        try:
            found = find_kernel(kernel, home=home)
        except NotFound as error:
            raise Unsupported("form microvm", str(error)) from error
        return build_microvm(made.tree, made.folder / FOLDER, kernel=found)

    return make


def initrd(modules: list[tuple[str, bytes]]) -> bytes:
    """Return the archive that every start of the image unpacks first: first program, modules, console."""
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("init", first_program(), 0o755)
    for name, data in modules:
        archive.file(f"modules/{name}", data)
    return archive.to_bytes()


def _make_root(tree: Path, into: Path, compression: tuple[str, ...]) -> None:
    missing = [name for name in MOUNT_POINTS if not (tree / name).is_dir()]
    command = [MAKER, str(tree), str(into), *compression, "-noappend", "-all-root", "-no-xattrs", "-no-exports"]
    command += ["-all-time", "0", "-mkfs-time", "0", "-reproducible", "-quiet", "-no-progress"]
    for name in missing:  # a tree is not ours to change
        command += ["-p", f"{name} d 755 0 0"]
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=MAKE_MAX_S, env=environment)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{MAKER} did not finish {tree} within {MAKE_MAX_S:g} s") from error
    if made.returncode != 0 or not into.exists():
        said = (made.stderr or made.stdout).strip()[-500:]
        raise JobFailed(f"{MAKER} could not make a root of {tree} (exit {made.returncode}): {said or 'it said nothing'}")


def _record(folder: Path, kernel: Kernel, modules: list[str], is_elf: bool) -> FormRecord:
    for path in folder.iterdir():
        path.chmod(0o644)
    files = scan(folder)
    hashes = {f"{file.path[1:]}_sha256": file.sha256 for file in files}
    return FormRecord(
        path=FOLDER,
        size_bytes=sum(file.size_bytes for file in files),
        sha256=files_hash(files),
        details={
            "kernel": "kernel",
            "initrd": "initrd",
            "root": "root.squashfs",
            "root_type": "squashfs",
            "modules": " ".join(modules),
            "release": kernel.release,
            "kernel_format": "elf" if is_elf else "bzimage",
        }
        | hashes,
    )
