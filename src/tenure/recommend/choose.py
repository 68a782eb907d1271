"""The choice: the cheapest candidate that meets every limit, and for every other the limit that it breaks.

Careful on purpose: a limit must be met by the unfavourable end of a prediction's interval, not by its middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tenure.resources import Capacity, Envelope, show_bytes
from tenure.trials import Broken, Candidate, Configuration, Prediction, Recommendation

NODE_CAPACITY = "node capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One bound that a goal sets on a predicted metric."""

    metric: str
    value: float
    at_least: bool = False
    """A floor instead of a ceiling."""
    by_interval: bool = True
    """Judge the unfavourable end of the interval; otherwise the value."""


def choose(
    candidates: Sequence[Candidate],
    limits: Sequence[Limit],
    *,
    id: str,
    run_id: str,
    stage: str,
    goal: str,
    now_s: float,
    trials: Sequence[str] = (),
    thin: str = "",
    explain: Callable[[Candidate], str] = lambda candidate: "",
) -> Recommendation:
    """Return the recommendation: the candidate with the least predicted `cost_usd` among those that break nothing.

    candidates: with predictions; what they already list as `broken` (node capacity, say) stays and rules them out.
    explain: one more sentence about the chosen one. Ties: fewer leases, lower p99, then the order of the configuration's text.
    """
    judged = [replace(c, broken=(*c.broken, *broken_limits(c.predictions, limits))) for c in candidates]
    qualified = sorted((c for c in judged if not c.broken), key=_rank)
    chosen = qualified[0] if qualified else None
    ruled_out = [c for c in judged if c.broken]
    if chosen is not None:
        ruled_out += [replace(c, broken=(_dearer(c, chosen),)) for c in qualified[1:]]
        why = f"{describe(chosen.configuration)} is the cheapest of {len(candidates)} that meets the goal, at {_usd(chosen)}."
        why = " ".join(part for part in (why, explain(chosen)) if part)
    else:
        why = _nearest(judged)
    return Recommendation(
        id=id,
        run_id=run_id,
        stage=stage,
        goal=goal,
        chosen=chosen,
        ruled_out=tuple(sorted(ruled_out, key=_rank)),
        trials=tuple(trials),
        why=why,
        thin=thin,
        at_s=now_s,
    )


def broken_limits(predictions: Mapping[str, Prediction], limits: Sequence[Limit]) -> tuple[Broken, ...]:
    """Return the limits that these predictions do not surely meet. A metric without a prediction meets nothing."""
    broken = []
    for limit in limits:
        prediction = predictions.get(limit.metric)
        if prediction is None:
            reason = f"{limit.metric} was not measured, so that nothing is known about {show(limit.metric, limit.value)}"
            broken.append(Broken(constraint=limit.metric, limit=limit.value, found=0.0, reason=reason))
            continue
        found = prediction.value
        if limit.by_interval:
            found = prediction.low if limit.at_least else prediction.high
        if (found < limit.value) if limit.at_least else (found > limit.value):
            broken.append(
                Broken(constraint=limit.metric, limit=limit.value, found=found, reason=_reason(limit, prediction, found))
            )
    return tuple(broken)


def capacity_broken(parts: Sequence[tuple[int, Envelope]], capacity: Capacity) -> tuple[Broken, ...]:
    """Return what these leases together need beyond the node: (how many, envelope) each, all on one node."""
    cpus = sum(count * envelope.cpus for count, envelope in parts)
    memory_bytes = sum(count * envelope.memory_bytes for count, envelope in parts)
    disk_bytes = sum(count * envelope.disk_bytes for count, envelope in parts)
    broken = []
    if cpus > capacity.cpus + 1e-9:
        reason = f"needs {cpus:g} cpus together; the node has {capacity.cpus:g}"
        broken.append(Broken(constraint=NODE_CAPACITY, limit=capacity.cpus, found=cpus, reason=reason))
    for found, limit, word in (
        (memory_bytes, capacity.memory_bytes, "memory"),
        (disk_bytes, capacity.disk_bytes or disk_bytes, "disk"),
    ):
        if found > limit:
            reason = f"needs {show_bytes(found)} of {word} together; the node has {show_bytes(limit)}"
            broken.append(Broken(constraint=NODE_CAPACITY, limit=float(limit), found=float(found), reason=reason))
    return tuple(broken)


def describe(configuration: Configuration) -> str:
    """Return a configuration in one line, e.g. ``workers 2, cpus 1``; factors that say nothing are left out."""
    parts = [f"{name} {level:g}" if isinstance(level, float) else f"{name} {level}" for name, level in configuration.items()]
    return ", ".join(part for part in parts if not part.endswith((" none", " in-process")))


def show(metric: str, value: float) -> str:
    """Return a value for people, with the unit that the metric's name ends in."""
    if metric.endswith("_bytes"):
        return show_bytes(value)
    if metric.endswith("_per_s"):
        text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
        return f"{text} {metric.removesuffix('_per_s')}/s"
    if metric.endswith("_usd"):
        return f"{value:.3g} USD"
    if metric.endswith("_s"):
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.4g} s"
    return f"{value:.4g}"


def _reason(limit: Limit, prediction: Prediction, found: float) -> str:
    bound = "at least" if limit.at_least else "at most"
    text = f"{limit.metric} must be {bound} {show(limit.metric, limit.value)}; predicted {show(limit.metric, prediction.value)}"
    return text if found == prediction.value else f"{text}, and it may be {show(limit.metric, found)}"


def _rank(candidate: Candidate) -> tuple[float, int, float, str]:
    cost, p99 = candidate.predictions.get("cost_usd"), candidate.predictions.get("p99_s")
    cost_usd = cost.value if cost else float("inf")
    return (cost_usd, candidate.leases, p99.value if p99 else 0.0, describe(candidate.configuration))


def _usd(candidate: Candidate) -> str:
    cost = candidate.predictions.get("cost_usd")
    return show("cost_usd", cost.value) if cost else "unknown cost"


def _dearer(candidate: Candidate, chosen: Candidate) -> Broken:
    cost, least = candidate.predictions.get("cost_usd"), chosen.predictions.get("cost_usd")
    found, limit = (cost.value if cost else float("inf")), (least.value if least else 0.0)
    if found == limit:
        reason = f"meets the goal, but costs as much as {describe(chosen.configuration)}, which is no worse otherwise"
    else:
        reason = f"meets the goal, but costs {_usd(candidate)}; {describe(chosen.configuration)} costs {_usd(chosen)}"
    return Broken(constraint="cost_usd", limit=limit, found=found, reason=reason)


def _nearest(judged: Sequence[Candidate]) -> str:
    if not judged:
        return "Nothing was measured that could be chosen."

    def miss(candidate: Candidate) -> float:
        return sum(abs(b.found - b.limit) / max(abs(b.limit), 1e-12) for b in candidate.broken)

    nearest = min(judged, key=lambda candidate: (miss(candidate), _rank(candidate)))
    reasons = "; ".join(broken.reason for broken in nearest.broken)
    return f"None of {len(judged)} meets the goal. Nearest is {describe(nearest.configuration)}: {reasons}."
