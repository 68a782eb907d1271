"""The base image: this machine's Python and a handful of programs, made here without any registry.

For: a root file system in which a command that runs here runs in a container too, and that holds nothing else of this machine.
It is the interpreter's standard library, a shell and the usual small programs, and the libraries that these need (ldd(1)), in
one archive whose bytes depend on the content alone: the image's name is its hash, and an engine that has it is not told again.
Packages are not in it: the runtime mounts the environment they lie in, read-only (`python_mounts`).
Not for: images of users (they name their own), starting anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import marshal
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from tenure.errors import Unavailable
from tenure.runtimes.container_engine import Engine, EngineError

REPOSITORY = "tenure-base"
USER_ID = 65532
"""Who a command is inside when nobody is named: the number that images without a distribution use for it as well."""
_PROGRAMS = (
    *("sh", "bash", "env", "cat", "ls", "cp", "mv", "rm", "ln", "mkdir", "rmdir", "chmod", "touch", "head", "tail", "wc"),
    *("sort", "uniq", "cut", "tr", "grep", "sed", "awk", "find", "xargs", "date", "uname", "hostname", "dd", "df", "du"),
    *("ps", "kill", "test", "[", "tee", "timeout", "stat", "readlink", "dirname", "basename", "expr", "printf", "nproc"),
    *("mktemp", "tar", "gzip", "setsid", "sleep", "seq", "true", "false", "id", "mount", "umount", "nice", "yes", "sync"),
)
_LIBRARIES = (
    *("libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libm.so.6", "libresolv.so.2", "libanl.so.1"),
    *("libnss_files.so.2", "libnss_dns.so.2", "libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libz.so.1"),
)
"""What packages with compiled parts expect of a system (PEP 600) beside what the interpreter itself needs."""
_WHERE = "/usr/bin:/bin:/usr/sbin:/sbin"
_LEFT_OUT = re.compile(r"^(test|tests|idlelib|tkinter|turtledemo|ensurepip|site-packages|dist-packages|__pycache__|config-.*)$")
_FOLDERS = {"tmp": 0o1777, "var/tmp": 0o1777, "proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755, "home/tenure": 0o755}
_MERGED = ("bin", "sbin", "lib", "lib64")
_TEXTS = {
    "etc/passwd": f"root:x:0:0::/root:/bin/sh\ntenure:x:{USER_ID}:{USER_ID}::/home/tenure:/bin/sh\n",
    "etc/group": f"root:x:0:\ntenure:x:{USER_ID}:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_COPIED = ("/etc/ssl/certs/ca-certificates.crt",)


def ensure_base_image(engine: Engine, *, told: Callable[[str], None] = lambda step: None) -> str:
    """Return the base image's name, after making it in the engine where it is missing; told: each step. Raises Unavailable."""
    told("looking for what belongs in it")
    entries = gather()
    told(f"comparing {len(entries):,} files")
    name = f"{REPOSITORY}:{digest(entries)}"
    try:
        engine.call("GET", f"/images/{name}/json")
        return name
    except EngineError as error:
        if error.status != 404:
            raise Unavailable(f"the engine does not say whether it has the image {name}: {error}") from error
    with tempfile.TemporaryFile() as archive:
        told(f"packing {len(entries):,} files")
        write_archive(archive, entries)
        told(f"sending {archive.tell() / 1e6:.0f} MB to the engine")
        try:
            engine.call("POST", "/images/create", archive=archive, timeout_s=300.0, fromSrc="-", repo=name)
            engine.call("GET", f"/images/{name}/json")
        except EngineError as error:
            raise Unavailable(f"the engine did not take the image {name}: {error}") from error
    return name


def write_archive(stream: BinaryIO, entries: Mapping[str, Entry]) -> None:
    """Write the image's files as a tar: in order, of nobody's time, root's."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, entry in sorted(entries.items()):
            info = tarfile.TarInfo(name)
            info.mode = entry.mode
            if entry.link:
                info.type, info.linkname = tarfile.SYMTYPE, entry.link
                archive.addfile(info)
            elif entry.is_file:
                data = entry.content()
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
    stream.flush()


class Entry:
    """One file, link or folder of the image."""

    __slots__ = ("link", "mode", "module", "source", "text")

    def __init__(self, mode: int, *, source: Path | None = None, text: bytes = b"", link: str = "", module: str = "") -> None:
        """module: path inside of the Python source of which this is the code."""
        self.mode, self.source, self.text, self.link, self.module = mode, source, text, link, module

    @property
    def is_file(self) -> bool:
        """Whether it has content."""
        return self.source is not None or bool(self.text)

    def content(self) -> bytes:
        """Return a file's bytes; of code, the bytes of its source when that is no valid Python."""
        if self.source is None:
            return self.text
        return _code(self.source, self.module) if self.module else self.source.read_bytes()


def _code(source: Path, name: str) -> bytes:
    """Return a module's code, which an interpreter takes without comparing times: nobody can write it beside the source.

    What this interpreter has compiled already is taken from beside the source, with another head (PEP 552).
    """
    text = source.read_bytes()
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(text)
    with contextlib.suppress(OSError):
        made, info = Path(importlib.util.cache_from_source(str(source))).read_bytes(), source.stat()
        wanted = (0, int(info.st_mtime) & 0xFFFFFFFF, info.st_size & 0xFFFFFFFF)
        if made[:4] == importlib.util.MAGIC_NUMBER and struct.unpack("<III", made[4:16]) == wanted:
            return head + made[16:]
    try:
        return head + marshal.dumps(compile(text, name, "exec", dont_inherit=True, optimize=0))
    except (SyntaxError, ValueError):
        return text


