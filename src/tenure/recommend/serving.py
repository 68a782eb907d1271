"""Serving as a Tunable: architecture, transport, interaction and batch for a goal with N client applications.

What is not modelled: other nodes (everything is priced and fitted on one), open arrival processes (clients wait for an
answer before they ask again), and batching across clients beyond what a trial with those clients measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tenure.decide.cost import cost_usd
from tenure.decide.fits import SINGLE_SPREAD, fit_line, half_width, pool, predict_mean
from tenure.decide.scaling import OTHER_ERROR, SAME_ERROR, closed_bounds, memory_used, memory_with_margin, number, summaries
from tenure.decide.serve_search import MAX_TRIALS
from tenure.errors import SpecError
from tenure.jobs import Job, ServeGoal
from tenure.prices import PriceVector
from tenure.resources import Capacity, Envelope, show_bytes
from tenure.trials import Broken, Candidate, Configuration, Prediction, Recommendation, Trial
from tenure.usage import Summary

from .choose import Limit, capacity_broken, choose, show
from .probing import CPU_HEADROOM, CPU_PERIOD_S, HOLDER_CPUS, LEAST_CPUS, comparable, holder_cpus, search

FACTORS = ("architecture", "transport", "interaction", "batch", "link", "instances", "threads", "max_delay_s")
"""What is chosen between; `clients` comes from the goal."""
SLOT_S, TOTAL_S = 900.0, 3600.0
DISK_BYTES = 256 << 20
MEMORY_STEP_BYTES = 32 << 20
"""Memory is leased in steps, so that no choice hangs on the last page measured."""

Parts = list[tuple[int, Envelope]]
"""Leases of a candidate: how many of each envelope. The first is the one that holds the model."""


class ServeTunable:
    """One model to be served for the job's goals. Implements `protocols.Tunable`; a configuration names `clients` too."""

    def __init__(
        self,
        job: Job,
        capacity: Capacity,
        prices: PriceVector,
        fingerprint: str,
        probe: Callable[[Configuration], Iterator[Trial]],
        *,
        configurations: Sequence[Configuration],
    ) -> None:
        """job: a serve stage with goals. capacity: of the node. probe: measures one configuration.
        configurations: what can be measured here, without `clients`. Raises SpecError without goals."""
        if not job.serve_goals:
            raise SpecError(f"stage {job.name!r} has no [[serve.goals]]; nothing can be recommended without one")
        self.job, self.capacity, self.prices, self.fingerprint = job, capacity, prices, fingerprint
        self._probe = probe
        self._bases = [{k: v for k, v in configuration.items() if k != "clients"} for configuration in configurations]

    def configurations(self) -> Sequence[Configuration]:
        """Return each configuration with one client, and with as many as each goal has."""
        counts = sorted({1} | {goal.clients for goal in self.job.serve_goals})
        return [{**base, "clients": clients} for clients in counts for base in self._bases]

    def next_probe(self, trials: Sequence[Trial]) -> Configuration | None:
        """Return what to measure next; None when enough is known or `probe.max_s` is spent.

        First something with one client: where one probe measures all settings at once, nothing is left of that. What is few
        (`MAX_TRIALS`) is measured whole; what is many is searched for each goal, with its clients. Where all is known with one
        client, only the winner of each goal is measured with the goal's clients, until every winner rests on a measurement.
        """
        if sum(number(t, "seconds") for t in trials if t.source == "probe") >= self.job.probe.max_s:
            return None
        trials = comparable(trials)
        done = {_key(t.configuration) for t in trials}
        alone = [{**base, "clients": 1} for base in self._bases]
        missing = [configuration for configuration in alone if _key(configuration) not in done]
        if missing and (len(missing) == len(alone) or len(alone) <= MAX_TRIALS):
            return missing[0]
        if missing:
            asked = (search(goal, self._bases, trials, self.prices, capacity=self.capacity) for goal in self.job.serve_goals)
            return next((advice.next for advice in asked if advice.next is not None), None)
        for goal in self.job.serve_goals:
            found = self.recommend(goal, trials, id="", run_id="", stage="", now_s=0.0)
            # Where nothing surely meets the goal, what fails by its interval alone deserves to be measured first.
            worth = [found.chosen] if found.chosen is not None else [c for c in found.ruled_out if _may_meet(c)]
            worth = [c for c in worth if _key(c.configuration) not in done]
            if worth:
                return min(worth, key=lambda c: (_value(c, "cost_usd"), _key(c.configuration))).configuration
        return None

    def probe(self, configuration: Configuration) -> Iterator[Trial]:
        """Measure by the callable handed in."""
        return self._probe(configuration)

    def predict(self, configuration: Configuration, trials: Sequence[Trial]) -> dict[str, Prediction]:
        """Return the predictions of `ServeModel`, priced at the rate that the configuration itself reaches."""
        goal = ServeGoal(name="any", clients=int(configuration.get("clients", 1)))
        model = ServeModel(trials, goal, self.capacity, self.prices)
        return model.predict(configuration, model.rate(configuration).value)

    def recommend(
        self, goal: ServeGoal, trials: Sequence[Trial], *, id: str, run_id: str, stage: str, now_s: float
    ) -> Recommendation:
        """Return what to lease for one goal, from this fingerprint's trials."""
        usable = comparable([t for t in trials if t.fingerprint == self.fingerprint])
        return recommend_serving(
            goal, usable, capacity=self.capacity, prices=self.prices, id=id, run_id=run_id, stage=stage, now_s=now_s
        )


