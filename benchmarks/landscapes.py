"""Planted landscapes for `serve_search`: what serving settings give in made-up worlds, and noisy trials of them.

A world is a closed network simulated event by event (not the formulas of a search): requests in flight pass the client's one
thread, a wire, the server's doors and a queue from which instances take what waits, up to `MAX_ROWS` rows, after a delay where
one is set; all that computes shares the cores, a device in the worlds that have one shares itself. No formula explains all of a
machine: each level of each factor moves rate and latency by a planted 3 % (standard deviation), each pair of levels by 0.5 %,
and one or two pairs fall off a cliff (a factor of 0.55 to 0.85). A trial has three repeats with noise of its own: 1 to 4 % of
the rate per repeat (per world), 8 % of p99, a drift of 2 % that a trial's repeats share, and one repeat in thirty-three that
somebody else disturbed.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tenure.nodes import Machine
from tenure.trials import Configuration, Trial
from tenure.usage import summarize

METRICS = (
    *("images_per_s", "mean_s", "p99_s", "app_cpu_s_per_image", "server_cpu_s_per_image"),
    *("app_memory_bytes", "server_memory_bytes"),
)
IN_FLIGHT = 8
"""Requests of an asynchronous application."""
MAX_ROWS = 32
MIB = 1 << 20
REPEATS = 3
Values = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What is wanted of a landscape. A bound of 0 is none."""

    best: str
    """`rate`: most images per second; `cost`: least USD per image, of the cores kept busy and the memory held."""
    p99_s: float = 0.0
    images_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One machine and one model."""

    cores: float
    device: bool
    """A device does the runs; a tenth of their time is CPU time beside it."""
    per_run_s: float
    per_image_s: float
    parallel: float
    """Share of a run that threads divide among them."""
    thread_cost: float
    """CPU time more per further thread."""
    client: Mapping[str, tuple[float, float]]
    """Transport -> CPU seconds per request, per image."""
    door: Mapping[str, tuple[float, float]]
    wire: Mapping[str, tuple[float, float]]
    """Link -> seconds there and back, seconds per image."""
    noise: float
    memory_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Landscape:
    """A space of settings, the truth about each, and an aim."""

    seed: int
    settings: tuple[Configuration, ...]
    truth: tuple[Values, ...]
    aim: Aim
    noise: float
    world: World


def landscape(seed: int) -> Landscape:
    """Return the landscape of a seed."""
    rng = np.random.default_rng([2718, seed])
    settings, made = space(rng), world(rng)
    quirk = quirks(settings, rng)
    truth = tuple(_bent(simulate(made, s, seed), q, s, made) for s, q in zip(settings, quirk, strict=True))
    return Landscape(seed=seed, settings=settings, truth=truth, aim=aim(truth, seed, rng), noise=made.noise, world=made)


def space(rng: np.random.Generator) -> tuple[Configuration, ...]:
    """Draw the levels: 100 to 200 settings."""
    while True:
        batches = [(1, 8, 32), (1, 4, 16), (1, 2, 8, 32), (1, 16)][rng.integers(4)]
        transports = [("http", "grpc", "shm"), ("http", "grpc")][rng.integers(2)]
        pairs = [((1, 1), (1, 2), (2, 1)), ((1, 1), (1, 4), (2, 2), (4, 1)), ((1, 1), (2, 1), (4, 1))][rng.integers(3)]
        delays = [(0.0,), (0.0, 0.002), (0.0, 0.005)][rng.integers(3)]
        places = [("microservice", t, "loopback") for t in transports]
        places += [("distributed", t, "netns") for t in transports if t != "shm"] if rng.random() < 0.4 else []
        threads = sorted({t for _, t in pairs})
        ways = ("sync", "async")
        found = [
            _setting("simple", "none", "in-process", i, b, 1, t, 0.0) for i, b, t in itertools.product(ways, batches, threads)
        ]
        served = itertools.product(places, ways, batches, pairs, delays)
        found += [_setting(*place, i, b, n, t, d) for place, i, b, (n, t), d in served]
        if 100 <= len(found) <= 200:
            return tuple(found)


def world(rng: np.random.Generator) -> World:
    """Draw a machine and a model."""

    def log(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(math.log(low), math.log(high))))

    device = bool(rng.random() < 0.3)
    per_image_s = log(0.0002, 0.015)
    copy_s = per_image_s * log(0.02, 0.5)
    scale = {"none": (0.0, 0.1), "http": (1.0, 1.3), "grpc": (1.3, 2.0), "shm": (1.2, 0.35)}

    def costs(base_s: float) -> dict[str, tuple[float, float]]:
        return {name: (base_s * call * log(0.7, 1.4), copy_s * image * log(0.7, 1.4)) for name, (call, image) in scale.items()}

    return World(
        cores=float(rng.choice([2, 4, 8])),
        device=device,
        per_run_s=per_image_s * (log(1, 12) if device else log(0.05, 4)),
        per_image_s=per_image_s,
        parallel=float(rng.uniform(0.3, 0.95)),
        thread_cost=float(rng.uniform(0.02, 0.2)),
        client=costs(log(0.00005, 0.0003)),
        door=costs(log(0.00005, 0.0004)),
        wire={"in-process": (0.0, 0.0), "loopback": (0.00005, 0.0), "netns": (log(0.0002, 0.005), copy_s * log(0.3, 3))},
        noise=float(rng.uniform(0.01, 0.04)),
        memory_bytes=log(20 * MIB, 800 * MIB),
    )


def quirks(settings: Sequence[Configuration], rng: np.random.Generator) -> list[float]:
    """Return the factor by which each setting's rate leaves the simulation."""
    factors = [f for f in settings[0] if f != "clients"]
    levels = {f: sorted({s[f] for s in settings}, key=str) for f in factors}
    pairs = list(itertools.combinations(factors, 2))
    own = {(f, v): rng.normal(0, 0.03) for f in factors for v in levels[f]}
    both = {(f, v, g, w): rng.normal(0, 0.005) for f, g in pairs for v in levels[f] for w in levels[g]}
    for _ in range(int(rng.integers(1, 3))):
        f, g = rng.choice(factors, size=2, replace=False)
        f, g = sorted((str(f), str(g)), key=factors.index)
        cliff = (f, levels[f][rng.integers(len(levels[f]))], g, levels[g][rng.integers(len(levels[g]))])
        both[cliff] = math.log(rng.uniform(0.55, 0.85))
    return [math.exp(sum(own[f, s[f]] for f in factors) + sum(both[f, s[f], g, s[g]] for f, g in pairs)) for s in settings]


