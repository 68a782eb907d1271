"""Which serving setting to take, from at most ten trials: on a recorded grid of a real model, and on 20 planted landscapes.

Grid: `grids/mobilenet_v2.json`, written once by `python -m benchmarks.record_grid` (what was run and under what load is in
both): 126 settings of a pretrained MobileNetV2 (architecture, transport, interaction, batch, instances, threads, delay), each
measured in three passes, all settings interleaved at random within a pass; then the top five of each aim measured anew,
interleaved, in further rounds. A record made while others kept more than a quarter of a core busy in the median measurement
holds nothing. A search is shown one pass; the truth is the mean of the two passes that it does not see, and for the top five
what was measured anew. Aims: most images/s; most images/s with p99 <= 60 ms; least cost with p99 <= 60 ms and half of the
highest rate; least cost with p99 <= 250 ms and three quarters of it. Each aim is searched in each of the three passes.
Landscapes: seeds 1000 to 1019 of `landscapes` (100 to 200 settings, its docstring says what is planted), five searches each,
each with noise of its own. Seeds below 1000 are for whoever works on the search.
Cost: USD per image of the CPU time used and the memory held (0.04 USD per CPU-hour, 0.005 USD per GiB-hour).
A search names a setting, is told the trial of it, and so on; a setting asked for again counts again, and is told the same on
the grid. Ratio of a search: the true value of what it chooses over the best true value among settings that meet the bounds, at
most 1; 0 when the choice's true p99 is more than 10 % above its bound or its rate more than 5 % below (no trial of this length
tells more closely), or when nothing is chosen.
Value: the smallest, over the aims of the grid and the 20 landscapes, of the median ratio of their searches. Bars, all must
hold: the median of each aim and of each landscape >= 0.97; no search asks for more than 10 trials.
Beside it: how many single searches reach 0.97; trials asked for; what the search said of its own confidence against how often
it was right; seconds it thinks per step.
Reference (not with --quick; null where it can't be installed): Model Analyzer's own quick search (its classes, told our trials
as measurements; dimensions: place, interaction, batch, instances x threads, delay) with ten trials and with as many as it
wants, and the Optuna search it offers, with ten.
Control: as many settings drawn at random, the best measured one that meets the bounds taken, must miss the bar; 20 draws each.
--quick: four landscapes, three searches each; the grid whole.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import landscapes, peers, serving
from benchmarks.harness import Control, Options, Result, Skip, judge, spread
from benchmarks.peers import homes
from benchmarks.record_grid import AIMS, GRID, QUIET_CPUS, mean, usd_per_image
from tenure.decide.serve_search import Aim, advise
from tenure.nodes import Machine
from tenure.trials import Configuration, Trial
from tenure.usage import summarize

NAME = "serve_search"
BAR = "the setting chosen >= 0.97 x the best with <= 10 trials: each aim of a real model's grid, each of 20 planted landscapes"
RATIO_BAR, MAX_TRIALS = 0.97, 10
P99_TOLERANCE, RATE_TOLERANCE = 0.1, 0.05
FIRST_SEED, LANDSCAPES, SEARCHES, DRAWS = 1000, 20, 5, 20
_PROGRAM = Path(__file__).parent / "peers" / "programs" / "analyzer_search.py"

Values = Mapping[str, float]
Measure = Callable[[int], Trial]
"""The trial of a setting by its number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One aim in one space, to be searched several times."""

    name: str
    settings: Sequence[Configuration]
    cores: float
    best: str
    p99_s: float = 0.0
    images_per_s: float = 0.0
    ratios: Sequence[NDArray[np.float64]]
    """For each search: what each setting is worth by the truth, over the best."""
    measures: Sequence[Callable[[], Measure]]
    """For each search: a fresh one."""

    @property
    def aim(self) -> Aim:
        """As the search is told it."""
        cost = _usd if self.best == "cost" else None
        return Aim(p99_s=self.p99_s, images_per_s=self.images_per_s, cost=cost)

    def judged(self, values: Values) -> tuple[float, float]:
        """Return what measured values are worth, and the share by which they break a bound (0: none is broken)."""
        worth = values["images_per_s"] if self.best == "rate" else 1e-6 / usd_per_image(values)
        excess = max(
            values["p99_s"] / self.p99_s - 1 if self.p99_s else 0.0,
            self.images_per_s / values["images_per_s"] - 1 if self.images_per_s else 0.0,
            0.0,
        )
        return worth, excess


@dataclass(slots=True)
class Seen:
    """How the searches of one contender went."""

    ratios: dict[str, list[float]] = field(default_factory=dict)
    """By case."""
    trials: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    """What the search said of its confidence."""
    steps_s: list[float] = field(default_factory=list)

    def add(self, case: Case, ratio: float, trials: int) -> None:
        """Count one search."""
        self.ratios.setdefault(case.name, []).append(ratio)
        self.trials.append(trials)

    @property
    def medians(self) -> dict[str, float]:
        """The median ratio by case."""
        return {name: statistics.median(found) for name, found in self.ratios.items()}

    @property
    def singles(self) -> list[float]:
        """All ratios."""
        return [ratio for found in self.ratios.values() for ratio in found]

    def told(self, name: str) -> dict[str, float]:
        """Return the figures for `details`."""
        return {
            f"{name}_least_median": round(min(self.medians.values()), 4),
            f"{name}_medians_reaching_0.97": sum(m >= RATIO_BAR for m in self.medians.values()),
            f"{name}_searches_reaching_0.97": round(float(np.mean([r >= RATIO_BAR for r in self.singles])), 4),
            f"{name}_mean_ratio": round(float(np.mean(self.singles)), 4),
            f"{name}_mean_trials": round(float(np.mean(self.trials)), 2),
        }


def run(options: Options) -> Result:
    """Search all grids and landscapes, by ours, by the peer and at random."""
    planted, searches = (4, 3) if options.quick else (LANDSCAPES, SEARCHES)
    cases, no_grid = [planted_case(FIRST_SEED + n, searches) for n in range(planted)], ""
    try:
        cases = [*grid_cases(), *cases]
    except Skip as reason:
        no_grid = str(reason)
    ours, naive = Seen(), Seen()
    rng = random.Random(options.seed)
    for case in cases:
        for ratio, measure in zip(case.ratios, case.measures, strict=True):
            search(case, ratio, measure(), ours, options.seed)
        for draw in range(DRAWS):
            n = draw % len(case.measures)
            at_random(case, case.ratios[n], case.measures[n](), naive, rng)
    missed = [f"{name}: {m:.3f}" for name, m in ours.medians.items() if m < RATIO_BAR]
    if max(ours.trials) > MAX_TRIALS:
        missed.append(f"a search asked for {max(ours.trials)} trials")
    worst = min(naive.medians.values())
    control = Control(
        name="settings drawn at random", value=worst, failed=worst < RATIO_BAR,
        how=f"{sum(m < RATIO_BAR for m in naive.medians.values())} of {len(cases)} medians below {RATIO_BAR}",
    )  # fmt: skip
    holds, why = judge(not missed, control)
    details: dict[str, Any] = {**ours.told("ours"), **naive.told("random")}
    details |= {"cases": len(cases), "most_trials": max(ours.trials), "said_chance": round(float(np.mean(ours.chances)), 3)}
    details |= {"step_s": round(statistics.median(ours.steps_s), 3)}
    details |= {f"median {name}": round(m, 4) for name, m in ours.medians.items()}
    reference: dict[str, Any] = {}
    if not options.quick:
        reference = peer_searches(cases, details, options.seed)
    if no_grid and holds:  # half of the bar could not be judged
        return Result(
            value=None, spread=None, unit="", holds=None, why=no_grid, reference=reference, control=control, details=details
        )
    return Result(
        value=round(min(ours.medians.values()), 4),
        spread=spread(ours.singles),
        unit="x the best setting, least median",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference=reference,
        control=control,
        details=details,
    )


def grid_cases() -> list[Case]:
    """Return the recorded grid under each aim. Raises Skip without the record."""
    if not GRID.exists():
        raise Skip(f"{GRID.name} is not there: python -m benchmarks.record_grid writes it")
    told = json.loads(GRID.read_text())
    rows = told["settings"]
    others_cpus = statistics.median(one["others_cpus"] for row in rows for one in row["passes"])
    if others_cpus > QUIET_CPUS:
        raise Skip(f"{GRID.name} was recorded while others kept {others_cpus:.2f} cores busy; record it in a quiet hour")
    settings = [row["setting"] for row in rows]
    whole = [mean(row["anew"] or row["passes"]) for row in rows]
    passes = range(len(rows[0]["passes"]))
    cases = []
    for name, aim in AIMS.items():
        floor = aim.get("share", 0.0) * max(values["images_per_s"] for values in whole)
        case = Case(
            name=f"grid: {name}", settings=settings, cores=told["cores"], best=aim["best"], p99_s=aim.get("p99_s", 0.0),
            images_per_s=floor, ratios=(),
            measures=[lambda p=p: lambda n: _trial(settings[n], rows[n]["passes"][p]) for p in passes],
        )  # fmt: skip
        truths = [[mean(row["anew"] or [one for q, one in enumerate(row["passes"]) if q != p]) for row in rows] for p in passes]
        cases.append(replace(case, ratios=[true_ratios(case, truth) for truth in truths]))
    return cases


def planted_case(seed: int, searches: int) -> Case:
    """Return a planted landscape with so many hours of noise."""
    land = landscapes.landscape(seed)
    case = Case(
        name=f"landscape {seed}", settings=land.settings, cores=land.world.cores, best=land.aim.best, p99_s=land.aim.p99_s,
        images_per_s=land.aim.images_per_s, ratios=(),
        measures=[lambda n=n: landscapes.Noise(land, n).trial for n in range(searches)],
    )  # fmt: skip
    return replace(case, ratios=[true_ratios(case, land.truth)] * searches)


def true_ratios(case: Case, truth: Sequence[Values]) -> NDArray[np.float64]:
    """Return each setting's ratio by the definition: its true worth over the best that meets the bounds, at most 1."""
    worth, excess = (np.array(column) for column in zip(*(case.judged(values) for values in truth), strict=True))
    assert (excess <= 0).any(), f"{case.name}: no setting meets the bounds"
    found = np.minimum(1.0, worth / worth[excess <= 0].max())
    for n, values in enumerate(truth):
        if case.p99_s and values["p99_s"] > case.p99_s * (1 + P99_TOLERANCE):
            found[n] = 0.0
        if values["images_per_s"] < case.images_per_s * (1 - RATE_TOLERANCE):
            found[n] = 0.0
    return found


