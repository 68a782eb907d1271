"""Predicted against observed: one row per metric, and a plain word where the prediction missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tenure.trials import Prediction
from tenure.usage import Summary

from .choose import show

MISSED = 0.25
"""Relative miss above which a prediction is said to have missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric predicted and observed."""

    metric: str
    predicted: float
    low: float
    high: float
    observed: float
    miss: float
    """(observed - predicted) / observed; 0 when both are 0, infinite when only the observed value is."""
    inside: bool
    """The observed value lies in the interval."""
    missed: bool
    """|miss| is above 25 %."""

    @property
    def sentence(self) -> str:
        """The row in words, for the report."""
        seen, told = show(self.metric, self.observed), show(self.metric, self.predicted)
        if not self.missed:
            return f"{self.metric}: predicted {told}, observed {seen} ({self.miss:+.0%})."
        where = "inside" if self.inside else "outside"
        text = f"{self.metric} missed by more than 25 %: predicted {told}, observed {seen} ({self.miss:+.0%})"
        return f"{text}, {where} the interval."


def compare(predictions: Mapping[str, Prediction], observed: Mapping[str, Summary | float]) -> tuple[Comparison, ...]:
    """Return a row for each metric that was both predicted and observed, in the order of the predictions."""
    rows = []
    for metric, prediction in predictions.items():
        if metric not in observed:
            continue
        found = observed[metric]
        value = found.mean if isinstance(found, Summary) else float(found)
        off = value - prediction.value
        miss = off / abs(value) if value else (0.0 if off == 0 else float("-inf"))
        rows.append(
            Comparison(
                metric=metric,
                predicted=prediction.value,
                low=prediction.low,
                high=prediction.high,
                observed=value,
                miss=miss,
                inside=prediction.low <= value <= prediction.high,
                missed=abs(miss) > MISSED,
            )
        )
    return tuple(rows)
