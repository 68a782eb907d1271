"""The guest's root: this Python and what the runtime contract suite uses, as one cpio archive that the kernel unpacks.

Two archives follow each other (the kernel takes that): the base, kept below the cache under the hash of what it is made of,
and the project's own files, made anew each time. Uncompressed: unpacking costs the emulated machine more than reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "/opt/python"
PACKAGES = "/opt/packages"
PROJECT = "/opt/tenure"
_MODULES = ("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pygments", "pytest_timeout.py", "msgspec")
_DISTRIBUTIONS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest-timeout", "msgspec")
_TOOLS = (
    *("sh", "cat", "cut", "find", "id", "ip", "ln", "ls", "mkdir"),
    *("readlink", "rm", "seq", "setsid", "sleep", "touch", "true"),
)
_LEFT_OUT = re.compile(
    r"^(test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|pydoc_data|config-.*|site-packages|dist-packages|distutils|xmlrpc|wsgiref)$"
)
_FOLDERS = ("dev", "proc", "sys", "tmp", "run", "root", "home/user", "etc", "var")
_USERS = {"root": 0, "user": 1000, "older": 1001, "nobody": 65534}
_TEXTS = {
    "etc/passwd": "".join(f"{name}:x:{number}:{number}::/tmp:/bin/sh\n" for name, number in _USERS.items()),
    "etc/group": "".join(f"{name}:x:{number}:\n" for name, number in _USERS.items()),
    "etc/nsswitch.conf": "passwd: files\ngroup: files\n",
}


class Archive:
    """A cpio archive in the form that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def _add(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        name = name.strip("/")
        if name in self._names:
            return
        self._names.add(name)
        number = len(self._names)
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        head = b"070701" + "".join(f"{field:08X}" for field in fields).encode() + name.encode() + b"\0"
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Add a folder and those it lies in."""
        name = name.strip("/")
        if parent := os.path.dirname(name):
            self.folder(parent)
        self._add(name, stat.S_IFDIR | mode, b"")

    def text(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file and the folders it lies in."""
        self.folder(os.path.dirname(name.strip("/")))
        self._add(name, stat.S_IFREG | mode, data)

    def file(self, name: str, source: Path | str) -> None:
        """Add a file of this machine, readable and, if it is so here, executable for all."""
        source = Path(source)
        self.text(name, source.read_bytes(), 0o755 if os.access(source, os.X_OK) else 0o644)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self.folder(os.path.dirname(name.strip("/")))
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self._add(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def module(self, name: str, source: Path) -> None:
        """Add a Python source and its code, which the guest then takes without comparing times."""
        self.file(name, source)
        folder, base = os.path.split(name)
        with contextlib.suppress(py_compile.PyCompileError), tempfile.TemporaryDirectory() as scratch:
            made = py_compile.compile(
                str(source),
                f"{scratch}/code",
                dfile=f"/{name.strip('/')}",
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            assert made is not None
            cached = os.path.basename(importlib.util.cache_from_source(base))
            self.text(f"{folder}/__pycache__/{cached}", Path(made).read_bytes())

    def tree(self, name: str, source: Path, leave_out: re.Pattern[str] = re.compile("^$")) -> list[Path]:
        """Add a folder of Python code; return the shared objects in it."""
        shared = []
        for path in sorted(source.iterdir()):
            inner = f"{name}/{path.name}"
            if path.name == "__pycache__" or leave_out.match(path.name):
                continue
            if path.is_dir():
                shared += self.tree(inner, path)
            elif path.suffix == ".py":
                self.module(inner, path)
            elif path.suffix == ".so":
                self.file(inner, path)
                shared.append(path)
            elif path.suffix in (".toml", ".txt", ".ini", ".typed"):
                self.file(inner, path)
        return shared

    def to_bytes(self) -> bytes:
        """Return the archive with its end mark."""
        return b"".join(self._parts) + _end()


def _end() -> bytes:
    archive = Archive()
    archive._add("TRAILER!!!", 0, b"")
    data = b"".join(archive._parts)
    return data + bytes(-len(data) % 512)


def _libraries(objects: list[Path | str]) -> dict[str, str]:
    """Return path in the guest -> path here of all libraries that programs and shared objects need (ldd(1))."""
    done = subprocess.run(["ldd", *map(str, objects)], capture_output=True, text=True, check=False)
    return {found: found for found in re.findall(r"(/\S+) \(0x", done.stdout)}


def _recipe() -> str:
    """Return the hash of what the base is made of: this file, the interpreter, the packages, the C library."""
    python = Path(os.path.realpath(sys.executable))
    packages = {name: version(name) for name in _DISTRIBUTIONS}
    here = [sys.version, str(python), python.stat().st_mtime_ns, os.confstr("CS_GNU_LIBC_VERSION")]
    facts = [Path(__file__).read_text(), *here, packages]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def is_built(cache: Path) -> bool:
    """Return whether the base archive for this machine as it is now lies in the cache."""
    return _path(cache).exists()


def _path(cache: Path) -> Path:
    return cache / f"base-{_recipe()}.cpio"


def base(cache: Path) -> Path:
    """Return the base archive, made when it is not there yet; older ones are removed."""
    made = _path(cache)
    if not made.exists():
        for old in cache.glob("base-*.cpio"):
            old.unlink()
        draft = made.with_suffix(".part")
        draft.write_bytes(_base().to_bytes())
        draft.replace(made)
    return made


def _base() -> Archive:
    archive = Archive()
    for name in _FOLDERS:
        archive.folder(name)
    archive.device("dev/console", 5, 1)
    for name, text in _TEXTS.items():
        archive.text(name, text.encode())
    python = Path(os.path.realpath(sys.executable))
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    archive.file(f"{HOME}/bin/{name}", python)
    archive.link(f"{HOME}/bin/python", name)
    objects: list[Path | str] = [python]
    objects += archive.tree(f"{HOME}/lib/{name}", Path(sysconfig.get_path("stdlib")), _LEFT_OUT)
    packages = Path(sysconfig.get_path("purelib"))
    for module in _MODULES:
        source = packages / module
        if source.is_dir():
            objects += archive.tree(f"{PACKAGES}/{module}", source)
        elif source.exists():
            archive.module(f"{PACKAGES}/{module}", source)
    for tool in _TOOLS:
        if found := shutil.which(tool, path=f"{os.defpath}:/usr/sbin:/sbin"):
            archive.file(f"bin/{tool}", found)
            objects.append(found)
    archive.link("usr/bin", "../bin")
    for inside, here in _libraries(objects).items():
        archive.file(inside, here)
    return archive


def project() -> bytes:
    """Return the archive of this project's sources and of the tests that run inside, with the guest's first program."""
    archive = Archive()
    archive.tree(
        f"{PROJECT}/src/tenure", ROOT / "src/tenure", re.compile("^(broker|cli|experiments|ledger|recommend|serve|train)$")
    )
    for part in ("contracts", "guest", "runtimes"):
        archive.tree(f"{PROJECT}/tests/{part}", ROOT / "tests" / part)
    archive.file(f"{PROJECT}/tests/conftest.py", ROOT / "tests/conftest.py")
    archive.file(f"{PROJECT}/pyproject.toml", ROOT / "pyproject.toml")
    first = f"#!{HOME}/bin/python -S\nimport sys\nsys.path[:0] = ['{PROJECT}']\nfrom tests.guest.inside import main\nmain()\n"
    archive.text("init", first.encode(), 0o755)
    return archive.to_bytes()