class ServeModel:
    """What trials foretell for one goal: rate and latency with N clients, memory, CPUs and cost."""

    def __init__(self, trials: Sequence[Trial], goal: ServeGoal, capacity: Capacity, prices: PriceVector) -> None:
        """trials: of one fingerprint; those that lack the rate, p99 or memory (of the server too, if any) are left out."""
        self.goal, self.capacity, self.prices = goal, capacity, prices
        self.trials = [t for t in trials if _needs(t) <= set(t.metrics)]

    def configurations(self) -> list[Configuration]:
        """Return what was measured, each with the goal's clients."""
        bases = {_key(_base(t.configuration)): _base(t.configuration) for t in self.trials}
        return [{**bases[key], "clients": self.goal.clients} for key in sorted(bases)]

    def rate(self, configuration: Configuration) -> Prediction:
        """Return images per second over all clients: as measured with these clients, else between the bounds of a closed
        network (operational analysis) drawn from the nearest number of clients measured."""
        near, clients = self._near(configuration), self.goal.clients
        measured = predict_mean(summaries(near, "images_per_s"), model_error=SAME_ERROR)
        if number(near[0], "clients", 1) == clients:
            return measured
        (app_s, server_s), alone_s = self._cpu_s(near), self._alone_s(near)
        least, most = closed_bounds(clients, alone_s, app_s + server_s, self.capacity.cpus)
        if server_s:  # one server has the CPU it was measured with, at least a whole one
            most = min(most, max(HOLDER_CPUS, server_s * number(near[0], "clients", 1) / alone_s) / server_s)
            least = min(least, most)
        error = _spread(near, "images_per_s") + OTHER_ERROR
        return Prediction(value=(least + most) / 2, low=max(0.0, least * (1 - error)), high=most * (1 + error))

    def predict(self, configuration: Configuration, rate: float) -> dict[str, Prediction]:
        """Return `images_per_s`, `p99_s`, `memory_bytes` (all applications and the server, without margins) and `cost_usd`
        (one hour of all leases at `rate` images per second). Raises SpecError for a configuration nobody measured."""
        near, clients = self._near(configuration), self.goal.clients
        images = self.rate(configuration)
        p99 = predict_mean(summaries(near, "p99_s"), model_error=SAME_ERROR)
        if number(near[0], "clients", 1) != clients:
            alone_s = self._alone_s(near)
            p99 = Prediction(
                value=p99.value * _slower(clients, images.value, alone_s),
                low=p99.low * _slower(clients, images.high, alone_s),
                high=p99.high * _slower(clients, images.low, alone_s) * (1 + OTHER_ERROR),
            )
        memory = _total(self._memory(near, memory_used))
        parts = self.parts(configuration, rate)
        stalled_s = max(0.0, 1 - parts[0][1].cpus) * CPU_PERIOD_S  # a share below one CPU may pause this long in each period
        p99 = replace(p99, high=p99.high + stalled_s)
        cost = sum(cost_usd(envelope, 3600.0, self.prices, leases=count) for count, envelope in parts)
        error = _spread(near, "images_per_s")
        return {
            "images_per_s": images,
            "p99_s": p99,
            "memory_bytes": memory,
            "cost_usd": Prediction(value=cost, low=cost * max(0.0, 1 - error), high=cost * (1 + error)),
        }

    def parts(self, configuration: Configuration, rate: float) -> Parts:
        """Return the leases at a rate: N applications that hold the model, or one server and N applications that ask it."""
        near, clients = self._near(configuration), self.goal.clients
        app_s, server_s = self._cpu_s(near)
        batch = int(configuration.get("batch", 1))
        busy = rate * (app_s + server_s)
        factor = max(1.0, min(CPU_HEADROOM, self.capacity.cpus / busy)) if busy > 0 else 1.0
        memory = self._memory(near, memory_with_margin)
        used = rate * app_s / clients * factor
        holder = holder_cpus(configuration, self.capacity)
        if configuration["architecture"] == "simple":
            cpus = _twentieths(max(holder, used), self.capacity.cpus / clients)
            return [(clients, _envelope(cpus, memory[0][1].high))]
        app_cpus = _twentieths(max(LEAST_CPUS, used, min(1.0, batch * app_s / CPU_PERIOD_S)), self.capacity.cpus)
        left = max(HOLDER_CPUS, self.capacity.cpus - clients * app_cpus)  # the leases have to fit the node together
        server_cpus = _twentieths(max(holder, rate * server_s * factor), min(left, self.capacity.cpus))
        return [(1, _envelope(server_cpus, memory[1][1].high)), (clients, _envelope(app_cpus, memory[0][1].high))]

    def candidate(self, configuration: Configuration, rate: float) -> Candidate:
        """Return one configuration judged against the node and against wrong answers; the goal's limits come in `choose`.

        `envelope` is that of the lease that holds the model; `leases` how many such there are.
        """
        parts, near = self.parts(configuration, rate), self._near(configuration)
        broken = list(capacity_broken([(count, replace(envelope, cpus=1e-12)) for count, envelope in parts], self.capacity))
        busy = rate * sum(self._cpu_s(near))
        if busy > self.capacity.cpus * (1 + 1e-9):
            reason = f"needs {busy:.3g} cpus for {rate:.4g} images/s; the node has {self.capacity.cpus:g}"
            broken.append(Broken(constraint="node capacity", limit=self.capacity.cpus, found=busy, reason=reason))
        wrong = sum(s.maximum for s in summaries(near, "wrong_answers"))
        if wrong:
            reason = f"{wrong:g} answers differed from those of the model in process"
            broken.append(Broken(constraint="wrong_answers", limit=0.0, found=wrong, reason=reason))
        return Candidate(
            configuration=configuration,
            envelope=parts[0][1],
            leases=parts[0][0],
            predictions=self.predict(configuration, rate),
            broken=tuple(broken),
        )

    def common_rate(self) -> float:
        """Return the rate at which all candidates are priced: the goal's, or what the slowest of them reaches."""
        if self.goal.images_per_s:
            return self.goal.images_per_s
        return min((self.rate(configuration).value for configuration in self.configurations()), default=0.0)

    def explain(self, chosen: Candidate, rate: float) -> str:
        """Return what the cost counts, and what a call costs beside its images where several batches were measured."""
        text = f"Cost is of one hour of all leases at {rate:.4g} images/s"
        text += ", the goal's rate." if self.goal.images_per_s else ", what the slowest candidate reaches."
        factors = [factor for factor in FACTORS if factor != "batch"]
        like = [
            t
            for t in self.trials
            if all(t.configuration.get(f) == chosen.configuration.get(f) for f in factors) and "mean_s" in t.metrics
            and number(t, "clients", 1) == 1
        ]  # fmt: skip
        batches = [number(t, "batch", 1) for t in like]
        if len(set(batches)) >= 2:
            line = fit_line(batches, [t.metrics["mean_s"].mean for t in like])
            text += f" A call takes about {max(0.0, line.intercept) * 1e3:.3g} ms and {line.slope * 1e3:.3g} ms per image."
        return f"{text} Memory of all {self.goal.clients} clients together: {show_bytes(_value(chosen, 'memory_bytes'))}."

    def _near(self, configuration: Configuration) -> list[Trial]:
        """Trials of this configuration with as many clients, else with the largest number below, else the smallest."""
        same = [t for t in self.trials if _key(_base(t.configuration)) == _key(_base(configuration))]
        if not same:
            raise SpecError(f"nobody measured {dict(configuration)!r}; measured: {len(self.trials)} trials")
        counts = {number(t, "clients", 1) for t in same}
        below = [count for count in counts if count <= self.goal.clients]
        count = max(below) if below else min(counts)
        return [t for t in same if number(t, "clients", 1) == count]

    def _alone_s(self, near: Sequence[Trial]) -> float:
        """Seconds per image that one client sees."""
        return number(near[0], "clients", 1) / max(pool(summaries(near, "images_per_s")).mean, 1e-9)

    def _cpu_s(self, near: Sequence[Trial]) -> tuple[float, float]:
        """CPU seconds per image: of the application, of the server."""
        app, server = (summaries(near, metric) for metric in ("app_cpu_s_per_image", "server_cpu_s_per_image"))
        return (pool(app).mean if app else 0.0, pool(server).mean if server else 0.0)

    def _memory(self, near: Sequence[Trial], expect: Callable[[Sequence[Summary]], Prediction]) -> list[tuple[int, Prediction]]:
        """How many, and the memory of each: applications, and the server where there is one."""
        app, server = summaries(near, "app_memory_bytes"), summaries(near, "server_memory_bytes")
        simple = near[0].configuration["architecture"] == "simple"
        if not app or not (simple or server):
            raise SpecError(
                f"trial {near[0].id} did not measure its memory; app_memory_bytes and server_memory_bytes are needed"
            )
        parts = [(self.goal.clients, expect(app))]
        return parts if simple else [*parts, (1, expect(server))]


