"""What a search over serving settings says: the choice and how sure it is, and what stands against every other setting."""

from __future__ import annotations

from collections.abc import Sequence

from tenure.decide.serve_search import CONFIDENCE, WITHIN, Advice, Outlook
from tenure.jobs import ServeGoal
from tenure.trials import Broken, Candidate, Configuration, Prediction

from .choose import show

PER_IMAGE = "million_images_usd"
"""What is least where a goal names no rate, and the cheapest is asked for."""
WORTH_TELLING = 0.05
"""Chance of being better, from which on a setting that was not measured is told of as one that may be."""
_TOLD = ("images_per_s", "p99_s", "memory_bytes", "cost_usd", PER_IMAGE)
_BOUNDS = {"p99_s": "at most", "images_per_s": "at least", "memory_bytes": "at most"}


def words(configuration: Configuration) -> str:
    """Return a setting in one line, e.g. ``microservice shm async, batch 8, 2 instances x 1 thread, delay 3 ms``."""
    how = [str(configuration.get(name, "")) for name in ("architecture", "transport", "interaction")]
    parts = [" ".join(word for word in how if word and word != "none"), f"batch {configuration.get('batch', 1)}"]
    if "instances" in configuration and "threads" in configuration:
        parts.append(f"{_many(configuration['instances'], 'instance')} x {_many(configuration['threads'], 'thread')}")
    if delay_s := float(configuration.get("max_delay_s", 0.0)):
        parts.append(f"delay {delay_s * 1e3:g} ms")
    if (clients := configuration.get("clients", 1)) != 1:
        parts.append(f"{clients} clients")
    return ", ".join(parts)


def goal_words(described: str, goal: ServeGoal, *, by_cost: bool) -> str:
    """Return the goal in one line with what is best among settings that meet it. described: as `describe_goal` has it."""
    if by_cost:
        return described
    bounds = described.removesuffix(", at the least cost")
    return bounds if bounds.startswith("the most images/s") else f"{bounds}, and then the most images/s"


def predictions(found: Outlook) -> dict[str, Prediction]:
    """Return what is plausible of a setting as predictions, with the same 90 % intervals."""
    told = {name: found.metrics[name] for name in _TOLD if name in found.metrics}
    return {name: Prediction(value=middle, low=low, high=high) for name, (low, middle, high) in told.items()}


def candidate(found: Outlook, broken: Sequence[Broken]) -> Candidate:
    """Return a setting as a candidate, without its leases."""
    return Candidate(configuration=found.configuration, predictions=predictions(found), broken=tuple(broken))


def why(
    chosen: Outlook | None, outlooks: Sequence[Outlook], advice: Advice, goal: ServeGoal, *, aimed: str, count: int, left: int
) -> str:
    """Return the choice, what it gives and how sure that is.

    aimed: the metric that is best. count: settings of the space. left: how many are not told of one by one.
    """
    trials = sum(one.trials for one in outlooks)
    measured = sum(one.trials > 0 for one in outlooks)
    tried = f"{_many(trials, 'trial')} of {measured} of {_many(count, 'setting')}"
    rest = (
        f" {_many(left, 'further setting')} that {'was' if left == 1 else 'were'} not measured promise less."
        if left > 0
        else ""
    )
    if chosen is None:
        nearest = max((one for one in outlooks if one.trials), key=lambda one: (one.meets, -_excess(one, goal)), default=None)
        if nearest is None:
            return f"Nothing was measured that could be chosen.{rest}"
        return (
            f"None of {tried} showed one that may meet the goal. Nearest is {words(nearest.configuration)}: "
            f"{_reason(nearest, goal)}.{rest}"
        )
    best = "cheapest" if aimed != "images_per_s" else "fastest"
    gives = [f"{interval(chosen, 'images_per_s')}", f"p99 {interval(chosen, 'p99_s')}"]
    if aimed != "images_per_s":
        gives.append(f"{interval(chosen, aimed)} {'for an hour' if aimed == 'cost_usd' else 'for a million images'}")
    return (
        f"{words(chosen.configuration)} is the {best} that meets the goal: {', '.join(gives)}. After {tried} it is within "
        f"{WITHIN:.0%} of the best there is with a chance of {_chance(advice.chance)}.{rest}"
    )


def thin(advice: Advice, *, found: bool, spent: bool) -> str:
    """Return what a reader must know of an answer that is not sure; empty when it is. spent: all trials were made."""
    if advice.chance >= CONFIDENCE or not found:
        return ""
    more = "more trials may find one (trials in [serve.search], --trials)" if spent else "the search ended early"
    return f"a setting that is better by more than {WITHIN:.0%} is left with a chance of {1 - advice.chance:.0%}; {more}"


def against(one: Outlook, chosen: Outlook | None, goal: ServeGoal, *, aimed: str) -> Broken:
    """Return what stands against a setting: a bound that it probably breaks, or that it is not better than the choice."""
    if any(chance > 0.5 for chance in one.breaks.values()) or chosen is None:
        metric = max(one.breaks, key=lambda name: one.breaks[name], default="images_per_s")
        bound = float(getattr(goal, metric, 0.0))
        return Broken(constraint=metric, limit=bound, found=one.metrics[metric][1], reason=_reason(one, goal))
    limit, found = chosen.metrics[aimed][1], one.metrics[aimed][1]
    if one.better >= WORTH_TELLING:
        reason = f"{_how(one)} {interval(one, aimed)}: may be better than the choice, with a chance of {one.better:.0%}"
    else:
        what = "slower" if aimed == "images_per_s" else "dearer"
        same = abs(found / limit - 1) < WITHIN
        apart = (
            "no better than the choice" if same or (found > limit) == (aimed == "images_per_s") else f"{what} than the choice"
        )
        reason = f"{_how(one)} {interval(one, aimed)}: {apart}, which has {interval(chosen, aimed)}"
    return Broken(constraint=aimed, limit=limit, found=found, reason=reason)


def interval(one: Outlook, metric: str) -> str:
    """Return what is plausible of one metric, e.g. ``212 images/s (205 to 220)``."""
    low, middle, high = (show(metric, value) for value in one.metrics[metric])
    unit = middle.partition(" ")[2]
    if unit and low.endswith(unit) and high.endswith(unit):
        low, high = low.removesuffix(unit).strip(), high.removesuffix(unit).strip()
    return f"{middle} ({low} to {high})"


def _reason(one: Outlook, goal: ServeGoal) -> str:
    """Return which bounds a setting breaks, the likeliest first."""
    broken = sorted((name for name in one.breaks if one.breaks[name] > 0.5), key=lambda name: -one.breaks[name])
    broken = broken or sorted(one.breaks, key=lambda name: -one.breaks[name])[:1]
    parts = [
        f"{name} {interval(one, name)} where {_BOUNDS[name]} {show(name, float(getattr(goal, name)))} is asked"
        for name in broken
    ]
    return f"{_how(one)} {' and '.join(parts)}" if parts else f"{_how(one)} nothing that could be judged"


def _how(one: Outlook) -> str:
    return f"measured {one.trials} times:" if one.trials > 1 else "measured:" if one.trials else "not measured, by the laws:"


def _excess(one: Outlook, goal: ServeGoal) -> float:
    """Return by which factor the worst bound is missed."""
    factors = {name: one.metrics[name][1] / getattr(goal, name) for name in one.breaks}
    return max((1 / factor if name == "images_per_s" else factor for name, factor in factors.items()), default=1.0)


def _chance(chance: float) -> str:
    """Return a chance in percent; draws are too few to tell certainty."""
    return "more than 99%" if chance > 0.99 else f"{chance:.0%}"


def _many(count: object, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