def search(case: Case, ratios: NDArray[np.float64], measure: Measure, seen: Seen, seed: int) -> None:
    """Run one search of ours to its end."""
    numbers = {id(setting): n for n, setting in enumerate(case.settings)}
    trials: list[Trial] = []
    while True:
        began_s = time.perf_counter()
        advice = advise(case.settings, trials, case.aim, cores=case.cores, max_trials=MAX_TRIALS, seed=seed)
        seen.steps_s.append(time.perf_counter() - began_s)
        if advice.next is None or len(trials) > 2 * MAX_TRIALS:
            break
        trials.append(measure(numbers[id(advice.next)]))
    seen.add(case, 0.0 if advice.choice is None else float(ratios[numbers[id(advice.choice)]]), len(trials))
    seen.chances.append(advice.chance)


def at_random(case: Case, ratios: NDArray[np.float64], measure: Measure, seen: Seen, rng: random.Random) -> None:
    """Measure settings drawn at random, take the best that meets the bounds as measured."""
    drawn = rng.sample(range(len(case.settings)), MAX_TRIALS)
    seen.add(case, _taken(case, ratios, {n: _means(measure(n)) for n in drawn}), len(drawn))


def peer_searches(cases: Sequence[Case], details: dict[str, Any], seed: int) -> dict[str, Any]:
    """Run Model Analyzer's searches on all cases; add to the details and return the reference."""
    home = peers.peer("model_analyzer").install(homes.default_root())
    quick, whole, optuna = Seen(), Seen(), Seen()
    with serving.Dialogue("search of Model Analyzer", homes.python(home), _PROGRAM, {}) as told:
        for case in cases:
            for n, (ratios, measure) in enumerate(zip(case.ratios, case.measures, strict=True)):
                _peer_search(case, ratios, measure(), told, "quick", MAX_TRIALS, seed, quick)
                _peer_search(case, ratios, measure(), told, "quick", len(case.settings), seed, whole)
                _peer_search(case, ratios, measure(), told, "optuna", MAX_TRIALS, seed + n, optuna)
    details |= {**quick.told("peer_quick"), **whole.told("peer_quick_unbounded"), **optuna.told("peer_optuna")}
    value = min(quick.medians.values())
    return {"name": "Model Analyzer's quick search, ten trials", "value": value, "unit": "x the best setting, least median"}


