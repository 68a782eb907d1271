"""A server whose renewal is refused goes on to the end of its slot."""

from __future__ import annotations

from types import SimpleNamespace

from tenure.errors import Refused
from tenure.experiments.stage_serve import _held
from tenure.leases import LeaseState
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope
from tenure.usage import Usage


def test_a_server_whose_renewal_is_refused_serves_to_the_end_of_its_slot() -> None:
    asked = []

    def renew(lease_id: str, for_s: float) -> None:
        asked.append(for_s)
        raise Refused("it is others' turn")

    lease = SimpleNamespace(state=LeaseState.ACTIVE, ends_at_s=10.0, total_ends_at_s=100.0)
    client = SimpleNamespace(lease=lambda lease_id: SimpleNamespace(lease=lease), renew=renew)
    ends = iter([None, None, Exit(kind=ExitKind.OUT_OF_TIME)])
    times = iter([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    context = SimpleNamespace(progress=lambda text: None, client=client, clock=SimpleNamespace(boot_s=lambda: next(times, 1.0)))
    server = SimpleNamespace(lease_id="l", usage=lambda: Usage(at_s=0.0), wait=lambda timeout_s: next(ends))
    assert _held(context, server, Envelope(slot_s=40.0), "serving").kind is ExitKind.OUT_OF_TIME  # type: ignore[arg-type]
    assert asked
