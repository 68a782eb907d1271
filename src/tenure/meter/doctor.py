"""What this machine lets Tenure do, and what it would take to get the rest. `diagnose` looks; it changes nothing that stays.

Not here: confining itself (`runtimes`), printing (`cli`).
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tenure.meter import cgroups
from tenure.meter.machine import capacity, machine, versions
from tenure.meter.nvml import MPS_PROGRAM, find_mps_control, has_device_file
from tenure.resources import show_bytes

PROBE_S = 5.0
"""How long a probe in a child process may take."""
LEAST_FREE_BYTES = 1 << 30
SCOPE = "systemd-run --user --scope -p Delegate=yes tenure up"
"""How a user gets a group with the controllers that systemd delegates to users; a session's own group has none."""
EXTRAS = {
    "scikit-learn": "tenure[demo]",
    "onnx": "tenure[demo]",
    "torch": "torch",
    "keras": "keras",
    "ray": "ray",
    "boto3": "boto3",
}
"""Distribution -> what to hand to pip for it."""
_USED = ("cpu", "cpuacct", "memory", "pids", "cpuset", "freezer")
_EARLIEST_S = 1_700_000_000.0
"""Late 2023: a clock before this was never set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool | None
    """True: usable. False: missing or broken, so something does not work. None: missing, which only narrows the choice."""
    found: str
    """What was seen."""
    means: str
    """What follows from it for jobs here."""
    remedy: str = ""
    """What it would take; empty when nothing is missing."""


def diagnose(home: Path) -> list[Finding]:
    """Return what this machine offers, in a fixed order. Never raises; takes a few seconds at most.

    home: where Tenure keeps its files, or will.
    """
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", _python),
        ("machine", _machine),
        ("cgroups", _cgroups),
        ("namespaces", _namespaces),
        ("docker", _docker),
        ("podman", _podman),
        ("gpu", _gpu),
        ("kvm", _kvm),
        ("microvm", _microvm),
        ("extras", _extras),
        ("home", lambda: _home(home)),
        ("clock", _clock),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # a doctor who falls over at the first odd machine helps nobody: report it as found
            findings.append(
                Finding(
                    name=name,
                    ok=None,
                    found=f"looking failed: {type(error).__name__}: {error}",
                    means="unknown whether it can be used here",
                    remedy="report this with the text found",
                )
            )
    return findings


def _python() -> list[Finding]:
    fine = sys.version_info >= (3, 11)
    return [
        Finding(
            name="python",
            ok=fine,
            found=f"{platform.python_implementation()} {platform.python_version()}",
            means="supported" if fine else "too old: Tenure needs 3.11 or newer",
            remedy="" if fine else "install Python 3.11 or newer, and Tenure in it",
        )
    ]


def _machine() -> list[Finding]:
    here, offered = machine(), capacity()
    return [
        Finding(
            name="machine",
            ok=True,
            found=f"{here.cpu_model}, {offered.cpus:g} cores, {show_bytes(offered.memory_bytes)}, Linux {here.kernel}",
            means=f"a node here can lease out {offered.cpus:g} cores and {show_bytes(offered.memory_bytes)}",
        )
    ]


def _cgroups() -> list[Finding]:
    mounted = cgroups.hierarchies()
    if not mounted:
        return [
            Finding(
                name="cgroups",
                ok=None,
                found="no cgroup hierarchy is mounted",
                means="CPU is not held; memory is polled and can be overrun for a moment (advisory)",
                remedy="mount cgroup v2 at /sys/fs/cgroup, or start the container with it",
            )
        ]
    paths = cgroups.own_paths()
    findings = []
    for version in sorted({hierarchy.version for hierarchy in mounted}):
        names = sorted({name for h in mounted if h.version == version for name in h.controllers} & set(_USED))
        if not names and version == 2 and any(h.version == 1 for h in mounted):
            continue  # the hybrid layout: v2 is mounted, v1 has the controllers that matter
        if version == 1:
            writable = [name for name in names if _may_make_group(paths.get(name))]
        else:
            writable = _delegable(paths.get("unified"))
        held = [name for name in ("cpu", "memory", "pids") if name in writable]
        findings.append(
            Finding(
                name=f"cgroups v{version}",
                ok=True if len(held) == 3 else None,
                found=f"controllers {', '.join(names) or 'none'}; we may make groups for {', '.join(writable) or 'none'}",
                means="cpu, memory, pids can be held exactly"
                if len(held) == 3
                else "memory is held exactly; what is not delegated is not: cpus go by affinity, advisory"
                if version == 2 and "memory" in held
                else "jobs run; memory is held by rlimits and polling, cpus by affinity: both advisory, overrun for a moment",
                remedy="" if len(held) == 3 else f"run the agent as root, or start it in a group that is yours: {SCOPE}",
            )
        )
    return findings


def _may_make_group(directory: Path | None) -> bool:
    """Try: make a group and remove it. Looking at permission bits is not enough (read-only mounts, delegation)."""
    if directory is None:
        return False
    probe = directory / f"tenure-doctor-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError:
        return False
    try:
        probe.rmdir()
    except OSError:
        pass
    return True


def _delegable(directory: Path | None) -> list[str]:
    """Return the v2 controllers that we may have for groups of ours: of the nearest group, from ours up, that we may divide."""
    while directory is not None and (directory / "cgroup.procs").exists():
        if os.access(directory / "cgroup.subtree_control", os.W_OK) and _may_make_group(directory):
            return sorted(set((directory / "cgroup.controllers").read_text().split()) & set(_USED))
        directory = directory.parent
    return []


def _namespaces() -> list[Finding]:
    findings = []
    for name, flags, means, remedy in (
        (
            "user namespaces",
            ["--user", "--map-root-user"],
            "jobs can be set apart without root",
            "allow them: sysctl kernel.unprivileged_userns_clone=1 (Debian), user.max_user_namespaces > 0, "
            "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu)",
        ),
        (
            "network namespaces",
            ["--net"],
            "clients and servers can be put on separate simulated hosts",
            "run as root; without that right the distributed architecture is measured over loopback, and labelled so",
        ),
    ):
        worked, said = _tried(["unshare", *flags, "true"])
        findings.append(
            Finding(
                name=name,
                ok=True if worked else None,
                found="can be made" if worked else f"refused: {said}",
                means=means if worked else f"not so here: {means}",
                remedy="" if worked else remedy,
            )
        )
    tool = shutil.which("ip")
    findings.append(
        Finding(
            name="iproute2",
            ok=True if tool else None,
            found=tool or "no program named ip",
            means="network namespaces can be joined by links" if tool else "network namespaces can't be joined by links",
            remedy="" if tool else "install the package iproute2",
        )
    )
    return findings


def _docker() -> list[Finding]:
    address = os.environ.get("DOCKER_HOST", "")
    paths = [Path(address.removeprefix("unix://"))] if address.startswith("unix://") else []
    paths += [Path("/var/run/docker.sock"), Path(os.environ.get("XDG_RUNTIME_DIR", "/nonexistent")) / "docker.sock"]
    return [_engine("docker", paths, "install Docker Engine, start it, and add your user to the group docker")]


def _podman() -> list[Finding]:
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", "/nonexistent"))
    paths = [runtime / "podman/podman.sock", Path("/run/podman/podman.sock")]
    return [_engine("podman", paths, "install Podman and start its socket: systemctl --user start podman.socket")]


def _engine(name: str, paths: list[Path], remedy: str) -> Finding:
    said = f"no socket at {', '.join(str(path) for path in paths)}"
    for path in paths:
        if not path.exists():
            continue
        answer = _ping(path)
        if answer.startswith("HTTP/1") and " 200 " in answer.split("\r\n", 1)[0]:
            return Finding(
                name=name,
                ok=True,
                found=f"its engine answers at {path}",
                means=f'jobs can say runtime = "container": {name} holds them',
            )
        said = f"{path} does not answer as it should: {answer[:80]!r}"
    means = f"no containers through {name}; the process runtime is not touched by that"
    return Finding(name=name, ok=None, found=said, means=means, remedy=remedy)


def _ping(path: Path) -> str:
    """Return the first bytes of the engine's answer to its ping (Docker Engine API, /_ping; Podman answers it too)."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(PROBE_S)
            line.connect(str(path))
            line.sendall(b"GET /_ping HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return line.recv(1024).decode("latin-1")
    except OSError as error:
        return str(error)


def _gpu() -> list[Finding]:
    gpus = capacity().gpus
    if gpus:
        found = ", ".join(f"{gpu.model} ({show_bytes(gpu.memory_bytes)})" for gpu in gpus)
        has_mps = bool(find_mps_control())
        held = "share and memory by CUDA MPS" if has_mps else "memory by looking, the share not at all"
        return [
            Finding(
                name="gpu",
                ok=True,
                found=found,
                means=f"GPUs can be leased, whole or in parts; of a part is held: {held} (docs/gpu.md)",
                remedy="" if has_mps else f"install the part of the driver with {MPS_PROGRAM}",
            )
        ]
    device = has_device_file()
    return [
        Finding(
            name="gpu",
            ok=False if device else None,
            found="an NVIDIA device, but its library does not answer" if device else "no NVIDIA device",
            means="envelopes with gpus find no place here",
            remedy="install a driver that matches the kernel module (nvidia-smi must work)"
            if device
            else "a machine with an NVIDIA GPU and its driver",
        )
    ]


def _kvm() -> list[Finding]:
    path = Path("/dev/kvm")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = (
            "add your user to the group kvm"
            if path.exists()
            else "hardware virtualisation, switched on in the firmware or host"
        )
        means = "microVMs would have to be emulated in software"
        return [Finding(name="kvm", ok=None, found=f"{path}: {error.strerror}", means=means, remedy=remedy)]
    return [Finding(name="kvm", ok=True, found=f"{path} opens", means="this machine can run microVMs at full speed")]


def _microvm() -> list[Finding]:
    qemu, maker = shutil.which("qemu-system-x86_64"), shutil.which("mksquashfs")
    carried = "by hardware if a guest boots there, which is tried once" if os.path.exists("/dev/kvm") else "by software, slowly"
    runs = f'jobs can say runtime = "microvm", carried {carried}' if qemu else "no microVMs run here"
    made = "images of form microvm can be made" if maker else "images of form microvm cannot be made"
    missing = [name for name, there in (("qemu-system-x86", qemu), ("squashfs-tools", maker)) if not there]
    return [
        Finding(
            name="microvm",
            ok=True if not missing else None,
            found=", ".join(found or "no " + what for found, what in ((qemu, "QEMU for x86-64"), (maker, "mksquashfs"))),
            means=f"{runs}; {made}",
            remedy=f"install {' and '.join(missing)}" if missing else "",
        )
    ]


def _extras() -> list[Finding]:
    have = versions(*EXTRAS)
    return [
        Finding(
            name=f"extra {package}",
            ok=True if package in have else None,
            found=have.get(package, "not installed"),
            means="programs that need it run" if package in have else "programs that need it are refused",
            remedy="" if package in have else f'pip install "{wanted}"',
        )
        for package, wanted in EXTRAS.items()
    ]


def _home(home: Path) -> list[Finding]:
    place = next(path for path in (home, *home.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        return [
            Finding(
                name="home",
                ok=False,
                found=f"{place} can't be written: {error.strerror}",
                means="Tenure can't keep its ledger and runs",
                remedy="set TENURE_HOME to a folder that you may write",
            )
        ]
    free = shutil.disk_usage(place).free
    enough = free >= LEAST_FREE_BYTES
    return [
        Finding(
            name="home",
            ok=enough,
            found=f"{home} can be {'written' if place == home else 'made'}, {show_bytes(free)} free",
            means="ledger and runs are kept there"
            if enough
            else f"less than {show_bytes(LEAST_FREE_BYTES)}: runs may fail to publish",
            remedy="" if enough else "free space there, or set TENURE_HOME to a larger disk",
        )
    ]


def _clock() -> list[Finding]:
    now_s = time.time()
    fine = now_s > _EARLIEST_S
    return [
        Finding(
            name="clock",
            ok=fine,
            found=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s)),
            means="deadlines count on the boot clock; this one only dates records" if fine else "records get wrong dates",
            remedy="" if fine else "set the clock, e.g. with chrony or systemd-timesyncd",
        )
    ]


def _tried(argv: list[str]) -> tuple[bool, str]:
    """Run a harmless command; give whether it worked, and what it said."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PROBE_S, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        return False, f"no program named {argv[0]} (package util-linux)"
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
