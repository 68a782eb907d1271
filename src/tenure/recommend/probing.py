"""What a serving goal means to the search over settings: its bounds, and what of a setting costs how much.

Not here: the search itself (`decide.serve_search`), and the prediction and pricing of what was measured (`serving`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tenure.decide.serve_laws import FACTORS, Floats
from tenure.decide.serve_posterior import Metrics
from tenure.decide.serve_search import MAX_TRIALS, Advice, Aim, advise
from tenure.jobs import ServeGoal
from tenure.prices import GIB, PriceVector
from tenure.trials import Configuration, Trial

CPU_HEADROOM = 1.5
"""Leased CPU over mean CPU used."""
HOLDER_CPUS = 1.0
"""What holds a model gets at least the CPU it was measured under: a smaller share would throttle it within each period."""
LEAST_CPUS = 0.05
LIKE = {"server": "tenure", "load": "closed", "data": "memory", "runtime": "process", "twin": 0}
"""Only trials with these values, where they say them, are of the kind that goals are judged by: never two kinds in one."""


def comparable(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose load, data and server are those that goals are judged by."""
    return [t for t in trials if all(t.configuration.get(name, value) == value for name, value in LIKE.items())]


def search(
    goal: ServeGoal, bases: Sequence[Configuration], trials: Sequence[Trial], prices: PriceVector, *, cores: float
) -> Advice:
    """Return what to measure next for one goal, with its clients; trials with one client tell something, too.

    bases: settings without `clients`. At most `MAX_TRIALS` trials with the goal's clients are asked for.
    """
    settings = [{**base, "clients": goal.clients} for base in bases]
    alone = [{**base, "clients": 1} for base in bases] if goal.clients > 1 else []
    known = {_key(t.configuration) for t in trials}
    context = [setting for setting in alone if _key(setting) in known]
    return advise(settings, trials, aim(goal, prices), cores=cores, context=context, max_trials=MAX_TRIALS)


def aim(goal: ServeGoal, prices: PriceVector) -> Aim:
    """Return the goal's bounds, and the cost per image of the leases: at the goal's rate, or at what a setting reaches."""

    def usd_per_image(metrics: Metrics) -> Floats:
        rate = np.full_like(metrics["images_per_s"], goal.images_per_s) if goal.images_per_s else metrics["images_per_s"]
        simple = metrics["server_memory_bytes"] == 0
        app_cpus = CPU_HEADROOM * rate * metrics["app_cpu_s_per_image"] / goal.clients
        server_cpus = np.maximum(HOLDER_CPUS, CPU_HEADROOM * rate * metrics["server_cpu_s_per_image"])
        cpus = goal.clients * np.maximum(np.where(simple, HOLDER_CPUS, LEAST_CPUS), app_cpus) + np.where(
            simple, 0.0, server_cpus
        )
        per_hour = cpus * prices.cpu_usd_per_hour + metrics["memory_bytes"] / GIB * prices.memory_usd_per_gib_hour
        found: Floats = np.maximum(per_hour, 1e-12) / 3600 / rate
        return found

    return Aim(p99_s=goal.p99_s, images_per_s=goal.images_per_s, memory_bytes=float(goal.memory_bytes), cost=usd_per_image)


def _key(configuration: Configuration) -> tuple[object, ...]:
    return tuple(configuration.get(factor) for factor in FACTORS)
