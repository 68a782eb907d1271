"""An event: something that happened, who did it, why and when. Append-only; deciders fold them into their state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One fact of the ledger.

    kinds: ``lease.<state>``, ``lease.renewed``, ``lease.started`` (an attempt's process runs), ``lease.exited``;
    ``node.up``, ``node.draining``, ``node.unreachable``, ``node.lost``, ``node.removed``; ``run.<state>``,
    ``stage.<state>``; ``invoked``; ``broker.started``; ``policy.set``. Of a lease that goes on: ``lease.expiring``,
    ``lease.gives_way``, ``lease.idle``, ``lease.shrunk``, ``lease.grown``; of one that was preempted and is asked for again:
    ``lease.resumed``.
    ``lease.*`` and ``invoked`` carry the whole lease in `data["lease"]`, so that a state can be rebuilt from events alone.
    """

    seq: int
    """Position in the ledger, from 1, without gaps within one broker."""
    at_s: float
    kind: str
    who: str
    """``broker``, ``agent:<node>`` or ``tenant:<name>``."""
    why: str = ""
    run_id: str = ""
    stage: str = ""
    lease_id: str = ""
    node: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
