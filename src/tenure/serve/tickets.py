"""A lane's own records: the ticket of a call, and the batch it was sent in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenure.decide.batching import Waiting
from tenure.serve.plane import Call

if TYPE_CHECKING:
    from tenure.serve.lane import Lane
    from tenure.serve.signature import Form

TOLD, QUEUED, RUNNING = range(3)
"""States of a ticket. TOLD: its door has been told, or does not want to be; an instance may still read its memory."""


class Ticket(Waiting):
    """A call in a lane."""

    __slots__ = ("answer_by_s", "form", "lane", "state")

    def __init__(self, lane: Lane, call: Call, form: Form, *, arrived_at_s: float, timeout_s: float, priority: int) -> None:
        self.lane = lane
        self.request: Call = call
        self.arrived_at_s = arrived_at_s
        self.answer_by_s = arrived_at_s + timeout_s
        queue_timeout_s = lane.options.queue_timeout_s
        self.deadline_s = arrived_at_s + min(queue_timeout_s, timeout_s) if queue_timeout_s else self.answer_by_s
        """When it has waited too long; once it runs, when it has to be answered."""
        if lane.stackable:
            self.rows, self.kind = form.rows, form.kind
        else:  # such calls share a message, not a run
            self.rows, self.kind = 1, None
        self.priority = priority
        self.queued = False
        self.hurried = False
        self.form = form
        self.state = QUEUED


class Batch:
    """Calls that were sent to an instance together."""

    __slots__ = ("began_at_s", "expires_at_s", "number", "slot", "tickets")

    def __init__(self, number: int, slot: int, tickets: list[Ticket], began_at_s: float, expires_at_s: float) -> None:
        self.number = number
        self.slot = slot
        self.tickets = tickets
        self.began_at_s = began_at_s
        self.expires_at_s = expires_at_s
        """The earliest deadline of its calls that have not been told."""
