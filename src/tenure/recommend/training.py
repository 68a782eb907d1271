"""Training as a Tunable: workers x CPUs, predicted from few short probes, for an accuracy at the least cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tenure.decide.cost import predicted_cost
from tenure.decide.fits import RoundsToGoal, predict_mean, rounds_to_goal
from tenure.decide.scaling import SAME_ERROR, memory_with_margin, number, round_model, summaries
from tenure.errors import SpecError
from tenure.jobs import Job, TrainGoal
from tenure.prices import PriceVector
from tenure.resources import Capacity, Envelope, format_duration
from tenure.trials import Candidate, Configuration, Prediction, Recommendation, Trial

from .choose import Limit, capacity_broken, choose, show

FIRST_ROUNDS = 10
"""Rounds of the first probe: enough evaluations for a curve to be extrapolated at all."""
SCALING_ROUNDS = 4
"""Rounds of the probe that looks at contention."""
MAX_PROBES = 6
MIN_SLOT_S, MAX_SLOT_S = 20.0, 900.0
TOTAL_FACTOR = 3.0
"""The lease may last this multiple of the longest time predicted."""
DEFAULT_DISK_BYTES = 1 << 30
WORKERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CPUS = (0.5, 1.0)


class TrainTunable:
    """One training job whose workers and CPUs can be chosen. Implements `protocols.Tunable`."""

    def __init__(
        self,
        job: Job,
        capacity: Capacity,
        prices: PriceVector,
        fingerprint: str,
        probe: Callable[[Configuration], Iterator[Trial]],
    ) -> None:
        """job: a train stage with a goal. capacity: of the node that would hold the gang. probe: measures
        ``{"workers", "cpus", "rounds"}`` and yields its trials. Raises SpecError without a goal."""
        if job.train_goal is None:
            raise SpecError(f"stage {job.name!r} has no [train.goal]; nothing can be recommended without one")
        self.job, self.capacity, self.prices, self.fingerprint = job, capacity, prices, fingerprint
        self.goal: TrainGoal = job.train_goal
        self._probe = probe

    def configurations(self) -> Sequence[Configuration]:
        """Return workers up to the job's shards, each with half a CPU and a whole one."""
        workers = [w for w in WORKERS if w <= self.job.shards]
        return [{"workers": w, "cpus": c} for w in workers for c in CPUS]

    def next_probe(self, trials: Sequence[Trial]) -> Configuration | None:
        """Return the next probe, or None when trials are enough or the probes' time (`probe.max_s`) or number is spent.

        First one worker; then two, to see contention; then longer runs while the learning curve is thin.
        """
        measured = [t for t in trials if {"round_s", "shard_s"} <= set(t.metrics)]
        probes = [t for t in trials if t.source == "probe"]
        left_s = self.job.probe.max_s - sum(_spent_s(t) for t in probes)
        if len(probes) >= MAX_PROBES or left_s <= 0:
            return None
        if not measured:
            return {"workers": 1, "cpus": 1.0, "rounds": min(FIRST_ROUNDS, self.job.max_rounds)}
        several = min(2, self.job.shards, max(1, int(self.capacity.cpus)))
        if several > 1 and not any(number(t, "workers") >= 2 for t in measured):
            return {"workers": several, "cpus": 1.0, "rounds": min(SCALING_ROUNDS, self.job.max_rounds)}
        needed = self.rounds(trials)
        if not needed.thin:
            return None
        seen = max((max(t.curves.get("round", (0.0,)), default=0.0) for t in trials), default=0.0)
        round_s = round_model(trials, shards=self.job.shards, cores=self.capacity.cpus).predict(several, 1.0).value
        startup_s = _startup_s(trials).value
        affordable = int((left_s - startup_s) / max(round_s, 1e-6))
        rounds = min(needed.more_rounds, affordable, self.job.max_rounds)
        return {"workers": several, "cpus": 1.0, "rounds": rounds} if rounds > 1.2 * seen else None

    def probe(self, configuration: Configuration) -> Iterator[Trial]:
        """Measure by the callable handed in."""
        return self._probe(configuration)

    def rounds(self, trials: Sequence[Trial]) -> RoundsToGoal:
        """Return the rounds to the goal, from the longest learning curve of the job's own seed.

        In same-result mode the curve does not depend on the workers, so that any trial's will do.
        """
        curves = [(t.curves["round"], t.curves["accuracy"]) for t in trials if t.seed == self.job.seed and _has_curve(t)]
        rounds, accuracy = max(curves, key=lambda curve: curve[0][-1], default=((), ()))
        return rounds_to_goal(rounds, accuracy, self.goal.accuracy, max_rounds=self.job.max_rounds)

    def predict(self, configuration: Configuration, trials: Sequence[Trial]) -> dict[str, Prediction]:
        """Return `time_s` (grant to goal, restarts at slot ends included), `rounds`, `round_s`, `startup_s`,
        `peak_memory_bytes` (of the highest worker) and `cost_usd`. Raises SpecError without usable trials."""
        workers, cpus = int(configuration["workers"]), float(configuration["cpus"])
        rounds = self.rounds(trials).rounds
        # a run ends at max_rounds, so that a goal it does reach takes no more
        rounds = replace(rounds, high=max(rounds.value, min(rounds.high, float(self.job.max_rounds))))
        round_s = round_model(trials, shards=self.job.shards, cores=self.capacity.cpus).predict(workers, cpus)
        startup_s = _slower(_startup_s(trials), 1 / min(cpus, 1.0) * max(1.0, workers * cpus / self.capacity.cpus))
        around_s = _around_s(trials)
        once_s = Prediction(
            value=startup_s.value + rounds.value * round_s.value + around_s,
            low=startup_s.low + rounds.low * round_s.low + around_s / 2,
            high=startup_s.high + rounds.high * round_s.high + around_s * 2,
        )
        restarts = math.floor(once_s.value / slot_s(once_s.value))
        time_s = Prediction(
            value=once_s.value + restarts * startup_s.value, low=once_s.low, high=once_s.high + (restarts + 1) * startup_s.high
        )
        memory = self._memory(workers, trials)
        predictions = {
            "time_s": time_s,
            "rounds": rounds,
            "round_s": round_s,
            "startup_s": startup_s,
            "peak_memory_bytes": memory,
        }
        envelope = self.envelope(configuration, predictions)
        cost = predicted_cost(envelope, time_s, self.prices, leases=workers, starts=workers * (1 + restarts))
        return predictions | {"cost_usd": cost}

    def envelope(self, configuration: Configuration, predictions: dict[str, Prediction]) -> Envelope:
        """Return the envelope per worker: memory with margin, a slot that really ends, a total of three times the worst."""
        time_s = predictions["time_s"]
        slot = slot_s(time_s.value)
        return Envelope(
            cpus=float(configuration["cpus"]),
            memory_bytes=int(predictions["peak_memory_bytes"].high),
            disk_bytes=min(DEFAULT_DISK_BYTES, self.capacity.disk_bytes // self.job.shards or DEFAULT_DISK_BYTES),
            slot_s=slot,
            total_s=float(min(max(math.ceil(TOTAL_FACTOR * time_s.high), slot), 30 * 86400)),
        )

    def limits(self, *, thin: bool = False) -> list[Limit]:
        """Return the goal's bounds on the predictions.

        thin: the interval is so wide that its end would rule out everything; judge by values, and let the
        recommendation say that it is thin.
        """
        limits = [Limit(metric="rounds", value=float(self.job.max_rounds), by_interval=False)]
        if self.goal.time_s:
            limits.append(Limit(metric="time_s", value=self.goal.time_s, by_interval=not thin))
        if self.goal.cost_usd:
            limits.append(Limit(metric="cost_usd", value=self.goal.cost_usd, by_interval=not thin))
        return limits

    def candidate(self, configuration: Configuration, trials: Sequence[Trial]) -> Candidate:
        """Return one configuration with its predictions and envelope, and node capacity as what it breaks."""
        predictions = self.predict(configuration, trials)
        envelope, workers = self.envelope(configuration, predictions), int(configuration["workers"])
        broken = capacity_broken([(workers, envelope)], self.capacity)
        return Candidate(
            configuration=configuration, envelope=envelope, leases=workers, predictions=predictions, broken=broken
        )  # fmt: skip

    def _memory(self, workers: int, trials: Sequence[Trial]) -> Prediction:
        known = [t for t in trials if "peak_memory_bytes" in t.metrics and t.metrics["peak_memory_bytes"].maximum > 0]
        if not known:
            raise SpecError("no trial measured peak_memory_bytes; an envelope can't be recommended without one")
        return memory_with_margin(
            summaries([t for t in known if number(t, "workers") == workers] or known, "peak_memory_bytes")
        )


def recommend_training(
    tunable: TrainTunable, trials: Sequence[Trial], *, id: str, run_id: str, stage: str, now_s: float
) -> Recommendation:
    """Return what to lease for the training goal, from trials alone. Raises SpecError when none can be used.

    The candidates' `cost_usd` is that of the whole gang.
    """
    usable = [t for t in trials if t.fingerprint == tunable.fingerprint]
    candidates = [tunable.candidate(configuration, usable) for configuration in tunable.configurations()]
    rounds = tunable.rounds(usable)

    def explain(chosen: Candidate) -> str:
        time_s, memory = chosen.predictions["time_s"], chosen.predictions["peak_memory_bytes"]
        how = "read off a measured curve" if rounds.reached else "extrapolated from the learning curve"
        return (
            f"{rounds.rounds.value:.0f} rounds ({how}) take {show('time_s', time_s.value)} "
            f"[{show('time_s', time_s.low)} .. {show('time_s', time_s.high)}]; a worker's peak memory is "
            f"{show('memory_bytes', memory.value)}, {show('memory_bytes', memory.high)} leased."
        )

    return choose(
        candidates,
        tunable.limits(thin=bool(rounds.thin)),
        id=id,
        run_id=run_id,
        stage=stage,
        goal=describe_goal(tunable.goal),
        now_s=now_s,
        trials=[t.id for t in usable],
        thin=rounds.thin,
        explain=explain,
    )


def describe_goal(goal: TrainGoal) -> str:
    """Return the goal in one line."""
    parts = [f"accuracy at least {goal.accuracy:g}"]
    if goal.time_s:
        parts.append(f"within {format_duration(goal.time_s)}")
    if goal.cost_usd:
        parts.append(f"for at most {goal.cost_usd:g} USD")
    return ", ".join(parts) + ", at the least cost"


def slot_s(time_s: float) -> float:
    """Return the slot for a job of this predicted time: about a third of it, 20 s to 15 min, so that slots do end."""
    return float(min(MAX_SLOT_S, max(MIN_SLOT_S, math.ceil(time_s / 3))))


def _has_curve(trial: Trial) -> bool:
    return bool(trial.curves.get("round")) and len(trial.curves["round"]) == len(trial.curves.get("accuracy", ()))


def _startup_s(trials: Sequence[Trial]) -> Prediction:
    known = summaries(trials, "startup_s")
    return predict_mean(known, model_error=SAME_ERROR) if known else Prediction(value=0.0, low=0.0, high=0.0)


def _around_s(trials: Sequence[Trial]) -> float:
    """Grant, first round and ending: what trials that tell their whole `time_s` took beside startup and usual rounds."""
    whole = [t for t in trials if "time_s" in t.metrics and "round_s" in t.metrics]
    around = [t.metrics["time_s"].mean - _spent_s(t) for t in whole]
    return max(0.0, sum(around) / len(around)) if around else 0.0


def _slower(prediction: Prediction, by: float) -> Prediction:
    return replace(prediction, value=prediction.value * by, low=prediction.low * by, high=prediction.high * by)


def _spent_s(trial: Trial) -> float:
    startup = trial.metrics["startup_s"].mean if "startup_s" in trial.metrics else 0.0
    seen = max(trial.curves.get("round", ()), default=0.0) or number(trial, "rounds")
    return startup + seen * (trial.metrics["round_s"].mean if "round_s" in trial.metrics else 0.0)
