"""A command in the root directory of an image, as a plain process: a mount namespace of its own, nothing copied.

    image's root/ ─► a small tmpfs with the root's entries bound into it, read-only ─► pivot_root(2)
                     + /proc /sys /dev, /tmp and /run in memory, and the attempt's own folder at its own path

The tmpfs has places for mounts anywhere, although the image is never written to. Root uses the mount namespace alone; anybody
else a user namespace in which nobody but themselves exists. It is no container: processes, network and users are the
machine's. Standard library and nouns only, as it runs between fork and exec. Not for: what lies in an image (`images`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenure.errors import SpecError, TenureError, Unsupported
from tenure.forms import MANIFEST_FILE

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_KEPT = ((os.ST_NOSUID, _MS_NOSUID), (os.ST_NODEV, _MS_NODEV), (os.ST_NOEXEC, _MS_NOEXEC))
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_OWN = ("proc", "sys", "dev", "tmp", "run")
"""Directories of the root that are never the image's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """What a command gets for the machine's own root directory."""

    path: str
    """Absolute; of the tree."""
    workdir: str = "/"
    """Inside."""
    binds: Mapping[str, str] = field(default_factory=dict)
    """Path on this machine -> path inside, with ``:ro`` at its end only to be read."""
    memory_bytes: int = 0
    """Bound of each of /tmp, /run and /dev/shm; 0: half of the machine's memory, as the kernel has it."""