def _peer_search(
    case: Case,
    ratios: NDArray[np.float64],
    measure: Measure,
    told: serving.Dialogue,
    mode: str,
    limit: int,
    seed: int,
    seen: Seen,
) -> None:
    axes = [_levels(case.settings, axis) for axis in _AXES]
    points = {tuple(axes[a].index(_level(s, axis)) for a, axis in enumerate(_AXES)): n for n, s in enumerate(case.settings)}
    answer = told.ask({"new": mode, "sizes": [len(levels) for levels in axes], "seed": seed})
    measured: dict[int, dict[str, float]] = {}
    asked = 0
    for _ in range(50 * limit):  # points that do not exist cost it nothing
        if answer["measure"] is None or asked >= limit:
            break
        number = points.get(tuple(answer["measure"]))
        if number is None:
            answer = told.ask({"missing": True})
            continue
        if number not in measured:
            asked += 1
            measured[number] = _means(measure(number))
        worth, excess = case.judged(measured[number])
        answer = told.ask({"worth": worth, "excess": excess})
    seen.add(case, _taken(case, ratios, measured), asked)


_AXES: tuple[tuple[str, ...], ...] = (
    ("architecture", "transport"),
    ("interaction",),
    ("batch",),
    ("instances", "threads"),
    ("max_delay_s",),
)
_ORDER = ("simple", "microservice", "distributed", "none", "shm", "http", "grpc", "sync", "async")


