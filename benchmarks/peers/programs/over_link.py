"""Calls over a network link, one after the other or many in flight, on connections that stay: how many images a second.

One argument, a JSON object: addresses (http, grpc), models {name: file}, threads, seed. Then one JSON command a line, one
answer a line: {"rtt": times} -> {"rtt_s"}, the shortest time to connect; {"transport", "model", "in_flight", "seconds"} ->
{"per_s", "count", "cpu_s"}. Each task asks one call after the other, all for the same time, longer where one of them has fewer
than `LEAST` answers. What came back in the first part (`WARM`) is not counted; each task's rate is from its first to its last
answer after it, and the tasks' rates add up: requests that travel together come back together, and a common window would count
a wave too many or too few. Eight images take turns, and every answer is compared with the engine's own in this process.
"""

import asyncio
import json
import socket
import sys
import time

import numpy as np
from paired import session

IMAGES = 8
WARM = 0.4
"""Of `seconds`, in addition."""
LEAST, PATIENCE = 4, 8
"""Answers of each task that are counted at least, unless that takes so many times as long as was asked for."""


class Client:
    """Our client, sync and async, to each model over each transport."""

    def __init__(self, told):
        rng = np.random.default_rng(told["seed"])
        self.images = [rng.normal(size=(1, 3, 224, 224)).astype(np.float32) for _ in range(IMAGES)]
        self.addresses, self.models, self.expected = told["addresses"], {}, {}
        for name, file in told["models"].items():
            engine = session(file, told["threads"])
            self.expected[name] = [engine.run(None, {engine.get_inputs()[0].name: image})[0] for image in self.images]

    def model(self, order):
        """Return the model of an order, one for each kind of call."""
        from tenure.serve.client import Model

        transport, name = order["transport"], order["model"]
        key = (transport, name, order["in_flight"] > 1)
        if key not in self.models:
            extra = {"shm": False} if transport == "http" else {}
            self.models[key] = Model(f"{transport}://{self.addresses[transport]}", name, timeout_s=60, **extra)
        return self.models[key]

    def check(self, name, place, found):
        """Stop at the first wrong answer."""
        if not np.allclose(found, self.expected[name][place], rtol=1e-3, atol=1e-4):
            raise AssertionError(f"{name} answered image {place} wrongly")

    def one_after_the_other(self, order):
        """Return when each answer came."""
        model, clock, place = self.model(order), Clock(order["seconds"], 1), 0
        while clock.goes_on():
            self.check(order["model"], place, model.predict(self.images[place]))
            clock.answered(0)
            place = (place + 1) % IMAGES
        return clock.ends

    async def in_flight(self, order):
        """Return when each answer came, of so many tasks that ask one after the other each."""
        model, clock = self.model(order), Clock(order["seconds"], order["in_flight"])

        async def task(number):
            place = number % IMAGES
            while clock.goes_on():
                self.check(order["model"], place, await model.predict_async(self.images[place]))
                clock.answered(number)
                place = (place + 1) % IMAGES

        await asyncio.gather(*(task(number) for number in range(order["in_flight"])))
        return clock.ends

    async def close(self):
        """Close all connections."""
        for (_, _, many), model in self.models.items():
            await model.close_async() if many else model.close()


class Clock:
    """When to stop, and when answers came while all tasks were asking."""

    def __init__(self, seconds, tasks):
        now_s = time.perf_counter()
        self.warm_s, self.until_s = now_s + seconds * WARM, now_s + seconds * (1 + WARM)
        self.last_s = now_s + seconds * PATIENCE
        self.ends = [[] for _ in range(tasks)]
        self.over = False

    def answered(self, task):
        """Note an answer."""
        now_s = time.perf_counter()
        if now_s >= self.warm_s and not self.over:
            self.ends[task].append(now_s)

    def goes_on(self):
        """Return whether one more is asked for."""
        now_s = time.perf_counter()
        if now_s >= self.until_s and not self.over:
            self.over = now_s >= self.last_s or min(len(ends) for ends in self.ends) >= LEAST
        return not self.over


def rate(ends):
    """Return answers per second of all tasks together, and how many were counted."""
    if min(len(each) for each in ends) < 2:
        raise AssertionError("a task had fewer than two answers: too few to tell a rate")
    return sum((len(each) - 1) / (each[-1] - each[0]) for each in ends), sum(len(each) for each in ends)


def shortest_connect_s(address, times):
    """Return the shortest time to connect: a round trip, answered by the other side's kernel."""
    host, _, port = address.rpartition(":")
    took = []
    for _ in range(times):
        began_s = time.perf_counter()
        with socket.create_connection((host, int(port)), timeout=30):
            took.append(time.perf_counter() - began_s)
    return min(took)


def main():
    """Answer commands until the input ends."""
    import uvloop

    client = Client(json.loads(sys.argv[1]))
    with asyncio.Runner(loop_factory=uvloop.Loop) as runner:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            if "rtt" in order:
                print(json.dumps({"rtt_s": shortest_connect_s(client.addresses["http"], order["rtt"])}), flush=True)
                continue
            client.model(order).metadata()
            cpu_s = time.process_time()
            ends = runner.run(client.in_flight(order)) if order["in_flight"] > 1 else client.one_after_the_other(order)
            per_s, count = rate(ends)
            print(json.dumps({"per_s": per_s, "count": count, "cpu_s": time.process_time() - cpu_s}), flush=True)
        runner.run(client.close())


if __name__ == "__main__":
    main()
