"""How long a microVM takes from cold boot to the first answer, with its root on a disk, against all of it in memory.

Service: ONNX Runtime with the perceptron of `benchmarks.image_models` in our server, one thread, from one closure.
Contenders, interleaved, 5 rounds (--quick: 2), the same kernel, monitor, CPU model, 512 MiB, one CPU:
- disk: the `microvm` form as the product builds it (compressed read-only root on virtio-blk, small initial memory disk);
- memory: the same files all in the initial memory disk (cpio, gzip -1, made by the benchmark), the same init and modules.
Time: from the start of the monitor to the end of the first right answer through the forwarded port, asked every 20 ms. Files of
both are in the host's page cache. Acceleration is what the product's probe finds, the same for both, and told.
Bar: median of disk / median of memory at most 0.65 (`value`). Single run by hand: 7.3 s in memory under emulation.
Checked: the answer is that of the bare process (within `image_answers`' tolerance under emulation), in every round.
Control: the memory form as a contender against itself must miss the bar.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from benchmarks import microvm_guests as guests
from benchmarks.harness import Control, Options, Result, interleaved, judge, median, spread
from tenure.runtimes.microvm import MicrovmRuntime

NAME = "image_microvm_start"
BAR = "cold boot to first answer of ONNX Runtime, root on a disk: at most 0.65 x all of it in memory"
MOST = 0.65
MEMORY_BYTES = 512 * guests.MIB
FIRST_MAX_S = 180.0


def run(options: Options) -> Result:
    """Start both forms in turn."""
    rounds = 2 if options.quick else 5
    with guests.service() as image, tempfile.TemporaryDirectory(prefix="tenure-guests-", dir=image.home) as name:
        folder = Path(name)
        forms = {"disk": image.folder, "memory": guests.in_memory(image, folder / "memory")}
        rows = guests.rows_of(1, options.seed)
        expected = guests.bare_answer(image, rows)
        runtime = MicrovmRuntime(folder / "state")
        numbers, accels = itertools.count(), set[str]()

        def start(form: str) -> float:
            guest = guests.Guest(runtime, folder, forms[form], memory_bytes=MEMORY_BYTES, number=next(numbers))
            try:
                accels.add(guest.accel())
                took_s = guest.first_answer_s(rows, expected, max_s=FIRST_MAX_S)
                assert took_s is not None, f"no answer of form {form} within {FIRST_MAX_S:g} s: {guest.ended()}"
                return took_s
            finally:
                guest.end()

        try:
            # The first start finds out what carries guests here, which is no part of any start.
            start("disk")
            found = interleaved({form: lambda form=form: start(form) for form in forms}, rounds, seed=options.seed)
        finally:
            runtime.close()
        size_bytes = {form: (path / "microvm/initrd").stat().st_size for form, path in forms.items()}
    disk, memory = found["disk"], found["memory"]
    ratios = [one / other for one, other in zip(disk, memory, strict=True)]
    value, itself = median(disk) / median(memory), median(memory) / median(memory)
    control = Control(name="all in memory, against itself", value=itself, failed=itself > MOST, how="it misses the bar")
    holds, why = judge(value <= MOST, control)
    return Result(
        value=value,
        spread=spread(ratios),
        unit="ratio",
        holds=holds,
        why=why,
        reference={"memory_first_answer_s": median(memory), "by_hand_s": 7.3},
        control=control,
        details={
            "disk_first_answer_s": median(disk),
            "disk_s": disk,
            "memory_s": memory,
            "accel": sorted(accels),
            "initrd_bytes": size_bytes,
        },
    )