def aim(truth: Sequence[Values], seed: int, rng: np.random.Generator) -> Aim:
    """Return what is wanted: in turns the rate under a latency bound, the rate, the cost under both bounds."""
    p99_s = float(np.quantile([t["p99_s"] for t in truth], rng.uniform(0.35, 0.75)))
    within = max(t["images_per_s"] for t in truth if t["p99_s"] <= p99_s)
    if seed % 3 == 0:
        return Aim(best="rate", p99_s=p99_s)
    if seed % 3 == 1:
        return Aim(best="rate")
    return Aim(best="cost", p99_s=p99_s, images_per_s=float(rng.uniform(0.3, 0.7)) * within)


@dataclass(slots=True)
class Noise:
    """Makes trials of one landscape: the noise of one hour."""

    land: Landscape
    seed: int
    _rng: np.random.Generator = field(init=False)
    _drift: float = 0.0
    _made: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng([3141, self.land.seed, self.seed])

    def trial(self, number: int) -> Trial:
        """Measure setting `number`: a trial of `REPEATS` repeats."""
        rng, truth, noise = self._rng, self.land.truth[number], self.land.noise
        self._drift = 0.7 * self._drift + rng.normal(0, 0.02 * math.sqrt(1 - 0.49))
        self._made += 1
        slow = [self._drift + rng.normal(0, noise) + (rng.random() < 0.03) * rng.uniform(0.15, 0.5) for _ in range(REPEATS)]
        sides = {"images_per_s": -1.0, "mean_s": 1.0, "p99_s": 1.0, "app_cpu_s_per_image": 0.3, "server_cpu_s_per_image": 0.3}

        def values(name: str) -> list[float]:
            own = 0.08 if name == "p99_s" else 0.003
            return [truth[name] * math.exp(sides.get(name, 0.0) * one + rng.normal(0, own)) for one in slow]

        return Trial(
            id=f"{self.land.seed}-{self.seed}-{self._made}",
            run_id="planted",
            stage="serve",
            fingerprint="planted",
            source="probe",
            configuration=self.land.settings[number],
            metrics={name: summarize(values(name)) for name in METRICS},
            machine=Machine(cpu_model="planted"),
        )


