"""Which request rate to try next, and when to stop, to find the highest one that meets a latency goal.

A decider: it is told what each probe (a run at one rate) gave, and names the next one. Short glances say which way a rate
leans, on the way up and then between; only a rate next to the edge is worth a proof. A rate counts as met or missed only when
that is proven; probes of one rate add up, and looking again after each of them costs no certainty, because the proof is a test
martingale (mixture likelihood ratio; Robbins 1970, Ville's inequality), not a percentile compared with a limit. All rates share
the search's error. A rate at the very edge would stay open however long one looks: it gets a bounded number of requests, fewer
when they show that they won't do, and the search goes on below it. Weighed and rejected: plain bisection by one run each, as
other tools search, which near the edge is a coin toss per step and never comes back from a wrong one.
Not here: sending anything, and whether a run was honest (`serve.load.judge`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.special import betainc, betaln

from tenure.decide.verdicts import LatencyGoal
from tenure.errors import SpecError

MAX_INVALID = 3
"""Invalid probes of one rate until it counts as more than the generator can offer."""
GROWTH = 2.0
"""From a met rate to the next while none is missed, and back."""

_COARSE = 0.12
"""Gap between a rate that leans to "met" and one that leans to "missed" from which on the lower one is worth proving."""
_GLANCE = 2.0
"""Requests over the limit, were the goal just met, of the smallest probe."""
_DOUBT = 1.0
"""Standard errors by which the share seen may be off, in favour of going on, when a rate's outlook is judged."""

