"""Whether combining a round's gradients takes longer with more workers, and how many bytes each of them reads for it.

World: 64 shards; a gradient of 20,000,000 float32 (--quick: 2,000,000) in the training store's own files, in a new folder of
the default place for temporary files (page cache, no fsync, as in training). Each of W = 4 and W = 64 workers has published the
node of its shards and still holds it in memory, as after its own work. Different numbers in each node.
Timed, alone and after one another: for each worker the addition of its slice over all nodes, reading, verifying and publishing
included (`Exchange.add`); the longest of a round is the critical path, the sum of CPU times over the workers the total. For the
central combine (study 2) the same, with one slice. Repeats interleaved: 5 (--quick: 3); medians, interquartile range.
The value is the critical path at W = 64 over that at W = 4.
Counted: bytes returned by `Files.read` for one worker's round: its slice of all nodes, and then everybody's slice of the sum;
for W = 4 and 64, and for W = 5, whose parts are not whole subtrees (told, not judged: the bound for ordered shards is S/W + 1).
The gather is timed apart: the central way's workers read as many bytes there.
Bars: critical path at W = 64 <= 1.2 x at W = 4; total CPU <= 1.1 x central; central's critical path >= 40 x ours at W = 64
(20 M parameters; --quick reports it only); bytes read per worker <= 2 x the gradient's at W = 4 and 64.
Checked: the sums of every way hold the same bits.
Control: the central combine must fail the first bar.
"""

from __future__ import annotations

import gc
import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.harness import Control, Options, Result, judge, median, spread
from tenure.train import tree
from tenure.train.adder import Part
from tenure.train.exchange import Exchange
from tenure.train.files import Files
from tenure.train.store import Store, sum_name

NAME = "train_flat_combine"
BAR = "combining at 64 workers: <= 1.2 x as long as at 4, <= 1.1 x central's CPU, 40 x shorter; reads <= 2 x the gradient"
SHARDS = 64
FLAT, CPU_SHARE, SHORTER, BYTES = 1.2, 1.1, 40.0, 2.0


class CountingFiles(Files):
    """Counts what is read."""

    bytes_read = 0

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytearray:
        """See Files."""
        content = super().read(path, offset, size)
        self.bytes_read += len(content)
        return content


class World:
    """One store with the nodes of W workers."""

    def __init__(self, folder: Path, workers: int, base: np.ndarray, *, slices: int) -> None:
        self.folder, self.workers, self.base, self.slices = folder, workers, base, slices
        for worker in range(workers):
            self.exchange(worker)

    def parts(self, worker: int) -> Iterator[Part]:
        """Yield the nodes of a worker: other numbers in each."""
        for node in tree.largest(tree.part(worker, self.workers, SHARDS), SHARDS):
            yield Part(node, {"<f4": self.base * np.float32(1 + node[0] / 7)}, float(node[0]), node[1] - node[0])

    def exchange(self, worker: int) -> Exchange:
        """Return a worker's exchange after its own work: its nodes are on disk and in its memory."""
        exchange = Exchange(Store(self.folder, worker=worker, files=CountingFiles()), SHARDS, self.slices)
        exchange.settle_layout({"w": self.base})
        for part in self.parts(worker):
            exchange.publish(0, part)
        exchange.store.files.bytes_read = 0  # type: ignore[attr-defined]
        return exchange

    def combine(self) -> tuple[float, float]:
        """Add every slice by its worker, each alone; return the longest time and the CPU time of all."""
        for path in (self.folder / "sums").iterdir():
            path.unlink()
        nodes = tree.cover(Exchange(Store(self.folder), SHARDS, self.slices).nodes_there(0), SHARDS)
        assert nodes is not None
        longest_s, cpu_s = 0.0, 0.0
        for number in range(self.slices):
            exchange = self.exchange(number)
            gc.collect()
            began, cpu_began = time.perf_counter(), time.process_time()
            exchange.add(0, number, nodes)
            longest_s = max(longest_s, time.perf_counter() - began)
            cpu_s += time.process_time() - cpu_began
        return longest_s, cpu_s

    def reading(self, worker: int) -> tuple[float, float]:
        """Return bytes that a worker reads in a round, in multiples of the gradient's, and the seconds of its gather."""
        exchange = self.exchange(worker)
        nodes = tree.cover(exchange.nodes_there(0), SHARDS)
        assert nodes is not None
        (Path(self.folder) / sum_name(0, self.slices, worker)).unlink(missing_ok=True)
        exchange.add(0, worker, nodes)
        began = time.perf_counter()
        exchange.gather(0, exchange.complete(0))
        return exchange.store.files.bytes_read / self.base.nbytes, time.perf_counter() - began  # type: ignore[attr-defined]

    def sha256(self) -> str:
        """Return the hash of the sum."""
        exchange = Exchange(Store(self.folder), SHARDS, self.slices)
        return hashlib.sha256(exchange.gather(0, exchange.complete(0)).arrays["w"].tobytes()).hexdigest()


