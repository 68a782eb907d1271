"""Boots the guest and reads what it says. Software emulation unless asked otherwise, so that it is the same everywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.guest import image
from tests.guest.inside import MARK

from tenure.runtimes.microvm_machine import tsc_khz

ROOT = image.ROOT
CACHE = ROOT / ".cache/guest"
LOG = CACHE / "v2-guest.log"
QEMU = "qemu-system-x86_64"
MEMORY_MIB = 3072
"""Above what the suite asks for at once: else a reservation is refused before any bound is met. Untouched, it costs nothing."""
BOOT_MAX_S = 480.0
FIRST_MAX_S = 120.0
"""Until the first test inside has ended, 15 s where all is well. Emulation sometimes stands still before it: then once more."""
SLOWNESS = 3.0
"""How many times longer the suite's bounds in seconds are inside than on real hardware."""


class Missing(Exception):
    """Something the guest needs is not on this machine; the text says what, and what to do."""


@dataclass(slots=True)
class Boot:
    """What one boot gave."""

    kernel: str = ""
    up_s: float = 0.0
    """From QEMU's start to the first program inside."""
    wall_s: float = 0.0
    worlds: dict[str, dict[str, Any]] = field(default_factory=dict)
    """World -> status, wall_s, tests (name -> outcome, wall_s, why), confinement."""
    begun: bool = False
    """Whether a test inside has ended."""
    ended: bool = False
    """Whether the guest came to its own end."""


def need() -> None:
    """Raise Missing when the guest cannot be booted here."""
    if shutil.which(QEMU) is None:
        raise Missing(f"no {QEMU} here: run tools/guest.sh as root, or install QEMU for x86")
    if not (CACHE / "vmlinuz").exists():
        raise Missing(f"no kernel at {CACHE / 'vmlinuz'}: run tools/guest.sh on a Debian-like system")


def boot(
    worlds: Sequence[str],
    *,
    only: Sequence[str] = (),
    slowness: float = SLOWNESS,
    timeout_s: float = BOOT_MAX_S,
    kvm: bool = False,
) -> Boot:
    """Boot once, run the worlds, return what they said; the console is kept in `LOG`.

    only: words of which a test's name must hold one, all tests when empty.
    kvm: use the processor's own virtualisation instead of emulation. Raises Missing.
    """
    need()
    words = f"tenure.worlds={','.join(worlds)} tenure.slowness={slowness:g} tenure.only={','.join(only)}"
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        root = Path(folder) / "root.cpio"
        with root.open("wb") as stream:
            stream.write(image.base(CACHE).read_bytes())
            stream.write(image.project())
        command = [QEMU, "-M", "q35", "-accel", "kvm" if kvm else "tcg,thread=multi", "-cpu", "max", "-smp", "2"]
        command += ["-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"]
        command += ["-kernel", str(CACHE / "vmlinuz"), "-initrd", str(root)]
        # A file system without blocks of its own (ramfs), so that a program's pages count as those of files, as on a disk.
        # An emulated guest that measures its own clock while the machine is busy may wait for ever: it is told.
        clock = f"tsc_early_khz={khz} " if not kvm and (khz := tsc_khz()) else ""
        command += ["-append", f"console=ttyS0 loglevel=4 panic=-1 rootfstype=ramfs {clock}{words}"]
        found = _follow(command, worlds, timeout_s)
        return found if found.begun or found.ended else _follow(command, worlds, timeout_s)


def counts(world: dict[str, Any]) -> dict[str, int]:
    """Return outcome -> number of tests of one world."""
    return dict(Counter(str(found["outcome"]) for found in world.get("tests", {}).values()))


def is_listed(why: str, page: str) -> bool:
    """Return whether a skip says `Unsupported here: THING` and the page names the thing."""
    _, said, thing = why.partition("Unsupported here: ")
    return bool(said) and thing.strip() in page


def summary(found: Boot, name: str) -> str:
    """Return one line on a world."""
    world = found.worlds.get(name, {})
    numbers = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts(world).items())) or "no results"
    booted = f"Linux {found.kernel}, up after {found.up_s:.1f} s"
    return f"guest {name}: {numbers} in {world.get('wall_s', 0.0):.0f} s ({booted}); {world.get('confinement', '')}; log {LOG}"


def _follow(command: list[str], worlds: Sequence[str], timeout_s: float) -> Boot:
    found, begun_s = Boot(), time.monotonic()
    with (
        LOG.open("w") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", text=True
        ) as qemu,
    ):
        assert qemu.stdout is not None
        bound, first = threading.Timer(timeout_s, qemu.kill), threading.Timer(min(FIRST_MAX_S, timeout_s), qemu.kill)
        bound.start()
        first.start()
        try:
            for line in qemu.stdout:
                now_s = time.monotonic() - begun_s
                log.write(f"{now_s:7.2f} {line.rstrip()}\n")
                log.flush()
                if not found.begun and line.startswith(tuple(f"{world}: " for world in worlds)):
                    found.begun = True
                    first.cancel()
                if line.startswith(MARK):
                    _take(found, json.loads(line.removeprefix(MARK)), now_s)
        finally:
            bound.cancel()
            first.cancel()
            qemu.kill()
    found.wall_s = time.monotonic() - begun_s
    return found


def _take(found: Boot, fact: dict[str, Any], now_s: float) -> None:
    if "up" in fact:
        found.kernel, found.up_s = str(fact["up"]), now_s
    if "world" in fact:
        found.worlds[str(fact.pop("world"))] = fact
    found.ended |= "end" in fact
