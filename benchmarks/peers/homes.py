"""Homes of peers: a folder each with a virtual environment and, where needed, a few files of Debian packages.

Installing twice costs nothing: a stamp holds what was asked for, and another wish makes the home anew. Debian packages are
unpacked into the home, not installed, so that nothing of the machine changes (only package lists may be fetched, as root).
Not here: starting anything (`processes`).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT, Skip

PATIENCE_S = 900.0
"""Bound of one installation."""


def default_root() -> Path:
    """Return where peers live when nobody says otherwise: $TENURE_PEERS, else `.cache/peers` of the checkout."""
    named = os.environ.get("TENURE_PEERS")
    return Path(named) if named else ROOT / ".cache" / "peers"


def make(root: Path, name: str, *, packages: Sequence[str] = (), debian: Sequence[str] = ()) -> Path:
    """Return the home `root/name` with these packages in it; made once.

    packages: requirements for pip, in one virtual environment `venv`. debian: packages unpacked into `debian`.
    Raises Skip with the installer's last line when something can't be had here.
    """
    home = root / name
    home.mkdir(parents=True, exist_ok=True)
    wish = json.dumps({"packages": list(packages), "debian": list(debian), "python": sys.version_info[:2]})
    stamp = home / "made.json"
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wish:
            return home
        for folder in ("venv", "debian"):
            shutil.rmtree(home / folder, ignore_errors=True)
        if packages:
            _run(name, [sys.executable, "-m", "venv", str(home / "venv")], home)
            _run(name, [str(python(home)), "-m", "pip", "install", "-q", *packages], home)
        if debian:
            _unpack(name, home, debian)
        stamp.write_text(wish)
    return home


def made(root: Path, name: str) -> bool:
    """Return whether a home has been made."""
    return (root / name / "made.json").exists()


def python(home: Path) -> Path:
    """Return the interpreter of a home."""
    return home / "venv" / "bin" / "python"


def site_packages(home: Path) -> Path:
    """Return where a home's libraries are."""
    return next((home / "venv" / "lib").glob("python3*/site-packages"))


def debian_libraries(home: Path) -> str:
    """Return the folders of unpacked shared libraries, as LD_LIBRARY_PATH takes them."""
    return os.pathsep.join(str(folder) for folder in sorted((home / "debian" / "usr" / "lib").glob("*-linux-gnu")))


def _unpack(name: str, home: Path, packages: Sequence[str]) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Skip(f"{name} needs the Debian packages {', '.join(packages)}, and there is no apt-get here")
    files = home / "downloads"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages]
    if subprocess.run(download, cwd=files, capture_output=True, timeout=PATIENCE_S, check=False).returncode:
        if os.geteuid() == 0:  # a new machine has no package lists yet
            subprocess.run(["apt-get", "-q", "update"], capture_output=True, timeout=PATIENCE_S, check=False)
        _run(name, download, home, cwd=files)
    for file in sorted(files.glob("*.deb")):
        _run(name, ["dpkg-deb", "-x", str(file), str(home / "debian")], home)
    shutil.rmtree(files)


def _run(name: str, argv: list[str], home: Path, *, cwd: Path | None = None) -> None:
    try:
        with open(home / "log", "ab") as log:
            code = subprocess.run(argv, cwd=cwd or home, stdout=log, stderr=log, timeout=PATIENCE_S, check=False).returncode
    except subprocess.TimeoutExpired:
        raise Skip(f"{name} is not installed here: {' '.join(argv)} took longer than {PATIENCE_S:g} s") from None
    if code:
        lines = (home / "log").read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise Skip(f"{name} can't be installed here: {lines[-1][:200]} (log: {home / 'log'})")
