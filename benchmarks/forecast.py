"""How much capacity keeps demand covered ten minutes ahead, and how near a run time is foretold from similar past runs.

Worlds of demand (each value is known at the end of its step; capacity for a step is fixed 10 min before it, rounded up to
steps):
- `genai`: requests/s of the diffusion service of the GenAI trace, all containers and both kinds summed, steps of 57 s (the
  trace's own), 7.9 h; `genai_containers`: the same per container (those with at least 100 entries; no entry is no request),
  capacity, peaks and misses summed over containers; demand comes in multiples of the least value of its learning third, which
  the forecaster is told as its unit (in Azure 1);
- `azure`: arrivals of the Azure trace per 10 s, 57 min. `azure_1s` and `azure_60s` only stand in the details.
Rolling origin: the first third of a series only teaches; the rest is judged, each step against the capacity fixed for it then.
Miss: a step whose demand exceeds the capacity held. Capacity: mean held over judged steps ÷ static peak. Static peak: the
highest demand of the judged steps, what a fixed capacity must be to never miss.
Risk handed to the forecaster: 1 % everywhere. Constants were chosen on every second container (by order of name) and on planted
series; everything else (the other containers, the totals, Azure, Philly) confirms. Both halves stand in the details.
Reactive policy: last value × (1 + margin), the least margin, known in hindsight, that misses no more than we do. Where the last
value is 0 before demand no margin is enough: then last value + band, the band known in hindsight too. Both stand in the
details. Naive beside (causal, their errors calibrated as ours are): last value, moving maximum, and same time yesterday where
the series has two days. Limit beside: the best constant known in hindsight that misses 1 %.
Bars: misses <= 1 % and capacity <= 70 % in `genai`, `genai_containers` and `azure`; >= 20 % below the reactive policy in each.

Season: planted series (Poisson counts, a day of 24 steps, amplitude 0.6; a spike once a day; both 20 days; 40 seeds): found in
>= 95 %, with a period that is a day within 1 step; in noise (Poisson, bursts, a random walk; as many) found in <= 5 %. None
may be used in GenAI or Azure, which have no second day. Philly: hourly arrivals of six virtual clusters; the day is proved
when the held-out error (rolling, lead 1 h, mean of squared differences of square roots) with season is below the same
forecast's without it, in each cluster where the forecaster chose to use one and in at least one; and where the hours of the
same series are shuffled none is used.

Run times: Philly jobs in order of submission, each foretold from those of the six clusters that ended before it was submitted,
by (cluster, gang size), and `philly_runtime` in an order shuffled by the seed: share inside the 80 % interval (0.75 to 0.85),
and the median of |log(foretold ÷ true)| against the naive ones: mean, last of the same cluster, median of all.
`value` is the highest share of capacity among the three worlds of demand.
Control: the forecaster's centre held as capacity, without a calibrated margin: it must miss more than 1 % in every world.
Left out: what a miss costs; how long a node takes to start beyond the ten minutes.
"""

from __future__ import annotations

import bisect
import csv
import gzip
import heapq
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Control, Options, Result, judge
from tenure.decide.durations import Kind, RunTimes
from tenure.decide.forecast import DAY_S, Forecaster, rehearse, upper

NAME = "forecast"
BAR = "misses <= 1 % with <= 70 % of the static peak, >= 20 % less than reactive; a season only where there is one"
Array = NDArray[np.float64]
LEAD_S, RISK = 600.0, 0.01
MISSES_LIMIT, CAPACITY_LIMIT, BELOW_REACTIVE = 0.01, 0.70, 0.20
LEARNING = 1 / 3
GENAI_STEP_S = 57.0
ENTRIES_MIN = 100
PLANTED_STEPS, PLANTED_SEEDS = 480, 40
FOUND_LIMIT, FALSE_LIMIT = 0.95, 0.05
COVERAGE = (0.75, 0.85)


@dataclass(frozen=True, slots=True)
class Series:
    """Demand per step."""

    step_s: float
    t_s: Array
    demand: Array
    unit: float = 0.0


@dataclass(frozen=True, slots=True)
class Held:
    """Capacity over the judged steps of one series."""

    demand: Array
    capacity: Array
    whole_peak: float
    """Highest demand of all steps, judged or not."""

    @property
    def misses(self) -> int:
        """Steps with demand above capacity."""
        return int((self.demand > self.capacity).sum())


