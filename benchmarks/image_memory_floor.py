"""The least memory in which a microVM serves.

Service: ONNX Runtime with the perceptron of `benchmarks.image_models` in our server, one thread, the `microvm` form.
Serves: boots, and answers 1 row and 32 rows by JSON, by binary tensors and by gRPC, each twice, all right, the first within
60 s of the start; then ends by itself within 20 s of being told to. Memory: what the monitor is told, MiB.
Search: bisection between 32 and 512 MiB in steps of 8. The floor must serve in two further boots, and 8 MiB less must fail in
two of three. --quick: no search; 128 MiB must serve.
Bar: at most 128 MiB (`value` is the floor). By hand, single runs: 320 with everything in memory; nanos 128.
Checked: where it fails, the end or the console says that memory was short; a failure for another reason is not a floor and
ends the measurement with its reason.
Control: the same files all in the initial memory disk, with 128 MiB, must not serve.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import microvm_guests as guests
from benchmarks.harness import Control, Options, Result, judge
from tenure.protocols import ExitKind
from tenure.runtimes.microvm import LEAST_MEMORY_BYTES, MicrovmRuntime

NAME = "image_memory_floor"
BAR = "a microVM serves ONNX Runtime in at most 128 MiB"
MOST_MIB = 128
LOW_MIB, HIGH_MIB, STEP_MIB = 32, 512, 8
FIRST_MAX_S, LEAVE_S = 60.0, 20.0
SIZES = (1, 32)


def run(options: Options) -> Result:
    """Search the floor."""
    with guests.service() as image, tempfile.TemporaryDirectory(prefix="tenure-guests-", dir=image.home) as name:
        folder = Path(name)
        asked = {count: guests.rows_of(count, options.seed + count) for count in SIZES}
        expected = {count: guests.bare_answer(image, rows) for count, rows in asked.items()}
        runtime = MicrovmRuntime(folder / "state")
        numbers, seen = itertools.count(), dict[str, str]()

        def serves(form: Path, size_mib: int) -> bool:
            if size_mib << 20 < LEAST_MEMORY_BYTES:
                seen[f"{size_mib}"] = "the kernel alone needs more"
                return False
            guest = guests.Guest(runtime, folder, form, memory_bytes=size_mib << 20, number=next(numbers))
            if guest.first_answer_s(asked[1], expected[1], max_s=FIRST_MAX_S) is None:
                seen[f"{size_mib}"] = _why(guest)
                return False
            for count, rows in asked.items():
                for _ in range(2):
                    assert guests.alike(guests.ask(guest.http, rows, timeout_s=FIRST_MAX_S), expected[count])
                    for door in (f"http://127.0.0.1:{guest.http}", f"grpc://127.0.0.1:{guest.grpc}"):
                        assert guests.alike(guests.ask_client(door, rows, timeout_s=FIRST_MAX_S), expected[count]), door
            ended = guest.end(LEAVE_S)
            assert ended.kind is ExitKind.STOPPED, ended
            assert ended.signal == 0, f"it did not leave by itself within {LEAVE_S:g} s: {ended}"
            seen[f"{size_mib}"] = "serves"
            return True

        try:
            memory = guests.in_memory(image, folder / "memory")
            fits = serves(memory, MOST_MIB)
            control = Control(name=f"all in memory, {MOST_MIB} MiB", value=MOST_MIB, failed=not fits, how=seen[f"{MOST_MIB}"])
            if options.quick:
                value = MOST_MIB if serves(image.folder, MOST_MIB) else None
            else:
                value = _floor(lambda size_mib: serves(image.folder, size_mib))
        finally:
            runtime.close()
    holds, why = judge(value is not None and value <= MOST_MIB, control)
    return Result(value=value, spread=None, unit="MiB", holds=holds, why=why, control=control, details={"seen": seen})


def _floor(serves: Callable[[int], bool]) -> int | None:
    """Return the least size that serves in three boots, with one step less failing in two of three; None: there is none."""
    low, high = LOW_MIB, HIGH_MIB
    if not serves(high):
        return None
    while high - low > STEP_MIB:
        middle = (low + high) // 2 // STEP_MIB * STEP_MIB
        low, high = (low, middle) if serves(middle) else (middle, high)
    while not (serves(high) and serves(high)):
        high += STEP_MIB
        assert high <= HIGH_MIB, "no size serves every time"
    failures = sum(not serves(high - STEP_MIB) for _ in range(3))
    return high if failures >= 2 else high - STEP_MIB


def _why(guest: guests.Guest) -> str:
    """Return why a guest did not answer. Asserts that it was for want of memory."""
    ended = guest.ended()
    if ended is None:
        ended = guest.end(0.0)
        return f"no answer within {FIRST_MAX_S:g} s: it reads again and again what it has no room to keep"
    short = ended.kind is ExitKind.OUT_OF_MEMORY or "memory" in ended.witness or "no guest came up" in ended.witness
    assert short, f"a guest ended for another reason than memory: {ended}"
    return ended.witness[:200]