State = Literal["met", "missed", "open", "beyond"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSearch:
    """What is looked for, and what it may cost."""

    goal: LatencyGoal
    start_per_s: float
    """The first rate tried: a guess."""
    min_per_s: float = 0.1
    max_per_s: float = 1e6
    resolution: float = 0.05
    """Stop when the lowest rate not met is at most so much above the highest one met, relative."""
    confidence: float = 0.95
    """That no rate called met misses the goal and none called missed meets it, over the whole search."""
    least_s: float = 5.0
    """A probe lasts so long at least: a queue needs time to show."""
    most_s: float = 60.0
    """All probes of one rate last so long at most, or as long as four of the smallest possible proofs take if that is longer.
    A rate that is not decided by then, or shows before that it won't be, stays open."""
    max_rates: int = 30

    def __post_init__(self) -> None:
        if not 0 < self.min_per_s <= self.start_per_s <= self.max_per_s < math.inf:
            raise SpecError(
                "a rate search needs 0 < min_per_s <= start_per_s <= max_per_s; found "
                f"{self.min_per_s!r}, {self.start_per_s!r} and {self.max_per_s!r}"
            )
        if not (0.001 <= self.resolution <= 1 and 0.5 <= self.confidence < 1):
            raise SpecError(
                f"resolution is 0.001 to 1, confidence 0.5 to below 1; found {self.resolution!r} and {self.confidence!r}"
            )
        if not 0 <= self.least_s <= self.most_s < math.inf or self.max_rates < 2:
            found = f"{self.least_s!r}, {self.most_s!r} and {self.max_rates!r}"
            raise SpecError(f"0 <= least_s <= most_s and max_rates >= 2 are needed; found {found}")

    @property
    def proof(self) -> float:
        """Evidence (logarithm of a likelihood ratio) that proves one rate, the error shared by all rates and both sides."""
        return math.log(2 * self.max_rates / (1 - self.confidence))

    @property
    def least_requests(self) -> int:
        """Requests that prove a rate met when none of them is over and each counts for itself."""
        high = 1
        while evidence(high, 0, self.goal.over_share)[0] < self.proof:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if evidence(middle, 0, self.goal.over_share)[0] >= self.proof else (middle, high)
        return high

    def most_requests(self, rate_per_s: float) -> int:
        """Return how many requests one rate is worth."""
        return max(4 * self.least_requests, math.ceil(rate_per_s * self.most_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one run at one rate gave."""

    rate_per_s: float
    """As it was asked for."""
    requests: int
    over: int
    """Those over the goal's limit, or not answered rightly."""
    clustering: float = 1.0
    """Requests that count as one independent one (`verdicts.clustering_of`)."""
    invalid: str = ""
    """Why the run can't be trusted; its counts are then left out."""

    def __post_init__(self) -> None:
        if not (self.rate_per_s > 0 and 0 <= self.over <= self.requests and self.clustering >= 1):
            raise SpecError(f"a probe needs a rate above 0, 0 <= over <= requests and clustering >= 1; found {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What to do now, and what is known so far."""

    rate_per_s: float
    """To try next; 0 when done."""
    requests: int
    """To send at it; 0 when done."""
    met_per_s: float
    """Highest rate proven to meet the goal, below all that miss it; 0: none."""
    missed_per_s: float
    """Lowest rate proven to miss it; infinite: none."""
    open_per_s: tuple[float, ...] = ()
    """Rates between them at which so many requests prove neither: the edge, as near as it can be seen."""
    why: str = ""
    """Why the search is done; empty while it is not."""

    @property
    def done(self) -> bool:
        """Return whether nothing is left to try."""
        return bool(self.why)


def next_step(search: RateSearch, probes: Sequence[Probe]) -> Step:
    """Return which rate to try next, or that the search is done, from all probes so far in any order."""
    told: dict[float, list[Probe]] = {}
    for probe in probes:
        told.setdefault(probe.rate_per_s, []).append(probe)
    rates = {rate: _Rate.of(search, rate, found) for rate, found in told.items()}
    missed = min((rate for rate, one in rates.items() if one.state == "missed"), default=math.inf)
    met = max((rate for rate, one in rates.items() if one.state == "met" and rate < missed), default=0.0)
    closed = [rate for rate, one in rates.items() if rate > met and (one.state in ("missed", "beyond") or one.spent)]
    ceiling = min(closed, default=math.inf)
    waiting = [one for rate, one in rates.items() if one.state == "open" and met < rate < ceiling]
    above = min((one.rate_per_s for one in waiting if one.leans_missed), default=ceiling)
    below = max((one.rate_per_s for one in waiting if one.rate_per_s < above and one.sent), default=met)
    edge = tuple(sorted(r for r, one in rates.items() if one.spent and met < r < missed))
    if above < ceiling:
        edge = (above, *(rate for rate in edge if rate != above))

    def step(rate: float, requests: int) -> Step:
        return Step(rate_per_s=rate, requests=requests, met_per_s=met, missed_per_s=missed, open_per_s=edge)

    def look(rate: float) -> Step:
        return step(rate, _glance(search, rate))

    def prove(rate: float) -> Step:
        return step(rate, _proof(search, rates[rate]))

    retried = [one.rate_per_s for one in waiting if not one.sent]  # so far only by runs that can't be trusted
    if retried:
        return look(min(retried))
    if met < search.max_per_s and len(rates) < search.max_rates:
        if math.isinf(above) and below < search.max_per_s:
            return look(min(search.max_per_s, max(below * GROWTH, search.start_per_s)))
        if not below and above > search.min_per_s:
            return look(max(search.min_per_s, above / GROWTH))
        gap = search.resolution if below == met else max(search.resolution, _COARSE)
        if below and below * (1 + gap) < above < math.inf:
            return look(math.sqrt(below * above))
    if below > met:
        return prove(below)
    if above < ceiling and not rates[above].settled:
        return prove(above)
    return replace(step(0.0, 0), why=_reason(search, met, above, missed, ceiling, rates))


def evidence(requests: float, over: float, share: float) -> tuple[float, float]:
    """Return how strongly counts speak against a goal being missed, and against it being met: logarithms of test martingales.

    share: of requests that may be over. Each exceeds log(1 / a) in at most a share a of endless runs in which what it
    speaks against is true, however often one looks. Counts may be fractions (shared out by `clustering`).
    """
    prior_over, prior_within = 1.0, 1.0 / share  # a spread-out guess whose mean is about the share itself
    a, b = prior_over + over, prior_within + requests - over
    known = over * math.log(share) + (requests - over) * math.log1p(-share)
    mixed = float(betaln(a, b) - betaln(prior_over, prior_within)) - known
    below, below_prior = (float(betainc(x, y, share)) for x, y in ((a, b), (prior_over, prior_within)))
    above, above_prior = (float(betainc(y, x, 1 - share)) for x, y in ((a, b), (prior_over, prior_within)))
    return tuple(  # type: ignore[return-value]
        mixed + math.log(part) - math.log(prior) if part > 0 else -math.inf
        for part, prior in ((below, below_prior), (above, above_prior))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rate:
    """What all probes of one rate say together."""

    rate_per_s: float
    state: State
    sent: int
    """Requests of its valid probes."""
    spent: bool
    """Open, and not worth another probe: it has had its requests, or they would not decide it if they go on as before."""
    leans_missed: bool
    """More than the goal's share were over so far."""
    settled: bool
    """It leans to "missed" by more than chance does, which is enough to look for the edge below it."""

    @classmethod
    def of(cls, search: RateSearch, rate: float, probes: Sequence[Probe]) -> _Rate:
        """Add up."""
        valid = [probe for probe in probes if not probe.invalid]
        sent, share = sum(probe.requests for probe in valid), search.goal.over_share
        requests = sum(probe.requests / probe.clustering for probe in valid)
        over = sum(probe.over / probe.clustering for probe in valid)
        against_missed, against_met = evidence(requests, over, share)
        state: State = "met" if against_missed >= search.proof else "missed" if against_met >= search.proof else "open"
        if len(probes) - len(valid) >= MAX_INVALID:
            state = "beyond"
        most, error = search.most_requests(rate), math.sqrt(over + 1)
        outlook = max(_per_request((over + side * _DOUBT * error) / (requests + 1), share) for side in (-1, 1))
        hopeless = requests * most < search.proof * sent / max(outlook, 1e-300) if sent >= search.least_requests else False
        return cls(
            rate_per_s=rate,
            state=state,
            sent=sent,
            spent=state == "open" and (sent >= most or hopeless),
            leans_missed=over > requests * share,
            settled=over - requests * share > error,
        )


def _per_request(seen: float, share: float) -> float:
    """Return the evidence that each request brings when a share `seen` is over (Kullback-Leibler)."""
    seen = min(max(seen, 1e-12), 1 - 1e-12)
    return seen * math.log(seen / share) + (1 - seen) * math.log((1 - seen) / (1 - share))


def _glance(search: RateSearch, rate: float) -> int:
    """Return the size of a probe that is to show which way a rate leans."""
    return min(search.most_requests(rate), max(math.ceil(_GLANCE / search.goal.over_share), math.ceil(rate * search.least_s)))


def _proof(search: RateSearch, rate: _Rate) -> int:
    """Return the size of a probe that is to prove a rate: what may do, then as many as there were before."""
    wanted = max(search.least_requests - rate.sent, math.ceil(rate.rate_per_s * search.least_s), rate.sent)
    return max(1, min(wanted, search.most_requests(rate.rate_per_s) - rate.sent))


def _reason(search: RateSearch, met: float, above: float, missed: float, ceiling: float, rates: Mapping[float, _Rate]) -> str:
    """Return why the search is done."""
    if met >= search.max_per_s:
        return f"{met:g}/s meets {search.goal}, and no higher rate was to be tried"
    if not met and above <= search.min_per_s:
        return f"not even {search.min_per_s:g}/s meets {search.goal}, or that could not be told"
    if met and above <= met * (1 + search.resolution):
        beyond = above in rates and rates[above].state == "beyond"
        what = "misses it" if above == missed else "is more than the generator can offer" if beyond else "stays open"
        return f"{met:g}/s meets {search.goal} and {above:g}/s {what}"
    return f"{len(rates)} rates were tried, as many as were allowed"
