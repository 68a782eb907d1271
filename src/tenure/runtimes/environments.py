"""Environments of workspaces: what a requirements file names, installed once, found again by its content.

For: a virtual environment per requirements file and interpreter, built by pip below one folder, which a workspace uses as it
is: processes at its path, containers through a read-only mount of it at the same path (one copy on disk and in memory for
all of them, where a layer per image would be copied into the engine).
Only wheels are installed: a wheel is unpacked, where a source distribution runs code of its author at build time, outside of
any lease's bounds. So no line of a requirements file may name a folder, an archive of source, or another file.
Not for: an image's own Python (its packages come with it), conda, other languages.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tenure.errors import NotFound, SpecError, Unavailable
from tenure.runtimes.state import read_json, write_json

MAX_BUILD_S = 1800.0
MAX_REQUIREMENTS_BYTES = 1 << 20
UNUSED_S = 30 * 86400.0
"""After so long without a lease an environment may go."""
_RECORD = "environment.json"
_OPTIONS = ("--index-url", "-i", "--extra-index-url", "--find-links", "-f", "--pre", "--require-hashes", "--trusted-host")
_OPTIONS_TEXT = "--index-url, --extra-index-url, --find-links, --pre, --require-hashes, --trusted-host"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_FAILED = (
    re.compile(r"ERROR: No matching distribution found for ([^\s(]+)"),
    re.compile(r"ERROR: Could not find a version that satisfies the requirement ([^\s(]+)"),
    re.compile(r"ERROR: Cannot install (.+?) because these package versions"),
)
_NOT_REACHED = ("NewConnectionError", "ConnectTimeoutError", "Temporary failure in name resolution", "ReadTimeoutError")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One that is complete."""

    path: Path
    packages: dict[str, str]
    """Name, as indexes write it -> version."""
    built: bool
    """Whether this call built it; else it was there."""
    build_s: float
    size_bytes: int

    @property
    def key(self) -> str:
        """The hash of what it is made from, its folder's name."""
        return self.path.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"


def read_requirements(path: Path) -> str:
    """Return a requirements file's text once every line of it can be honoured. Raises NotFound, SpecError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"no requirements file {path}") from error
    except OSError as error:
        raise SpecError(f"requirements {path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_REQUIREMENTS_BYTES:
        raise SpecError(f"requirements {path} has {len(data)} bytes; at most {MAX_REQUIREMENTS_BYTES} are read")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SpecError(f"requirements {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    for number, line in _lines(text):
        if why := _unwanted(line):
            raise SpecError(f"{path}:{number}: {line!r} {why}")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and content of each requirement, continued lines joined, without comments."""
    joined, begun = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*$", "", raw).rstrip()
        begun = begun or number
        joined += line.removesuffix("\\").strip() + " " * line.endswith("\\")
        if not line.endswith("\\"):
            if joined.strip():
                yield begun, joined.strip()
            joined, begun = "", 0
    if joined.strip():
        yield begun, joined.strip()


def _unwanted(line: str) -> str:
    """Return why a line cannot be honoured; empty when it can."""
    word = line.split("=", 1)[0].split()[0] if line.startswith("-") else ""
    if word:
        return "" if word in _OPTIONS else f"is not taken; the options that are: {_OPTIONS_TEXT}"
    _, at, url = line.partition("@")
    if at and "://" in url and not url.split(";")[0].split("#")[0].split()[0].endswith(".whl"):
        return "would run its author's code to be built; name a wheel, or a package of an index"
    if not _NAME.match(line) or "/" in line.split("@")[0].split(";")[0]:
        return "is no package of an index; folders and archives are not installed, only wheels"
    return ""


def environment_key(text: str) -> str:
    """Return the name of the environment of a requirements text: of its lines, the interpreter and where that lies."""
    lines = "\n".join(line for _, line in _lines(text))
    whole = f"{sys.version}\0{os.path.realpath(sys.executable)}\0{lines}"
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def ensure_environment(
    root: Path, requirements: Path, *, told: Callable[[str], None] = lambda _: None, max_s: float = MAX_BUILD_S
) -> Environment:
    """Return the environment of a requirements file below `root`, built when it is not there.

    told: each step, for people. max_s: for the build, and for waiting for somebody else's. What fails leaves nothing behind.
    Raises NotFound, SpecError with the requirement that failed, Unavailable.
    """
    text = read_requirements(requirements)
    key = environment_key(text)
    place = root / key
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f"{key}.lock", told, max_s):
        record = read_json(place / _RECORD)
        if record is not None and (place / "bin" / "python").exists():
            os.utime(place / _RECORD)
            return _environment(place, record, built=False)
        shutil.rmtree(place, ignore_errors=True)  # a build that was killed
        begun_s = time.monotonic()
        try:
            packages = _build(place, text, requirements, told, max_s)
            record = {"packages": packages, "build_s": time.monotonic() - begun_s, "size_bytes": _size_bytes(place)}
            write_json(place / _RECORD, record, sync=True, mode=0o644)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return _environment(place, record, built=True)


def sweep(root: Path, *, in_use: Collection[str], now_s: float, unused_s: float = UNUSED_S) -> list[str]:
    """Remove environments that no lease has asked for in so long, those of `in_use` apart; return their names."""
    gone = []
    for record in root.glob(f"*/{_RECORD}"):
        key = record.parent.name
        if key in in_use or now_s - record.stat().st_mtime < unused_s:
            continue
        with _alone(root / f"{key}.lock", lambda _: None, 1.0):
            if now_s - record.stat().st_mtime >= unused_s:
                shutil.rmtree(record.parent, ignore_errors=True)
                gone.append(key)
    return gone


