"""What a serving goal means to the search over settings: its bounds, and what of a setting costs how much.

Not here: the search itself (`decide.serve_search`), and the prediction and pricing of what was measured (`serving`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tenure.decide.scaling import MARGIN_BYTES, MARGIN_SHARE
from tenure.decide.serve_laws import FACTORS, Floats
from tenure.decide.serve_posterior import Metrics
from tenure.decide.serve_search import MAX_TRIALS, TOLERANCE, Advice, Aim, advise
from tenure.jobs import ServeGoal
from tenure.prices import GIB, PriceVector
from tenure.resources import Capacity
from tenure.trials import Configuration, Trial

CPU_HEADROOM = 1.5
"""Leased CPU over mean CPU used."""
HOLDER_CPUS = 1.0
"""What holds a model gets at least the CPU it was measured under: a smaller share would throttle it within each period."""
LEAST_CPUS = 0.05
CPU_PERIOD_S = 0.1
"""Period over which a CPU share is enforced (kernel documentation, CFS bandwidth control: 100 ms): the burst of one request
must fit into a client's share of it."""
_REPEATS_MARGIN = 4 / 3
LIKE = {"server": "tenure", "load": "closed", "data": "memory", "runtime": "process", "twin": 0}
"""Only trials with these values, where they say them, are of the kind that goals are judged by: never two kinds in one."""


def comparable(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose load, data and server are those that goals are judged by."""
    return [t for t in trials if all(t.configuration.get(name, value) == value for name, value in LIKE.items())]


def search(
    goal: ServeGoal, bases: Sequence[Configuration], trials: Sequence[Trial], prices: PriceVector, *, capacity: Capacity
) -> Advice:
    """Return what to measure next for one goal, with its clients; trials with one client tell something, too.

    bases: settings without `clients`. At most `MAX_TRIALS` trials with the goal's clients are asked for.
    """
    settings = [{**base, "clients": goal.clients} for base in bases]
    alone = [{**base, "clients": 1} for base in bases] if goal.clients > 1 else []
    known = {_key(t.configuration) for t in trials}
    context = [setting for setting in alone if _key(setting) in known]
    wanted = aim(goal, Leases(settings, goal, prices, capacity).usd_per_image, tolerance=TOLERANCE)
    return advise(settings, trials, wanted, cores=capacity.cpus, context=context, max_trials=MAX_TRIALS)


def aim(goal: ServeGoal, cost: Callable[[Metrics], Floats] | None, *, tolerance: float = 0.0) -> Aim:
    """Return the goal's bounds, and what shall be least within them; None: the rate shall be highest."""
    return Aim(
        p99_s=goal.p99_s,
        images_per_s=goal.images_per_s,
        memory_bytes=float(goal.memory_bytes),
        cost=cost,
        tolerance=tolerance,
    )


def holder_cpus(configuration: Configuration, capacity: Capacity) -> float:
    """Return the least CPU of what holds a model: as many cores as its threads use at a time, else each run is throttled."""
    threads = float(configuration.get("instances", 1)) * float(configuration.get("threads", 1))
    return max(HOLDER_CPUS, min(threads, capacity.cpus))


class Leases:
    """What the leases of settings cost, of all draws of what is plausible at once; as `ServeModel.parts` sizes them."""

    def __init__(self, settings: Sequence[Configuration], goal: ServeGoal, prices: PriceVector, capacity: Capacity) -> None:
        self._goal, self._prices, self._capacity = goal, prices, capacity
        self._batch = np.array([float(setting.get("batch", 1)) for setting in settings])
        self._holder = np.array([holder_cpus(setting, capacity) for setting in settings])

    def usd_per_hour(self, metrics: Metrics) -> Floats:
        """Return the price of an hour of all leases, at the goal's rate, or at what a setting reaches."""
        clients, cores = self._goal.clients, self._capacity.cpus
        rate = self._rate(metrics)
        app_s, server_s = metrics["app_cpu_s_per_image"], metrics["server_cpu_s_per_image"]
        simple = metrics["server_memory_bytes"] == 0
        headroom = np.clip(cores / np.maximum(rate * (app_s + server_s), 1e-12), 1.0, CPU_HEADROOM)
        used = rate * app_s / clients * headroom
        burst = np.minimum(1.0, self._batch * app_s / CPU_PERIOD_S)
        app_cpus = np.where(
            simple,
            np.minimum(np.maximum(self._holder, used), cores / clients),
            np.maximum(np.maximum(LEAST_CPUS, used), burst),
        )
        server_cpus = np.maximum(self._holder, rate * server_s * headroom)
        server_cpus = np.minimum(server_cpus, np.maximum(HOLDER_CPUS, cores - clients * app_cpus))
        cpus = clients * app_cpus + np.where(simple, 0.0, server_cpus)
        app, server = (_leased_bytes(metrics[f"{party}_memory_bytes"]) for party in ("app", "server"))
        memory_bytes = clients * app + np.where(simple, 0.0, server)
        prices = self._prices
        per_hour: Floats = cpus * prices.cpu_usd_per_hour + memory_bytes / GIB * prices.memory_usd_per_gib_hour
        return np.maximum(per_hour, 1e-12)

    def usd_per_image(self, metrics: Metrics) -> Floats:
        """Return what an image costs by it."""
        found: Floats = self.usd_per_hour(metrics) / 3600 / self._rate(metrics)
        return found

    def _rate(self, metrics: Metrics) -> Floats:
        rate = metrics["images_per_s"]
        return np.full_like(rate, self._goal.images_per_s) if self._goal.images_per_s else rate


def _leased_bytes(peak_bytes: Floats) -> Floats:
    """Return the memory that a lease gets for a peak, about (`decide.scaling.memory_with_margin`, after a few repeats)."""
    found: Floats = peak_bytes + np.maximum(MARGIN_BYTES, MARGIN_SHARE * peak_bytes) * _REPEATS_MARGIN
    return found


def _key(configuration: Configuration) -> tuple[object, ...]:
    return tuple(configuration.get(factor) for factor in FACTORS)
