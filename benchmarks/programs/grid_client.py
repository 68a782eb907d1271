"""A client that measures one setting at a time for `record_grid`: reads a JSON line, answers with one.

`grid_client.py JSON` with place (none, http, grpc, shm), targets (name -> host:port, or a model's path), in_flight. An order
has target, interaction, batch, server_pid (0: none). Answers: images_per_s, mean_s, p99_s (nearest rank), requests, CPU
seconds per image and memory of this process and of the server's, failed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import time
from typing import Any

import numpy as np

from benchmarks.peers.programs.procs import cpu_s, pss_bytes, tree
from tenure.errors import TenureError
from tenure.serve.client import Model

LEAST_S, MOST_S = 0.6, 6.0
LEAST_REQUESTS = {"sync": 8, "async": 16}
WARM_UP = 3


class Cell:
    """One setting being measured."""

    def __init__(self, model: Model, batch: int, interaction: str, in_flight: int) -> None:
        self.model, self.interaction, self.in_flight = model, interaction, in_flight
        self.x = np.random.default_rng(batch).uniform(-1, 1, (batch, 3, 224, 224)).astype(np.float32)
        self.latencies: list[float] = []
        self.begun = self.failed = 0
        self.began_s = 0.0

    def over(self) -> bool:
        """Return whether no further request is begun."""
        past_s = time.perf_counter() - self.began_s
        return past_s > MOST_S or (past_s >= LEAST_S and self.begun >= LEAST_REQUESTS[self.interaction])

    async def run(self) -> None:
        """Warm up, then run the closed loops until they are over and everything begun is answered."""
        for _ in range(WARM_UP):
            await self.ask()
        self.latencies, self.begun, self.failed = [], 0, 0
        self.began_s = time.perf_counter()
        self.began_cpu_s = cpu_s([os.getpid()])
        await asyncio.gather(*(self.loop() for _ in range(1 if self.interaction == "sync" else self.in_flight)))

    async def loop(self) -> None:
        """Ask, one after the other."""
        while not self.over():
            self.begun += 1
            await self.ask()

    async def ask(self) -> None:
        """Make one request."""
        began_s = time.perf_counter()
        try:
            if self.interaction == "sync":
                self.model.predict_timed(self.x)
            else:
                await self.model.predict_timed_async(self.x)
        except TenureError as error:
            self.failed += 1
            print(error, file=sys.stderr)
            return
        self.latencies.append(time.perf_counter() - began_s)


async def measure(models: dict[tuple[str, str], Model], in_flight: int, order: dict[str, Any]) -> dict[str, float]:
    """Run one order."""
    cell = Cell(models[order["target"], order["interaction"]], order["batch"], order["interaction"], in_flight)
    pid = order["server_pid"]
    server_s = cpu_s(tree(pid)) if pid else 0.0
    await cell.run()
    wall_s = time.perf_counter() - cell.began_s
    app_s = cpu_s([os.getpid()]) - cell.began_cpu_s
    server_s = (cpu_s(tree(pid)) if pid else 0.0) - server_s
    images = len(cell.latencies) * len(cell.x)
    # the server's counter covers the warm-up as well, so its images count there
    all_images = images + WARM_UP * len(cell.x)
    ordered = sorted(cell.latencies)
    return {
        "images_per_s": images / wall_s,
        "mean_s": sum(ordered) / len(ordered),
        "p99_s": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "requests": len(ordered),
        "app_cpu_s_per_image": app_s / images,
        "server_cpu_s_per_image": server_s / all_images,
        "app_memory_bytes": pss_bytes([os.getpid()]),
        "server_memory_bytes": pss_bytes(tree(pid)) if pid else 0,
        "failed": cell.failed,
    }


def open_model(place: str, where: str, name: str) -> Model:
    """Open the model of one target; the name tells instances and threads of one in this process."""
    if place == "none":
        instances, threads = name.split(" ")[0].split("x")
        return Model(where, instances=int(instances), threads=int(threads))
    return Model(f"{place}://{where}", "m", shm=False if place == "http" else None)


def main() -> None:
    """Answer orders until standard input ends."""
    told = json.loads(sys.argv[1])
    with asyncio.Runner() as runner:  # one loop for all, so that connections stay
        models = {}
        for name, where in told["targets"].items():
            models[name, "sync"] = open_model(told["place"], where, name)
            models[name, "async"] = models[name, "sync"] if told["place"] == "none" else open_model(told["place"], where, name)
        for model in models.values():
            model.wait_ready()
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            print(json.dumps(runner.run(measure(models, told["in_flight"], json.loads(line)))), flush=True)

        async def close() -> None:
            for model in models.values():
                await model.close_async()

        runner.run(close())


if __name__ == "__main__":
    main()