def python_mounts() -> dict[str, str]:
    """Return what of this machine a command of the base image sees besides it, read-only: the packages of this interpreter.

    Host path -> path inside with `:ro`, the same: an environment's programs name their interpreter by its path.
    """
    found = [sys.prefix] if sys.prefix != sys.base_prefix else []
    for path in map(os.path.realpath, filter(None, sys.path)):
        if os.path.basename(path) in ("site-packages", "dist-packages") and not _lies_in(path, found):
            found.append(path)
    if own := own_folder():
        found.append(own)
    return {folder: f"{folder}:ro" for folder in found}


def own_folder() -> str:
    """Return the folder from which this package is imported when it is no folder of installed packages: a checkout."""
    own = str(Path(__file__).resolve().parents[2])
    return "" if os.path.basename(own) in ("site-packages", "dist-packages") else own


def _lies_in(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in map(os.path.realpath, folders))


def gather() -> dict[str, Entry]:
    """Return the base image's files by their names inside, sorted."""
    recipe = _Recipe()
    recipe.skeleton()
    recipe.programs()
    recipe.python()
    for library in _libraries(recipe.objects):
        recipe.add(library, Entry(0o755, source=Path(library)))
    return dict(sorted(recipe.found.items()))


class _Recipe:
    """What was gathered so far: files by name, and those of them that need libraries."""

    def __init__(self) -> None:
        self.found: dict[str, Entry] = {}
        self.objects: list[str] = []

    def add(self, path: str, entry: Entry) -> None:
        name = _inside(path)
        self._folder(os.path.dirname(name))
        self.found.setdefault(name, entry)

    def _folder(self, name: str, mode: int = 0o755) -> None:
        if name and name not in self.found:
            self._folder(os.path.dirname(name))
            self.found[name] = Entry(mode)

    def skeleton(self) -> None:
        for name in _MERGED:
            self._folder(f"usr/{name}")
            self.found[name] = Entry(0o777, link=f"usr/{name}")
        for name, mode in _FOLDERS.items():
            self._folder(name, mode)
        for name, text in _TEXTS.items():
            self.add(name, Entry(0o644, text=text.encode()))
        for path in filter(os.path.exists, _COPIED):
            self.add(path, Entry(0o644, source=Path(path)))

    def programs(self) -> None:
        for name in _PROGRAMS:
            if path := shutil.which(name, path=_WHERE):
                self.add(f"/usr/bin/{name}", Entry(0o755, source=Path(path)))
                self.objects.append(path)

    def python(self) -> None:
        binary = Path(os.path.realpath(sys.executable))
        self.add(str(binary), Entry(0o755, source=binary))
        self.objects.append(str(binary))
        for link in sorted(Path(sys.base_prefix, "bin").glob("python3*")):
            if link.is_symlink() and link.resolve() == binary:
                self.add(str(link), Entry(0o777, link=str(binary)))
        self.add("/usr/bin/python3", Entry(0o777, link=str(binary)))
        for root in sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}):
            for path in _tree(Path(root)):
                self._module(path)

    def _module(self, path: Path) -> None:
        self.add(str(path), Entry(0o644, source=path))
        if path.suffix == ".py":
            self.add(importlib.util.cache_from_source(str(path)), Entry(0o644, source=path, module=str(path)))
        elif path.suffix == ".so":
            self.objects.append(str(path))


def _inside(path: str) -> str:
    """Return a path's name in the archive: /bin, /lib, … are links to those below /usr."""
    name = os.path.normpath(path).strip("/")
    first, _, rest = name.partition("/")
    return f"usr/{first}/{rest}" if first in _MERGED and rest else name


def _tree(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if _LEFT_OUT.match(path.name):
            continue
        if path.is_dir():
            yield from _tree(path)
        elif path.is_file() and path.suffix not in (".a", ".pyc", ".pyo"):
            yield path


def _libraries(objects: list[str]) -> list[str]:
    """Return the paths of the libraries that programs and shared objects need, the loader included."""
    found = set(re.findall(r"(/\S+) \(0x", _said("ldd", *objects)))
    known = dict(re.findall(r"^\s*(\S+) \(libc6.*\) => (/\S+)$", _said("ldconfig", "-p"), re.MULTILINE)[::-1])
    return sorted(found | {known[name] for name in _LIBRARIES if name in known})


def _said(program: str, *words: str) -> str:
    found = shutil.which(program, path=_WHERE)
    if found is None:
        raise Unavailable(f"the base image cannot be made: no program named {program} here; install the C library's tools")
    return subprocess.run([found, *words], capture_output=True, text=True, check=False, timeout=60).stdout


def digest(entries: Mapping[str, Entry]) -> str:
    """Return the hash of the image's content: names, rights, links, bytes; code follows from its source and the interpreter."""
    whole = hashlib.sha256(sys.version.encode())
    for name, entry in entries.items():
        content = hashlib.sha256(entry.content()).hexdigest() if entry.is_file and not entry.module else ""
        whole.update(f"{name}\0{entry.mode:o}\0{entry.link}\0{content}\n".encode())
    return whole.hexdigest()[:16]
