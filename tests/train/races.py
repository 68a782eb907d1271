"""Real processes that publish the same names of a real store at the same time, through the store's own code.

In each race all processes wait for one another, and then each of them: makes the store, publishes the layout and the node of
its own shard, claims the combine, adds every slice of the sum (its own first), gathers, and publishes the round's record, a
checkpoint and the result. So each name but the nodes is published by all, whoever holds the claim. Control: who finds as many
nodes as there are processes, after its own, starts the combine (study 2).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tenure.train import tree
from tenure.train.adder import Part
from tenure.train.exchange import Exchange
from tenure.train.records import read_arrays
from tenure.train.store import Claims, Store, round_name, weights_name

PROCESSES = 8
BOUND_S = 120.0
_ONCE = (round_name(1), weights_name(1), "result")


class LoggingStore(Store):
    """Keeps what became of each publication."""

    def __init__(self, root: Path, *, worker: int) -> None:
        self.log: list[tuple[str, bool]] = []
        super().__init__(root, worker=worker, fence=1)

    def _publish(self, name: str, pieces: list[Any], *, durable: bool) -> bool:
        created = super()._publish(name, pieces, durable=durable)
        self.log.append((name, created))
        return created


@dataclass(slots=True)
class Tally:
    """What came of many races."""

    races: int = 0
    publications: int = 0
    double_starts: int = 0
    """By the stores' own counters."""
    wrong: list[str] = field(default_factory=list)
    several_starters: int = 0
    """Races in which more than one process of the control started the combine."""
    wall_s: float = 0.0


def gradient(worker: int) -> np.ndarray[Any, Any]:
    """Return numbers whose sum depends on the order of adding."""
    rng = np.random.default_rng(worker)
    return (rng.standard_normal(6000) * 10 ** rng.uniform(-3, 3, 6000)).astype(np.float32)


def compete(folder: Path, races: int, *, processes: int = PROCESSES) -> Tally:
    """Race so many times, each in a new store below `folder`; judge each race."""
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(processes)
    with _one_thread():
        racers = [spawn.Process(target=_race, args=(folder, races, worker, processes, barrier)) for worker in range(processes)]
        for racer in racers:
            racer.start()
    try:
        for racer in racers:
            racer.join(BOUND_S + races)
    finally:
        for racer in racers:
            if racer.is_alive():
                racer.kill()
                racer.join()
    codes = [racer.exitcode for racer in racers]
    assert not any(codes), f"processes ended with {codes}"
    tally = Tally(wall_s=time.perf_counter() - began)
    told = [[json.loads(line) for line in (folder / f"{worker}.jsonl").read_text().splitlines()] for worker in range(processes)]
    for number in range(races):
        _judge(tally, folder / str(number), [mine[number] for mine in told], processes)
    return tally


def _race(folder: Path, races: int, worker: int, processes: int, barrier: Any) -> None:
    with open(folder / f"{worker}.jsonl", "w") as out:
        for number in range(races):
            barrier.wait(BOUND_S)
            out.write(json.dumps(_once(folder / str(number), worker, processes)) + "\n")


def _once(root: Path, worker: int, processes: int) -> dict[str, Any]:
    store = LoggingStore(root, worker=worker)
    exchange = Exchange(store, processes, 3)
    values = gradient(worker)
    exchange.settle_layout({"w": values})
    exchange.publish(0, Part((worker, worker + 1), {"<f4": values}, float(worker), 1, (0.0,)))
    starts = len(exchange.nodes_there(0)) == processes
    until_s = time.monotonic() + BOUND_S
    while (nodes := tree.cover(exchange.nodes_there(0), processes)) is None:
        assert time.monotonic() < until_s, "the others' nodes do not come"
        time.sleep(0.0002)
    won = Claims(store).claim("sum-00000000-0003-0000", f"worker {worker}", now_s=time.monotonic(), period_s=600)
    for step in range(3):
        exchange.add(0, (worker + step) % 3, nodes)
    total = exchange.gather(0, exchange.complete(0))
    store.publish_json(round_name(1), {"by": worker, "loss": total.loss, "n": total.n})
    store.publish_arrays(weights_name(1), total.arrays, {"by": worker})
    store.publish_arrays("result", total.arrays, {"by": worker}, durable=True)
    digest = hashlib.sha256(total.arrays["w"].tobytes()).hexdigest()
    return {"won": won, "log": store.log, "double": store.double_starts, "digest": digest, "starts": starts}


def _judge(tally: Tally, root: Path, told: list[dict[str, Any]], processes: int) -> None:
    tally.races += 1
    tally.several_starters += sum(each["starts"] for each in told) > 1
    created: Counter[str] = Counter()
    refused = 0
    for each in told:
        for name, made in each["log"]:
            tally.publications += 1
            created[name] += made
            refused += not made and name.split("/")[0] not in ("claims", "layout.json")
    double = sum(each["double"] for each in told)
    tally.double_starts += double
    wrong = [f"{name} was made {count} times" for name, count in created.items() if count != 1]
    if sum(each["won"] for each in told) != 1:
        wrong.append(f"{sum(each['won'] for each in told)} processes won the claim")
    if double != refused:
        wrong.append(f"{refused} double starts, {double} counted")
    if {each["digest"] for each in told} != {expected(processes)}:
        wrong.append("the sums differ")
    if wrong or tally.races % 50 == 1:
        wrong += _judge_files(root, told, processes)
    tally.wrong += [f"{root.name}: {text}" for text in wrong]


def _judge_files(root: Path, told: list[dict[str, Any]], processes: int) -> list[str]:
    """Compare what lies on the disk with who says to have made it."""
    wrong = []
    for name in _ONCE:
        maker = next(worker for worker, each in enumerate(told) if [name, True] in each["log"])
        if name.startswith("rounds"):
            by = json.loads((root / name).read_bytes())["data"]["by"]
        else:
            header, arrays = read_arrays(root / name)
            by = header.meta["by"]
            if hashlib.sha256(arrays["w"].tobytes()).hexdigest() != expected(processes):
                wrong.append(f"{name} holds other numbers")
        if by != maker:
            wrong.append(f"{name} is by {by}, and {maker} says to have made it")
    left = [path for folder in root.iterdir() if folder.is_dir() for path in folder.iterdir() if path.name.startswith(".")]
    return wrong + [f"an unfinished file was left: {path}" for path in left]


def expected(processes: int) -> str:
    """Return the hash of the sum along the fixed tree, added here."""

    def add(node: tree.Node) -> np.ndarray[Any, Any]:
        if node[1] - node[0] == 1:
            return gradient(node[0])
        left, right = tree.children(node)
        return add(left) + add(right)

    if processes not in _expected:
        _expected[processes] = hashlib.sha256(add((0, processes)).tobytes()).hexdigest()
    return _expected[processes]


_expected: dict[int, str] = {}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the children's BLAS from a pool of threads each."""
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = before