def _level(setting: Configuration, axis: Sequence[str]) -> tuple[Any, ...]:
    return tuple(_ORDER.index(str(v)) if isinstance(v, str) else v for v in (setting[factor] for factor in axis))


def _levels(settings: Sequence[Configuration], axis: Sequence[str]) -> list[tuple[Any, ...]]:
    return sorted({_level(setting, axis) for setting in settings})


def _taken(case: Case, ratios: NDArray[np.float64], measured: Mapping[int, Values]) -> float:
    """Return the ratio of the best measured setting that meets the bounds as measured; 0 without one."""
    fits = {n: case.judged(values)[0] for n, values in measured.items() if case.judged(values)[1] <= 0}
    return float(ratios[max(fits, key=lambda n: fits[n])]) if fits else 0.0


def _trial(setting: Configuration, values: Values) -> Trial:
    return Trial(
        id="grid", run_id="grid", stage="serve", fingerprint="grid", source="probe", configuration=setting,
        metrics={name: summarize([value]) for name, value in values.items()}, machine=Machine(cpu_model="grid"),
    )  # fmt: skip


def _means(trial: Trial) -> dict[str, float]:
    return {name: summary.mean for name, summary in trial.metrics.items()}


def _usd(metrics: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = usd_per_image(metrics)  # type: ignore[arg-type,assignment]
    return found