def simulate(made: World, setting: Configuration, seed: int, *, requests: int = 300) -> Values:
    """Return what a setting gives in a world: a closed network, `requests` answers after a warm-up of a fifth of that."""
    sim = _Simulation(made, setting, np.random.default_rng([seed, 17]))
    return sim.run(requests)


class _Simulation:
    """One setting of one world, event by event. Whoever computes shares the cores evenly."""

    def __init__(self, made: World, setting: Configuration, rng: np.random.Generator) -> None:
        self.made, self.rng = made, rng
        self.batch, self.threads = int(setting["batch"]), int(setting["threads"])
        self.instances, self.delay_s = int(setting["instances"]), float(setting["max_delay_s"])
        transport = str(setting["transport"])
        self.simple = setting["architecture"] == "simple"
        self.client, self.door = made.client[transport], made.door[transport]
        self.wire = made.wire[str(setting["link"])]
        self.tokens = 1 if setting["interaction"] == "sync" else IN_FLIGHT
        self.now_s, self.order = 0.0, itertools.count()
        self.timers: list[tuple[float, int, str, int]] = []
        self.active: dict[tuple[str, int], list[float]] = {}  # (station, token or instance) -> [work left, threads]
        self.waiting: dict[str, list[int]] = {"client": [], "wire": [], "door": []}
        self.queue: list[tuple[float, int]] = []
        self.running: dict[int, list[int]] = {}
        self.began = [0.0] * self.tokens
        self.latencies: list[float] = []
        self.app_s = self.server_s = 0.0
        self.draws = iter(())

    def run(self, requests: int) -> Values:
        for token in range(self.tokens):
            self._arrive("client", token)
        warm = requests // 5
        since_s, app_s, server_s = 0.0, 0.0, 0.0
        while len(self.latencies) < warm + requests:
            if len(self.latencies) <= warm:
                since_s, app_s, server_s = self.now_s, self.app_s, self.server_s
            self._step()
        seen = np.sort(self.latencies[warm : warm + requests])
        images = (len(self.latencies) - warm) * self.batch
        return {
            "images_per_s": images / (self.now_s - since_s),
            "mean_s": float(seen.mean()),
            "p99_s": float(seen[math.ceil(0.99 * requests) - 1]),
            "app_cpu_s_per_image": (self.app_s - app_s) / images,
            "server_cpu_s_per_image": (self.server_s - server_s) / images,
        }

    def _spread(self, cv: float) -> float:
        value = next(self.draws, None)
        if value is None:
            self.draws = iter(self.rng.normal(size=512).tolist())
            value = next(self.draws)
        return math.exp(cv * value - cv * cv / 2)

    def _arrive(self, station: str, token: int) -> None:
        if station == "client":
            self.began[token] = self.now_s
        if station == "queue":
            self.queue.append((self.now_s, token))
            self._feed()
            return
        busy = any(key[0] == station for key in self.active) or any(t[2] == station for t in self.timers)
        if busy:
            self.waiting[station].append(token)
        else:
            self._begin(station, token)

    def _begin(self, station: str, token: int) -> None:
        call_s, image_s = {"client": self.client, "door": self.door, "wire": (0.0, self.wire[1])}[station]
        work_s = (call_s + image_s * self.batch) * self._spread(0.3)
        if station == "wire":
            self._after(work_s, "wire", token)
        else:
            self.active[station, token] = [work_s, 1.0]
            if station == "client" or self.simple:
                self.app_s += work_s
            else:
                self.server_s += work_s

    def _after(self, wait_s: float, what: str, token: int) -> None:
        heapq.heappush(self.timers, (self.now_s + wait_s, next(self.order), what, token))

    def _feed(self) -> None:
        for instance in range(self.instances):
            if instance in self.running or not self.queue:
                continue
            room = max(1, MAX_ROWS // self.batch)
            if self.delay_s and len(self.queue) < room and self.now_s < self.queue[0][0] + self.delay_s - 1e-12:
                self._after(self.queue[0][0] + self.delay_s - self.now_s, "feed", -1)
                return
            room = 1 if self.simple else room
            taken, self.queue = self.queue[:room], self.queue[room:]
            self.running[instance] = [token for _, token in taken]
            made = self.made
            work_s = (made.per_run_s + made.per_image_s * self.batch * len(taken)) * self._spread(0.12)
            cpu_s = work_s * (0.1 if made.device else 1 + made.thread_cost * (self.threads - 1))
            elapsed_s = work_s if made.device else work_s * (1 - made.parallel + made.parallel / self.threads)
            self.active["run", instance] = [elapsed_s, 0.1 if made.device else cpu_s / elapsed_s]
            if self.simple:
                self.app_s += cpu_s
            else:
                self.server_s += cpu_s

    def _speeds(self) -> tuple[float, float]:
        load = sum(threads for _, threads in self.active.values())
        runs = sum(1 for key in self.active if key[0] == "run")
        cpu = min(1.0, self.made.cores / load) if load else 1.0
        return cpu, (min(cpu, runs**-0.85) if self.made.device and runs else cpu)

    def _step(self) -> None:
        cpu, run = self._speeds()
        first, ends_s = None, math.inf
        for key, (left_s, _) in self.active.items():
            at_s = self.now_s + left_s / (run if key[0] == "run" else cpu)
            if at_s < ends_s:
                first, ends_s = key, at_s
        timer = self.timers[0] if self.timers and self.timers[0][0] <= ends_s else None
        to_s = timer[0] if timer else ends_s
        for key, work in self.active.items():
            work[0] -= (to_s - self.now_s) * (run if key[0] == "run" else cpu)
        self.now_s = to_s
        if timer:
            heapq.heappop(self.timers)
            self._timed(timer[2], timer[3])
        elif first:
            del self.active[first]
            self._done(*first)

    def _timed(self, what: str, token: int) -> None:
        if what == "feed":
            self._feed()
        elif what == "wire":
            self._next("wire")
            self._after(self.wire[0] / 2, "there", token)
        elif what == "there":
            self._arrive("door", token)
        else:
            self._answered(token)

    def _done(self, station: str, token: int) -> None:
        if station == "run":
            for one in self.running.pop(token):
                self._after(self.wire[0] / 2, "back", one)
            self._feed()
        elif station == "client":
            self._next("client")
            self._arrive("queue" if self.simple else "wire", token)
        else:
            self._next("door")
            self._arrive("queue", token)

    def _next(self, station: str) -> None:
        if self.waiting[station]:
            self._begin(station, self.waiting[station].pop(0))

    def _answered(self, token: int) -> None:
        self.latencies.append(self.now_s - self.began[token])
        self._arrive("client", token)


def _bent(values: Values, quirk: float, setting: Configuration, made: World) -> Values:
    simple = setting["architecture"] == "simple"
    model = made.memory_bytes * int(setting["instances"]) * (1 + 0.02 * int(setting["batch"]))
    return {
        "images_per_s": values["images_per_s"] * quirk,
        "mean_s": values["mean_s"] / quirk,
        "p99_s": values["p99_s"] / quirk,
        "app_cpu_s_per_image": values["app_cpu_s_per_image"] * quirk**-0.5,
        "server_cpu_s_per_image": values["server_cpu_s_per_image"] * quirk**-0.5,
        "app_memory_bytes": 60 * MIB + (model if simple else 0.0),
        "server_memory_bytes": 0.0 if simple else 90 * MIB + model,
    }


def _setting(
    architecture: str, transport: str, link: str, interaction: str, batch: int, instances: int, threads: int, delay_s: float
) -> Configuration:
    return {
        "architecture": architecture,
        "transport": transport,
        "link": link,
        "interaction": interaction,
        "batch": batch,
        "instances": instances,
        "threads": threads,
        "max_delay_s": delay_s,
        "clients": 1,
    }