def run(options: Options) -> Result:
    """Make the worlds, combine in interleaved repeats, count what is read."""
    size, repeats = (2_000_000, 3) if options.quick else (20_000_000, 5)
    base = np.random.default_rng(options.seed).standard_normal(size, dtype=np.float32)
    with _folder() as folder:
        worlds = {
            "sharded 4": World(folder / "s4", 4, base, slices=4),
            "sharded 64": World(folder / "s64", 64, base, slices=64),
        }
        worlds["central 4"] = _beside(worlds["sharded 4"], folder / "c4")
        worlds["central 64"] = _beside(worlds["sharded 64"], folder / "c64")
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in worlds}
        for number in range(-1, repeats):
            for name, world in worlds.items():
                figures = world.combine()
                if number >= 0:  # the first round warms up
                    found[name].append(figures)
        hashes = {name: world.sha256() for name, world in worlds.items()}
        assert hashes["sharded 64"] == hashes["central 64"], hashes
        assert hashes["sharded 4"] == hashes["central 4"], hashes
        five = World(folder / "s5", 5, base, slices=5)
        five.combine()
        reads, gathers = {}, {}
        for name, world in {**worlds, "sharded 5": five}.items():
            if world.slices > 1:
                each = [world.reading(worker) for worker in {0, world.workers // 2, world.workers - 1}]
                reads[name], gathers[name] = max(share for share, _ in each), median([took_s for _, took_s in each])
    path_s = {name: [longest_s for longest_s, _ in figures] for name, figures in found.items()}
    cpu_s = {name: [total_s for _, total_s in figures] for name, figures in found.items()}
    growth = [a / b for a, b in zip(path_s["sharded 64"], path_s["sharded 4"], strict=True)]
    central_growth = median(path_s["central 64"]) / median(path_s["central 4"])
    cpu = [a / b for a, b in zip(cpu_s["sharded 64"], cpu_s["central 64"], strict=True)]
    shorter = [a / b for a, b in zip(path_s["central 64"], path_s["sharded 64"], strict=True)]
    control = Control(
        name="central combine", value=central_growth, failed=central_growth > FLAT, how=f"grows from 4 to 64; bar {FLAT}"
    )
    met = {
        "flat": median(growth) <= FLAT,
        "cpu": median(cpu) <= CPU_SHARE,
        "shorter": options.quick or median(shorter) >= SHORTER,
        "bytes": max(reads["sharded 4"], reads["sharded 64"]) <= BYTES,
    }
    holds, why = judge(all(met.values()), control)
    return Result(
        value=median(growth),
        spread=spread(growth),
        unit="x",
        holds=holds,
        why=why and f"{why}: {', '.join(name for name, ok in met.items() if not ok)}",
        reference={"central_critical_path_s": median(path_s["central 64"])},
        control=control,
        details={
            "parameters": size,
            "critical_path_s": {name: median(values) for name, values in path_s.items()},
            "cpu_s": {name: median(values) for name, values in cpu_s.items()},
            "cpu_ratio_64": median(cpu),
            "central_over_sharded_64": median(shorter),
            "read_in_gradients": reads,
            "gather_s": gathers,
        },
    )


def _beside(world: World, folder: Path) -> World:
    """Return the same nodes in a store with one slice; the node files are the same ones."""
    folder.mkdir()
    for name in ("nodes", "layout.json"):
        (folder / name).symlink_to(world.folder / name)
    central = World.__new__(World)
    central.folder, central.workers, central.base, central.slices = folder, world.workers, world.base, 1
    Store(folder)
    return central


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