def recommend_serving(
    goal: ServeGoal,
    trials: Sequence[Trial],
    *,
    capacity: Capacity,
    prices: PriceVector,
    id: str,
    run_id: str,
    stage: str,
    now_s: float,
) -> Recommendation:
    """Return what to lease for one serving goal, from trials of one fingerprint. `cost_usd` is that of one hour.

    thin: says so when the winner was not measured with the goal's clients.
    """
    model = ServeModel(trials, goal, capacity, prices)
    rate = model.common_rate()
    candidates = [model.candidate(configuration, rate) for configuration in model.configurations()]
    limits = []
    if goal.p99_s:
        limits.append(Limit(metric="p99_s", value=goal.p99_s))
    if goal.images_per_s:
        limits.append(Limit(metric="images_per_s", value=goal.images_per_s, at_least=True))
    if goal.memory_bytes:
        limits.append(Limit(metric="memory_bytes", value=float(goal.memory_bytes)))
    measured = {_key(t.configuration) for t in model.trials}
    found = choose(
        candidates,
        limits,
        id=id,
        run_id=run_id,
        stage=stage,
        goal=describe_goal(goal),
        now_s=now_s,
        trials=[t.id for t in model.trials],
        explain=lambda chosen: model.explain(chosen, rate),
    )
    if found.chosen is None or _key(found.chosen.configuration) in measured:
        return found
    thin = (
        f"the winner was measured with fewer or more than {goal.clients} clients; rate and latency are bounds, not measurements"
    )
    return replace(found, thin=thin)


