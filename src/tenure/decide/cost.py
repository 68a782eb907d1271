"""What a configuration costs: envelope x held time x price vector. The prices themselves are data (`prices`)."""

from __future__ import annotations

from tenure.prices import PriceVector
from tenure.resources import Envelope
from tenure.trials import Prediction


def cost_usd(envelope: Envelope, held_s: float, prices: PriceVector, *, leases: int = 1, starts: int = 0) -> float:
    """Return the cost in USD of holding `leases` equal envelopes for `held_s` seconds each.

    starts: invocations over all leases, for offers that bill them.
    """
    return leases * prices.cost_usd(envelope, held_s) + prices.cost_usd(envelope, 0.0, starts=starts)


def predicted_cost(
    envelope: Envelope, held_s: Prediction, prices: PriceVector, *, leases: int = 1, starts: int = 0
) -> Prediction:
    """Return the cost of a held time that is itself a prediction. Prices count as exact."""
    value, low, high = (
        cost_usd(envelope, time_s, prices, leases=leases, starts=starts) for time_s in (held_s.value, held_s.low, held_s.high)
    )
    return Prediction(value=value, low=low, high=high, level=held_s.level)