def run(options: Options) -> Result:
    """Judge every world of demand, the seasons and the run times."""
    worlds = read_worlds(options)
    found = {name: judged_world(series) for name, series in worlds.items()}
    seasons = judged_seasons(options)
    run_times = judged_run_times(options)
    bars = {f"{name}: {bar}": ok for name in ("genai", "genai_containers", "azure") for bar, ok in bars_of(found[name]).items()}
    bars |= {f"season: {bar}": ok for bar, ok in seasons["bars"].items()}
    bars |= {f"run times: {name}": COVERAGE[0] <= one["inside_80"] <= COVERAGE[1] for name, one in run_times.items()}
    control_misses = [found[name]["center"]["misses"] for name in ("genai", "genai_containers", "azure")]
    control = Control(
        name="the centre as capacity",
        value=min(control_misses),
        failed=min(control_misses) > MISSES_LIMIT,
        how="least share of misses over the worlds; the bar is 0.01",
    )
    holds, why = judge(all(bars.values()), control)
    missed = [bar for bar, ok in bars.items() if not ok]
    return Result(
        value=max(found[name]["capacity"] for name in ("genai", "genai_containers", "azure")),
        spread=None,
        unit="share of the static peak",
        holds=holds,
        why=f"missed: {'; '.join(missed)}" if missed else why,
        reference={"name": "last value with the best margin in hindsight", **{n: found[n]["reactive"] for n in found}},
        control=control,
        details={"bars": bars, "worlds": found, "season": seasons, "run_times": run_times},
    )


def bars_of(world: Mapping[str, Any]) -> dict[str, bool]:
    """Return which bars of demand a world meets."""
    return {
        "misses": world["misses"] <= MISSES_LIMIT,
        "capacity": world["capacity"] <= CAPACITY_LIMIT,
        "below reactive": world["capacity"] <= (1 - BELOW_REACTIVE) * world["reactive"]["capacity"],
    }