def _environment(place: Path, record: dict[str, object], *, built: bool) -> Environment:
    packages = record.get("packages")
    return Environment(
        path=place,
        packages=dict(packages) if isinstance(packages, dict) else {},
        built=built,
        build_s=float(str(record.get("build_s", 0.0))),
        size_bytes=int(str(record.get("size_bytes", 0))),
    )


@contextlib.contextmanager
def _alone(lock: Path, told: Callable[[str], None], max_s: float) -> Iterator[None]:
    """Only one process builds or removes an environment at a time. Raises Unavailable."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end_s, said = time.monotonic() + max_s, False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end_s:
                    raise Unavailable(f"environment {lock.stem} has been under construction for {max_s:g} s") from None
                if not said:
                    told("another command is building it: waiting")
                    said = True
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _build(place: Path, text: str, requirements: Path, told: Callable[[str], None], max_s: float) -> dict[str, str]:
    """Make the environment and return its packages. Raises SpecError, Unavailable."""
    count = sum(1 for _, line in _lines(text) if not line.startswith("-"))
    told(f"building {place.name}: {count} requirements, Python {sys.version.split()[0]}")
    make = [sys.executable, "-m", "venv", "--without-pip", str(place)]
    done = subprocess.run(make, capture_output=True, text=True, timeout=120, check=False, umask=0o022)
    if done.returncode != 0:
        raise Unavailable(f"no virtual environment can be made in {place}: {_end(done.stdout + done.stderr)}")
    if not count:
        return {}
    wanted, report = place / "requirements.txt", place / "report.json"
    wanted.write_text(text)
    argv = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--only-binary", ":all:"]
    argv += ["--no-input", "--disable-pip-version-check", "--no-warn-script-location", "--progress-bar", "off"]
    code, said, late = _watched([*argv, "--report", str(report), "-r", str(wanted)], told, max_s)
    if late:
        raise Unavailable(f"{requirements} was not installed within {max_s:g} s, and the attempt was ended: {_end(said)}")
    if code != 0:
        raise _why(said, text, requirements)
    installed = json.loads(report.read_text())["install"]
    report.unlink()
    return {str(item["metadata"]["name"]).lower(): str(item["metadata"]["version"]) for item in installed}


def _watched(argv: list[str], told: Callable[[str], None], max_s: float) -> tuple[int, str, bool]:
    """Run pip, telling what it collects; return its exit code, what it said, and whether it was ended for its time."""
    late = threading.Event()
    environment = {**os.environ, "PYTHONPATH": "", "PIP_REQUIRE_VIRTUALENV": "0"}
    said: list[str] = []
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=environment,
        umask=0o022,
    ) as process:

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def too_late() -> None:
            late.set()
            end()

        timer = threading.Timer(max_s, too_late)
        timer.daemon = True
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith(("Collecting ", "Processing ", "Installing collected packages")):
                    verb, _, what = line.split(" (from ")[0].strip().partition(" ")
                    told(f"{verb.lower()} {os.path.basename(what)}"[:200])
        finally:
            timer.cancel()
            if process.poll() is None and sys.exc_info()[0] is not None:
                end()
    return process.returncode, "".join(said), late.is_set()


def _why(said: str, text: str, requirements: Path) -> SpecError | Unavailable:
    """Return the error that names the requirement which failed, and where it stands."""
    if any(word in said for word in _NOT_REACHED) and "No matching distribution" in said:
        return Unavailable(f"{requirements}: the package index could not be reached: {_end(said)}")
    if match := re.search(r"Invalid requirement: (.+?) \(from line (\d+) of ", said):
        return SpecError(f"{requirements}:{match[2]}: {match[1]} is no requirement; write e.g. numpy>=1.26 (PEP 508)")
    for pattern in _FAILED:
        if match := pattern.search(said):
            wanted = match[1].rstrip(".,;'\"")
            break
    else:
        return SpecError(f"{requirements} could not be installed: {_end(said)}")
    line = next((f"{requirements}:{number}: " for number, line in _lines(text) if _same(line, wanted)), f"{requirements}: ")
    if "conflicting dependencies" in said:
        reasons = re.findall(r"^ {4}(\S.*)$", said.partition("The conflict is caused by")[2], re.MULTILINE)
        return SpecError(f"{line}{wanted} cannot be installed together: {'; '.join(reasons[:4]) or _end(said)}")
    versions = re.search(r"\(from versions: (.*?)\)", said)
    known = versions[1] if versions and versions[1] != "none" else ""
    offered = f"as wheels there are {', '.join(known.split(', ')[-8:])}" if known else "the index has no wheel of that name"
    return SpecError(f"{line}no wheel for {wanted!r} fits Python {sys.version.split()[0]} here; {offered}")


def _same(line: str, wanted: str) -> bool:
    """Whether a requirement line is of the package that pip names."""
    mine, its = _NAME.match(line), _NAME.match(wanted)
    return bool(mine and its) and _plain(mine[0]) == _plain(its[0])  # type: ignore[index]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _end(said: str) -> str:
    """Return the last words that matter."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return " ".join([line for line in lines if "ERROR" in line][-2:] or lines[-2:])[-500:] or "it said nothing"


def _size_bytes(place: Path) -> int:
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(place) for name in names)
