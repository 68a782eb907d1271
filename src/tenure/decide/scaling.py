"""How a job's time and memory move with its configuration: workers and CPUs of a round, memory with its margin, and the
bounds of a closed network of clients. Model errors are named constants: they widen intervals, never shift values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tenure.errors import SpecError
from tenure.trials import Prediction, Trial
from tenure.usage import Summary

from .fits import LEVEL, half_width, pool, predict_mean

MIB = 1 << 20
SAME_ERROR = 0.1
"""Relative model error of a configuration that was itself measured: another hour on a shared machine."""
OTHER_ERROR = 0.15
"""Added for a configuration that was not measured, per doubling of the workers beyond the nearest measured one."""
MARGIN_BYTES = 16 * MIB
MARGIN_SHARE = 0.15


def number(trial: Trial, factor: str, default: float = 0.0) -> float:
    """Return a factor of the trial's configuration as a number."""
    return float(trial.configuration.get(factor, default))


def summaries(trials: Sequence[Trial], metric: str) -> list[Summary]:
    """Return the metric of each trial that measured it."""
    return [trial.metrics[metric] for trial in trials if metric in trial.metrics]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundModel:
    """Time of one training round: ceil(S / W) shards after one another, then the combine and the exchange around it."""

    shards: int
    cores: float
    trials: tuple[Trial, ...]
    """Those that measured `round_s` and `shard_s`, at least one."""

    def predict(self, workers: int, cpus: float) -> Prediction:
        """Return `round_s`: as measured when this configuration was, else from the nearest measured one.

        Each shard takes base / min(cpus, 1) x contention(load), load = workers x cpus; contention grows linearly with the
        load as far as trials with several workers show, and by load / cores beyond the node's cores.
        """
        same = [t for t in self.trials if number(t, "workers") == workers and number(t, "cpus", 1.0) == cpus]
        if same:
            return predict_mean(summaries(same, "round_s"), model_error=SAME_ERROR)
        near_workers = min(sorted({number(t, "workers") for t in self.trials}), key=lambda w: abs(math.log2(w / workers)))
        near = [t for t in self.trials if number(t, "workers") == near_workers]
        value = math.ceil(self.shards / workers) * self._shard_s(workers, cpus) + self._rest_s(near, workers, cpus)
        spread = half_width(summaries(near, "round_s")) / pool(summaries(near, "round_s")).mean
        away = abs(math.log2(workers / near_workers)) + abs(math.log2(min(cpus, 1.0)))
        half = value * (spread + SAME_ERROR + OTHER_ERROR * max(1.0, away))
        return Prediction(value=value, low=max(0.0, value - half), high=value + half, level=LEVEL)

    def contention(self, load: float) -> float:
        """Return by which factor a shard takes longer at this load (cores kept busy) than alone."""
        alone = [t for t in self.trials if _load(t) <= 1]
        shared = [t for t in self.trials if 1 < _load(t) <= self.cores]
        growth = 0.0
        if alone and shared:
            base_s = pool([_scaled(s, min(number(t, "cpus", 1.0), 1.0)) for t in alone for s in [t.metrics["shard_s"]]]).mean
            rates = [
                (t.metrics["shard_s"].mean * min(number(t, "cpus", 1.0), 1.0) / base_s - 1) / (_load(t) - 1) for t in shared
            ]
            growth = max(0.0, sum(rates) / len(rates))
        return (1 + growth * max(0.0, min(load, self.cores) - 1)) * max(1.0, load / self.cores)

    def _shard_s(self, workers: int, cpus: float) -> float:
        bases = [
            _scaled(t.metrics["shard_s"], min(number(t, "cpus", 1.0), 1.0) / self.contention(_load(t))) for t in self.trials
        ]
        return pool(bases).mean / min(cpus, 1.0) * self.contention(workers * cpus)

    def _rest_s(self, near: Sequence[Trial], workers: int, cpus: float) -> float:
        """Combine and exchange: what a measured round took beside its shards; waits for more workers grow with them."""
        rests = []
        for t in near:
            shards_s = math.ceil(self.shards / number(t, "workers")) * t.metrics["shard_s"].mean
            combine_s = t.metrics["combine_s"].mean if "combine_s" in t.metrics else 0.0
            exchange_s = max(0.0, t.metrics["round_s"].mean - shards_s - combine_s)
            growth = max(1.0, workers / number(t, "workers"))
            rests.append(combine_s * min(number(t, "cpus", 1.0), 1.0) / min(cpus, 1.0) + exchange_s * growth)
        return sum(rests) / len(rests)


def round_model(trials: Sequence[Trial], *, shards: int, cores: float) -> RoundModel:
    """Return the model of a round from trials. Raises SpecError when none measured `round_s` and `shard_s`."""
    usable = tuple(t for t in trials if {"round_s", "shard_s"} <= set(t.metrics) and number(t, "workers") >= 1)
    if not usable:
        raise SpecError("no trial measured round_s and shard_s; a round's time can't be predicted without one")
    return RoundModel(shards=shards, cores=cores, trials=usable)


def _load(trial: Trial) -> float:
    return number(trial, "workers") * number(trial, "cpus", 1.0)


def _scaled(s: Summary, by: float) -> Summary:
    return Summary(
        n=s.n, mean=s.mean * by, sd=s.sd * by, minimum=s.minimum * by, median=s.median * by, maximum=s.maximum * by
    )  # fmt: skip


def memory_with_margin(peaks: Sequence[Summary]) -> Prediction:
    """Return the peak memory in bytes; `high` is what to lease: the highest peak seen + a margin, in whole MiB.

    The margin is the larger of 16 MiB and 15 %, doubled after one repeat and shrinking towards that as 1 + 1/n.
    Raises SpecError for no peaks.
    """
    whole = pool(peaks)
    margin = max(MARGIN_BYTES, MARGIN_SHARE * whole.maximum) * (1 + 1 / whole.n)
    high = math.ceil((whole.maximum + margin) / MIB) * MIB
    low = min(whole.minimum, whole.maximum - margin)
    return Prediction(value=whole.maximum, low=max(0.0, low), high=float(high), level=LEVEL)


def memory_used(peaks: Sequence[Summary]) -> Prediction:
    """Return the peak memory in bytes that is to be expected, without the margin that a lease adds.

    10 % on both sides of what was seen, doubled after one repeat. Raises SpecError for no peaks.
    """
    whole = pool(peaks)
    part = SAME_ERROR * (1 + 1 / whole.n)
    return Prediction(
        value=whole.maximum, low=whole.minimum * max(0.0, 1 - part), high=whole.maximum * (1 + part), level=LEVEL
    )  # fmt: skip


def closed_bounds(clients: int, response_s: float, demand_s: float, cores: float) -> tuple[float, float]:
    """Return least and most operations per second of N clients that each wait for an answer before asking again.

    response_s: time of one operation with one client. demand_s: CPU time of one operation, all parts together.
    cores: CPUs that serve the demand.
    Asymptotic bounds of operational analysis, Denning & Buzen (1978): X(N) <= min(N / R(1), cores / D), and
    X(N) >= N / (R(1) + (N - 1) D), every other client being ahead in line.
    Raises SpecError unless clients >= 1 and times > 0.
    """
    if clients < 1 or response_s <= 0 or demand_s < 0 or cores <= 0:
        raise SpecError(
            f"bounds need clients >= 1, response_s > 0, cores > 0; found {clients!r}, {response_s!r}, {cores!r}"
        )  # fmt: skip
    most = min(clients / response_s, cores / demand_s if demand_s else math.inf)
    least = clients / (response_s + (clients - 1) * demand_s)
    return min(least, most), most