def read_worlds(options: Options) -> dict[str, list[Series]]:
    """Return the series by world; in quick mode every fourth container."""
    total: dict[float, float] = defaultdict(float)
    parts: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    entries: Counter[str] = Counter()
    for row in rows(options.need_data("traces", "genai", "qps.csv.gz")):
        t_s, value = float(row["timestamp_anon"]), float(row["value"])
        total[t_s] += value
        if row["container_ip"]:
            parts[row["container_ip"]][t_s] += value
            entries[row["container_ip"]] += 1
    times = np.array(sorted(total))
    grid = np.arange(times[0], times[-1] + 1, GENAI_STEP_S)
    assert set(times) <= set(grid), "the GenAI trace has entries beside its steps of 57 s"
    containers = []
    for name in sorted(name for name, count in entries.items() if count >= ENTRIES_MIN):
        demand = np.array([parts[name].get(t, 0.0) for t in grid])
        learnt = demand[: int(len(grid) * LEARNING)]
        unit = float(learnt[learnt > 0].min()) if (learnt > 0).any() else 0.0
        containers.append(Series(GENAI_STEP_S, grid, demand, unit))
    worlds = {"genai": [Series(GENAI_STEP_S, times, np.array([total[t] for t in times]))]}
    worlds["genai_containers_chosen_on"], worlds["genai_containers_confirmed_on"] = containers[0::2], containers[1::2]
    worlds["genai_containers"] = containers
    if options.quick:
        worlds |= {name: series[::4] for name, series in worlds.items() if len(series) > 1}
    arrivals = options.need_data("traces", "azure_llm", "AzureLLMInferenceTrace_code.csv")
    stamps = np.array([np.datetime64(row["TIMESTAMP"][:26]) for row in rows(arrivals)])
    seconds = (stamps - stamps[0]) / np.timedelta64(1, "s")
    for name, step_s in (("azure", 10.0), ("azure_1s", 1.0), ("azure_60s", 60.0)):
        counts = np.bincount((seconds // step_s).astype(int))[:-1].astype(float)
        assert counts.sum() > 0.99 * len(seconds) - counts.max(), "arrivals were lost in binning"
        worlds[name] = [Series(step_s, np.arange(len(counts)) * step_s, counts, 1.0)]
    return worlds


def judged_world(series: Sequence[Series]) -> dict[str, Any]:
    """Return misses and capacity of ours, the reactive policy, the naive ones and the limit in hindsight."""
    ours, centres, seasons = [], [], 0
    for one in series:
        forecaster = Forecaster(step_s=one.step_s, lead_s=LEAD_S, risk=RISK, unit=one.unit)
        steps = rehearse(forecaster, zip(one.t_s.tolist(), one.demand.tolist(), strict=True))
        begins = one.t_s[int(len(one.t_s) * LEARNING)]
        steps = [step for step in steps if step.t_s >= begins]
        demand, peak = np.array([step.demand for step in steps]), float(one.demand.max())
        ours.append(Held(demand, np.array([step.foretold.capacity for step in steps]), peak))
        centres.append(Held(demand, np.array([step.foretold.center for step in steps]), peak))
        seasons += any(step.foretold.season_s is not None for step in steps)
    found = {**pooled(ours), "series": len(series), "with_a_season": seasons, "center": pooled(centres)}
    lasts = [lagged(one) for one in series]
    found["reactive_margin"] = pooled([_reactive(held, last) for held, last in zip(ours, lasts, strict=True)])
    found["reactive_band"] = pooled([_reactive(held, last, band=True) for held, last in zip(ours, lasts, strict=True)])
    enough = found["reactive_margin"]["misses"] <= found["misses"] + 1e-12
    found["reactive"] = found["reactive_margin" if enough else "reactive_band"]
    found["constant_in_hindsight"] = pooled([_constant(held) for held in ours])
    found["last_value"] = pooled([naive(one, lambda past, lead: past[-1]) for one in series])
    found["moving_maximum"] = pooled([naive(one, lambda past, lead: float(past[-2 * lead :].max())) for one in series])
    return found


def pooled(held: Sequence[Held]) -> dict[str, float]:
    """Return the share of steps missed and the capacity held as a share of the peaks, over series."""
    capacity = sum(float(one.capacity.mean()) for one in held)
    return {
        "misses": sum(one.misses for one in held) / sum(len(one.demand) for one in held),
        "capacity": capacity / sum(float(one.demand.max()) for one in held),
        "capacity_of_the_whole_trace_s_peak": capacity / sum(one.whole_peak for one in held),
    }


def lagged(series: Series) -> Array:
    """Return for each judged step the last value known when its capacity is fixed."""
    lead = int(np.ceil(LEAD_S / series.step_s))
    index = {round(t / series.step_s): i for i, t in enumerate(series.t_s.tolist())}
    first = int(len(series.t_s) * LEARNING)
    known = [index.get(round(t / series.step_s) - lead) for t in series.t_s[first:].tolist()]
    return np.array([series.demand[i] for i in known if i is not None])


def _reactive(ours: Held, last: Array, *, band: bool = False) -> Held:
    """Return the reactive policy with the least margin or band that misses no more steps of this series than ours does."""
    assert len(last) == len(ours.demand), "reactive and forecast are judged on different steps"
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = ours.demand - last if band else np.where(ours.demand > 0, ours.demand / last, 0.0)
    order = np.sort(np.maximum(needed, 0.0))
    least = float(order[len(order) - 1 - ours.misses])
    if not np.isfinite(least):
        least = float(order[np.isfinite(order)][-1])
    return Held(ours.demand, (last + least if band else last * least) * (1 + 1e-9), ours.whole_peak)


def _constant(ours: Held) -> Held:
    """Return the least constant that misses at most 1 % of the judged steps."""
    order = np.sort(ours.demand)
    return Held(ours.demand, np.full(len(order), order[len(order) - 1 - int(RISK * len(order))]), ours.whole_peak)


def naive(series: Series, point: Callable[[Array, int], float]) -> Held:
    """Return a naive forecast with a bound calibrated as ours are: conformal, from the errors known then.

    point: (values so far, lead in steps) -> what it foretells.
    """
    lead = int(np.ceil(LEAD_S / series.step_s))
    demand, n = series.demand, len(series.demand)
    points = np.sqrt([point(demand[: i + 1], lead) for i in range(n)])
    first = int(n * LEARNING)
    errors = np.sqrt(demand[lead:]) - points[:-lead]
    capacity = [
        (points[i - lead] + (upper(errors[max(0, i - 2 * lead - 511) : i - 2 * lead + 1], RISK) if i >= 2 * lead else 0.0)) ** 2
        for i in range(first, n)
    ]
    return Held(demand[first:], np.array(capacity) * (1 + 1e-9), float(demand.max()))


def planted(kind: str, seed: int) -> Array:
    """Return a planted series: `day` and `spike` have a period of 24 steps, the others none."""
    rng, at = np.random.default_rng(seed), np.arange(PLANTED_STEPS)
    match kind:
        case "day":
            return rng.poisson(10 * (1 + 0.6 * np.sin(2 * np.pi * at / 24))).astype(float)
        case "spike":
            return rng.poisson(5 + 30 * (at % 24 == 9)).astype(float)
        case "poisson":
            return rng.poisson(10, len(at)).astype(float)
        case "bursts":
            return (rng.poisson(3, len(at)) + (rng.random(len(at)) < 0.05) * rng.poisson(60, len(at))).astype(float)
        case _:
            return np.abs(100 + np.cumsum(rng.normal(0, 3, len(at))))


def judged_seasons(options: Options) -> dict[str, Any]:
    """Return where a season was found, and what it gained, on planted series, on noise and on Philly's hourly arrivals."""
    seeds = range(options.seed, options.seed + (8 if options.quick else PLANTED_SEEDS))
    found: dict[str, float] = {}
    for kind in ("day", "spike", "poisson", "bursts", "walk"):
        periods = [hourly(planted(kind, seed)).season_s for seed in seeds]
        wanted = [p is not None and abs(p - DAY_S) <= 3600 for p in periods]
        found[kind] = statistics.mean(wanted if kind in ("day", "spike") else [p is not None for p in periods])
    arrivals: dict[str, list[float]] = defaultdict(list)
    for row in rows(options.need_data("traces", "philly_gavel", "jobs.csv")):
        arrivals[row["vc"]].append(float(row["submit_s"]))
    clusters: dict[str, dict[str, Any]] = {}
    for name, submitted in sorted(arrivals.items()):
        counts = np.bincount((np.array(submitted) // 3600).astype(int))[:-1].astype(float)
        forecaster, shuffled = hourly(counts), hourly(np.random.default_rng(options.seed).permutation(counts))
        error, without = forecaster.season_errors[DAY_S]
        yesterday = np.mean((np.sqrt(counts[24:]) - np.sqrt(counts[:-24])) ** 2)
        last = np.mean((np.sqrt(counts[1:]) - np.sqrt(counts[:-1])) ** 2)
        clusters[name] = {
            "hours": len(counts),
            "used_s": forecaster.season_s,
            "used_shuffled_s": shuffled.season_s,
            "day_error_ratio": error / without,
            "yesterday_error_ratio": float(yesterday / without),
            "last_value_error_ratio": float(last / without),
        }
    used = [one for one in clusters.values() if one["used_s"] is not None]
    bars = {
        "planted found": min(found["day"], found["spike"]) >= FOUND_LIMIT,
        "none in noise": max(found["poisson"], found["bursts"], found["walk"]) <= FALSE_LIMIT,
        "Philly": bool(used) and all(one["day_error_ratio"] < 1 for one in used),
        "none in Philly shuffled": all(one["used_shuffled_s"] is None for one in clusters.values()),
    }
    return {"found": found, "philly": clusters, "bars": bars}


def hourly(counts: Array) -> Forecaster:
    """Return a forecaster that has seen the counts of one hour each, with a lead of one hour."""
    forecaster = Forecaster(step_s=3600.0, lead_s=3600.0)
    for i, count in enumerate(counts.tolist()):
        forecaster.observe(i * 3600.0, count)
    return forecaster


def judged_run_times(options: Options) -> dict[str, dict[str, float]]:
    """Return the share inside the 80 % interval and the median log error, ours and the naive ones, per trace."""
    jobs = sorted(
        (float(row["submit_s"]), float(row["duration_v100_s"]), row["vc"], int(row["gpus"]))
        for row in rows(options.need_data("traces", "philly_gavel", "jobs.csv"))
    )
    runs = [float(row["runtime"]) for row in rows(options.need_data("traces", "philly_runtime", "philly_runtime.csv"))]
    np.random.default_rng(options.seed).shuffle(runs)
    count = 3000 if options.quick else 20000
    alone = [(float(i), 0.5, "", 1, run_s) for i, run_s in enumerate(runs[:count])]
    return {
        "philly": _foretold([(submit_s, run_s, vc, gpus, run_s) for submit_s, run_s, vc, gpus in jobs]),
        "philly_runtime": _foretold(alone),
    }


def _foretold(jobs: Sequence[tuple[float, float, str, int, float]]) -> dict[str, float]:
    """Foretell each job (submitted, seconds until its run time is known, tenant, gang size, run time) from those ended."""
    times, running, ended = RunTimes(), list[tuple[float, float, Kind]](), list[float]()
    last: dict[str, float] = {}
    total, inside = 0.0, list[bool]()
    errors: dict[str, list[float]] = defaultdict(list)
    for submit_s, known_after_s, tenant, gang_size, run_s in jobs:
        while running and running[0][0] <= submit_s:
            _, seen_s, seen = heapq.heappop(running)
            times.observe(seen, seen_s)
            bisect.insort(ended, seen_s)
            last[seen.tenant], total = seen_s, total + seen_s
        kind = Kind(tenant, "", gang_size)
        made = times.foretell(kind)
        if made is not None and len(ended) >= ENTRIES_MIN and run_s > 0:
            inside.append(made.low_s <= run_s <= made.high_s)
            mean_s = total / len(ended)
            guesses = {"ours": made.value_s, "mean": mean_s, "last": last.get(tenant, mean_s), "median": ended[len(ended) // 2]}
            for name, guess_s in guesses.items():
                errors[name].append(abs(float(np.log(max(guess_s, 1.0) / run_s))))
        heapq.heappush(running, (submit_s + known_after_s, run_s, kind))
    return {
        "jobs": len(inside),
        "inside_80": statistics.mean(inside),
        **{f"median_log_error_{name}": statistics.median(values) for name, values in errors.items()},
    }


def rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file, packed or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from csv.DictReader(file)