def describe_goal(goal: ServeGoal) -> str:
    """Return the goal in one line."""
    parts = [f"{goal.name}: {goal.clients} client{'s' if goal.clients != 1 else ''}"]
    if goal.p99_s:
        parts.append(f"p99 at most {show('p99_s', goal.p99_s)}")
    if goal.images_per_s:
        parts.append(f"at least {goal.images_per_s:g} images/s")
    if goal.memory_bytes:
        parts.append(f"at most {show_bytes(goal.memory_bytes)}")
    return ", ".join(parts) + ", at the least cost"


def _needs(trial: Trial) -> set[str]:
    needs = {"images_per_s", "p99_s", "app_memory_bytes"}
    return needs if trial.configuration.get("architecture") == "simple" else {*needs, "server_memory_bytes"}


def _may_meet(candidate: Candidate) -> bool:
    """Whether every limit that the candidate breaks is broken by the far end of an interval, not by its middle."""
    values = [(broken, candidate.predictions.get(broken.constraint)) for broken in candidate.broken]
    return all(p is not None and (p.value - broken.limit) * (broken.found - broken.limit) <= 0 for broken, p in values)


def _base(configuration: Configuration) -> Configuration:
    return {factor: configuration[factor] for factor in FACTORS if factor in configuration}


def _key(configuration: Configuration) -> str:
    return "|".join(f"{name}={configuration[name]}" for name in sorted((*FACTORS, "clients")) if name in configuration)


def _slower(clients: int, images_per_s: float, alone_s: float) -> float:
    """Return by which factor an answer takes longer than alone (Little's law)."""
    return max(1.0, clients / max(images_per_s, 1e-9) / alone_s)


def _spread(trials: Sequence[Trial], metric: str) -> float:
    known = summaries(trials, metric)
    mean = pool(known).mean
    return half_width(known) / mean if mean else SINGLE_SPREAD


def _total(parts: Sequence[tuple[int, Prediction]]) -> Prediction:
    value, low, high = (sum(n * getattr(p, end) for n, p in parts) for end in ("value", "low", "high"))
    return Prediction(value=value, low=low, high=high)


def _twentieths(cpus: float, most: float) -> float:
    return min(math.ceil(cpus * 20 - 1e-9) / 20, max(most, 0.001))


def _envelope(cpus: float, memory_bytes: float) -> Envelope:
    leased_bytes = math.ceil(memory_bytes / MEMORY_STEP_BYTES) * MEMORY_STEP_BYTES
    return Envelope(cpus=cpus, memory_bytes=leased_bytes, disk_bytes=DISK_BYTES, slot_s=SLOT_S, total_s=TOTAL_S)


def _value(candidate: Candidate, metric: str) -> float:
    return candidate.predictions[metric].value