def read_image(folder: str) -> dict[str, Any]:
    """Return the manifest of the image in a folder, as plain data. Raises SpecError when there is none."""
    path = Path(folder, MANIFEST_FILE)
    try:
        found = json.loads(path.read_bytes())
        return dict(found, forms=dict(found["forms"]), workdir=str(found.get("workdir", "/")))
    except FileNotFoundError as error:
        raise SpecError(
            f'there is no image in {folder}: it has no {MANIFEST_FILE}; "tenure image list" names those there are'
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{path} is not the manifest of an image: {error}; build it anew") from error


def form_path(folder: str, form: str) -> str:
    """Return where a form of the image in a folder lies. Raises SpecError when it was not built, or is gone."""
    found = read_image(folder)
    record = found["forms"].get(form)
    if record is None:
        had = ", ".join(sorted(found["forms"])) or "none"
        raise SpecError(
            f"image {found.get('name', folder)} has no form {form!r}, only: {had}. Build it: tenure image build --form {form}"
        )
    path = os.path.join(folder, str(record["path"]))
    if not os.path.exists(path):
        raise SpecError(f"image {found.get('name', folder)}: its {form} form is missing at {path}; build the image anew")
    return path


def why_no_root() -> str:
    """Return why no command can be given another root directory here; empty when nothing speaks against trying."""
    if platform.machine() not in _PIVOT_ROOT:
        return f"the number of pivot_root(2) on {platform.machine()} is not known here"
    if os.geteuid() == 0:
        return ""
    for path, wrong, what in (
        ("/proc/sys/user/max_user_namespaces", "0", "it allows no user namespaces"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "its users may not make user namespaces"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor keeps its users from user namespaces"),
    ):
        with contextlib.suppress(OSError):
            if Path(path).read_text().strip() == wrong:
                return f"without root a user namespace is needed, and this machine's settings are such that {what} ({path})"
    return ""


def root_of(folder: str, *, binds: Mapping[str, str], memory_bytes: int) -> Root:
    """Return the root form of the image in a folder. Raises SpecError, Unsupported with why it can't be had here."""
    path = form_path(folder, "root")
    if why := why_no_root():
        raise Unsupported("image", why, "Use the container runtime, or run Tenure as root.")
    return Root(path=path, workdir=read_image(folder)["workdir"], binds=binds, memory_bytes=memory_bytes)


def enter_root(root: Root) -> None:
    """Make the tree the calling process's root directory, and its workdir the current one. Raises OSError.

    The process must have one thread. Whoever is not root gets a user namespace first, in which its own number stays.
    """
    if os.geteuid() != 0:
        _own_user_namespace()
    else:
        _unshare(_NEWNS)
    _mount("", "/", flags=_MS_REC | _MS_PRIVATE)
    handles = {source: os.open(source, os.O_PATH | os.O_CLOEXEC) for source in (root.path, *root.binds)}
    top = root.path
    _mount("tmpfs", top, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    grafts = {target: source for source, target in root.binds.items()}
    _graft(f"/proc/self/fd/{handles[root.path]}", top, [_parts(target) for target in grafts], skip=_OWN)
    _own_directories(top, root.memory_bytes)
    for target, source in grafts.items():
        _bind_one(f"/proc/self/fd/{handles[source]}", top, target)
    _remount_read_only(top)
    for handle in handles.values():
        os.close(handle)
    os.chdir(top)
    if _LIBC.syscall(_PIVOT_ROOT[platform.machine()], b".", b".") != 0:
        raise _failed("pivot_root")
    if _LIBC.umount2(b".", _MNT_DETACH) != 0:
        raise _failed("umount of the machine's own root")
    os.chdir("/")
    os.chdir(root.workdir)


def join_root(pid: int) -> None:
    """Move the calling process, of one thread, to where an attempt's process lives. Raises OSError."""
    spaces = [("user", _NEWUSER), ("mnt", _NEWNS)] if os.geteuid() != 0 else [("mnt", _NEWNS)]
    handles = [(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), flag) for name, flag in spaces]
    for handle, flag in handles:
        if _LIBC.setns(handle, flag) != 0:
            raise _failed(f"setns to what process {pid} has")
        os.close(handle)


# --- helpers ---


def _own_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _unshare(_NEWUSER | _NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", name).write_text(text)


def _graft(source: str, place: str, targets: list[tuple[str, ...]], *, skip: tuple[str, ...] = ()) -> None:
    """Bind the entries of a directory into an empty one; those on the way to a target become directories of our own."""
    deeper: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in filter(None, targets):
        deeper.setdefault(first, []).append(tuple(rest))
    for entry in sorted(os.listdir(source)):
        if entry in skip:
            continue
        old, new = f"{source}/{entry}", f"{place}/{entry}"
        mode = os.lstat(old).st_mode
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(old), new)
            continue
        if stat.S_ISDIR(mode):
            os.mkdir(new)
            if any(deeper.get(entry, ())):
                _graft(old, new, deeper[entry])
                continue
        else:
            os.close(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        _bind(old, new, read_only=True)


def _own_directories(top: str, memory_bytes: int) -> None:
    size = f",size={memory_bytes}" if memory_bytes else ""
    for name in _OWN:
        os.mkdir(f"{top}/{name}")
    _mount("/proc", f"{top}/proc", flags=_MS_BIND | _MS_REC)
    _mount("/sys", f"{top}/sys", flags=_MS_BIND | _MS_REC)
    for name in ("tmp", "run"):
        _mount("tmpfs", f"{top}/{name}", "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777{size}")
    _mount("tmpfs", f"{top}/dev", "tmpfs", _MS_NOSUID, "mode=0755,size=64k")
    for name in filter(lambda name: os.path.exists(f"/dev/{name}"), _DEVICES):
        os.close(os.open(f"{top}/dev/{name}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        _mount(f"/dev/{name}", f"{top}/dev/{name}", flags=_MS_BIND)
    os.mkdir(f"{top}/dev/shm")
    _mount("tmpfs", f"{top}/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777{size}")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(target, f"{top}/dev/{name}")


def _bind_one(source: str, top: str, target: str) -> None:
    place, read_only = f"{top}/{target.removesuffix(':ro').strip('/')}", target.endswith(":ro")
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if not os.path.exists(place):
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    _bind(source, place, read_only=read_only)


def _parts(target: str) -> tuple[str, ...]:
    return tuple(part for part in target.removesuffix(":ro").split("/") if part)


def _bind(source: str, place: str, *, read_only: bool) -> None:
    _mount(source, place, flags=_MS_BIND)
    if read_only:
        _remount_read_only(place)


def _remount_read_only(place: str) -> None:
    kept = os.statvfs(place).f_flag  # what the mount below has may not be taken away in a user namespace
    _mount("", place, flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY | sum(flag for bit, flag in _KEPT if kept & bit))


def _mount(source: str, place: str, kind: str = "", flags: int = 0, words: str = "") -> None:
    given = [os.fsencode(text) if text else None for text in (source or "none", place, kind)]
    if _LIBC.mount(*given, ctypes.c_ulong(flags), os.fsencode(words) if words else None) != 0:
        raise _failed(f"mount of {source or 'nothing'} at {place}")


def _unshare(flags: int) -> None:
    if _LIBC.unshare(flags) != 0:
        raise _failed("unshare (a namespace of its own)")


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


_PACKAGES = str(Path(__file__).parents[2])
_PROGRAM = f"import sys; sys.path.insert(0, {_PACKAGES!r}); from tenure.runtimes.rooted import main; main()"


def root_prefix(path: Path, workdir: str, profile: Path | None = None) -> tuple[str, ...]:
    """Return what goes before a command so that it runs in a tree, outside of any lease: so an image is tried when made.

    profile: of its system calls, in Docker's format; None: they are not filtered.
    """
    return (sys.executable, "-I", "-c", _PROGRAM, str(path), workdir, str(profile or ""))


def main() -> None:
    """Become the command after the tree, the workdir and the profile, in the tree. Never returns."""
    from tenure.runtimes.become import filter_calls
    from tenure.runtimes.seccomp import compiled

    path, workdir, profile, *argv = sys.argv[1:]
    try:
        program = compiled(Path(profile).read_text()) if profile else b""
        enter_root(Root(path=path, workdir=workdir))
        filter_calls(program)
        os.execvp(argv[0], argv)
    except (OSError, TenureError) as error:
        os.write(2, f"cannot run {argv[0]!r} in {path}: {error}\n".encode())
    os._exit(127)
