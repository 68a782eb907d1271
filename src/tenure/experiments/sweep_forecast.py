"""What the trials of the microservice foretell of the distributed ones over a declared link: kept beside what was measured.

A forecast is a curve of the trial, `forecast_images_per_s`: expected, lowest, highest; its note says what bounds it. The laws
are `decide.links`; here the trials that they need are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tenure.decide.links import Connections, exchange, forecast
from tenure.errors import SpecError
from tenure.experiments.sweep import OURS
from tenure.links import DeclaredLink
from tenure.trials import Trial

CURVE = "forecast_images_per_s"
SAME = ("transport", "batch", "data", "runtime", "server")
"""Factors in which the trials that foretell one are as it is."""


def with_forecasts(
    trials: Sequence[Trial],
    link: DeclaredLink,
    *,
    image_bytes: int,
    answer_bytes: int,
    in_flight: Callable[[int], int],
    tcp: Callable[[str, int], Connections],
) -> tuple[Trial, ...]:
    """Return the trials, those over the link with their forecast where others of the same experiment give one.

    image_bytes, answer_bytes: of one image. in_flight: of an asynchronous application, by batch. tcp: see `links.tcp`.
    """
    return tuple(
        _foretold(trial, trials, link, image_bytes, answer_bytes, in_flight, tcp) if _far(trial, link) else trial
        for trial in trials
    )


def _far(trial: Trial, link: DeclaredLink) -> bool:
    factors = trial.configuration
    return bool(link.shapes) and factors.get("architecture") == "distributed" and factors.get("link") == str(link)


def _foretold(
    trial: Trial,
    trials: Sequence[Trial],
    link: DeclaredLink,
    image_bytes: int,
    answer_bytes: int,
    in_flight: Callable[[int], int],
    tcp: Callable[[str, int], Connections],
) -> Trial:
    factors = trial.configuration
    batch, transport = int(factors.get("batch", 1)), str(factors["transport"])
    several = in_flight(batch)
    local = {}
    for other in trials:
        found = other.configuration
        alike = all(found.get(factor) == factors.get(factor) for factor in SAME)
        near = found.get("architecture") == "microservice" and found.get("server") == OURS and not found.get("twin")
        if alike and near:
            local[1 if found.get("interaction") == "sync" else several] = other.metrics["images_per_s"]
    places = 1 if factors.get("interaction") == "sync" else several
    try:
        what = exchange(transport, images=batch, image_bytes=image_bytes, answer_bytes=answer_bytes)
        expected = forecast(link, what, local, places, tcp(transport, places))
    except SpecError as error:
        return replace(trial, note=f"{trial.note} Nothing foretold: {error}.".strip())
    value = expected.images_per_s
    return replace(
        trial,
        curves={**trial.curves, CURVE: (value.value, value.low, value.high)},
        note=f"{trial.note} Foretold bound: {expected.bound}.".strip(),
    )
