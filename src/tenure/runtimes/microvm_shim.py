"""The shim of a guest: deadline, order, disk and record as for any attempt. Its child is the attendant (`microvm_job`).

What the machine's process itself takes is bounded beside the guest's memory: both together are what the lease holds. Standard
library and nouns only. Not for: making guests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import replace
from typing import Any

from tenure.resources import show_bytes
from tenure.runtimes.microvm_machine import OVERHEAD_BYTES
from tenure.runtimes.shim import Shim
from tenure.runtimes.state import read_json
from tenure.runtimes.waiting import Waiting

_MACHINE_THREADS = 256
"""Of the machine's process and the attendant. What runs inside counts there."""
_ERRNO = {2: "there is no such file", 8: "it is no program for this machine", 13: "it may not be executed"}


class MicrovmShim(Shim):
    """One attempt in a guest. `plan["microvm"]`: see `microvm`."""

    def __init__(self, plan: dict[str, Any], text: bytes, channel: socket.socket, waiting: Waiting) -> None:
        super().__init__(plan, text, channel, waiting)
        self._accel = str(plan["microvm"]["accel"])
        self._overhead_bytes = OVERHEAD_BYTES[self._accel]

    # --- start ---

    def _make(self) -> None:
        for name in ("machine.json", "guest.json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._folder / name)
        whole = replace(self._envelope, memory_bytes=self._envelope.memory_bytes + self._overhead_bytes)
        self._confinement.make(whole, _MACHINE_THREADS)

    # --- watch ---

    def _pids(self) -> list[int]:
        return [pid for pid in super()._pids() if pid != self._job]

    def _over_memory(self) -> bool:
        used = self._confinement.memory_bytes(os.getpid())
        self._memory.saw(used)
        if self._confinement.enforced:
            return self._confinement.oom_kills() > 0
        bound = self._envelope.memory_bytes + self._overhead_bytes
        if used <= bound:
            return False
        self._kind = "out_of_memory"
        self._witness = f"shim's poll: the machine's processes held {used} bytes; bound {bound} bytes"
        return True

    def _ask_to_leave(self) -> None:
        """Have the attendant tell the guest; a signal to its group would reach the machine."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._job, signal.SIGTERM)

    # --- end ---

    def _note(self) -> dict[str, Any]:
        return read_json(self._folder / "guest.json") or {}

    def _oom_witness(self) -> str:
        note = self._note()
        guest = show_bytes(self._envelope.memory_bytes)
        if note.get("exit") and note["exit"][2]:
            words = note["out_of_memory"] or "its console says no more"
            return f"the guest's kernel counts {note['exit'][2]} kills for want of memory (it has {guest}): {words}"
        if not note.get("exit") and note.get("out_of_memory"):
            return f"the guest's console (it has {guest}): {note['out_of_memory']}"
        if not note.get("exit") and "memory" in note.get("panic", ""):
            return f"the guest's console (it has {guest}): {note['panic']}"
        if outside := super()._oom_witness():
            return f"{outside}; the machine's own processes took more than the {show_bytes(self._overhead_bytes)} they may"
        return ""

    def _height_bytes(self) -> int:
        return self._envelope.memory_bytes

    def _ended_how(self) -> tuple[int, int, str]:
        note = self._note()
        how = "hardware virtualisation" if self._accel == "kvm" else "software emulation"
        if not note:
            code, number, words = super()._ended_how()
            return code, number, f"{words} (the guest's attendant; {how})"
        if note["exit"]:
            code, number, _ = note["exit"]
            said = f"signal {number}" if number else f"exit {code}"
            return (0, number, f"the guest's first program: {said} ({how})") if number else (
                code, 0, f"the guest's first program: {said} ({how})"
            )  # fmt: skip
        if note["noexec"]:
            what, number = note["noexec"]
            why = _ERRNO.get(number, os.strerror(number))
            return 127, 0, f"the guest could not start {' '.join(self._spec['argv'][:3])!r}: {what}: {why}"
        if note["broken"]:
            what, number = note["broken"]
            return 1, 0, f"the guest could not be made ready: {what}: {os.strerror(number)}"
        if note["panic"]:
            return 1, 0, f"the guest's kernel gave up: {note['panic']}"
        if not note["up"]:
            limit = self._plan["microvm"]["boot_max_s"]
            return (
                1,
                0,
                f"no guest came up in {note['boots']} boots, {limit:g} s at most each ({how}) {note['complaint']}".strip(),
            )
        return 1, 0, f"the guest's machine ended before its program ({how}) {note['complaint']}".strip()
