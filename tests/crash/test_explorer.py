"""A sample of the crash explorer: every kind of effect is hooked, dangerous kills violate nothing, the oracle sees.

All kills, at every point, in pairs: `python -m benchmarks crash_points`.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict

import pytest
from tests.crash.explorer import ROLES, Kill, Plan, Tally, answered_first, campaign, explore, unfenced

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

KINDS = {
    "client": {"link", "lock", "mkdir", "open", "send", "start", "unlink"},
    "broker": {"commit", "lock", "mkdir", "open", "part", "replace", "send", "start", "unlink", "write"},
    "agent": {"fsync", "lock", "mkdir", "open", "rename", "rmdir", "send", "signal", "start", "unlink", "write"},
    "forkserver": {"send", "start"},
    "shim": {"fsync", "mkdir", "open", "rename", "rmdir", "send", "signal", "start", "write"},
    "job": {"exec", "open", "start", "write"},
}
"""What each role does to the world in the scenario. One that is missing is no longer hooked, or no longer met."""

DANGEROUS = (
    r"broker\|commit\|before\|.*op_request_gang",
    r"broker\|commit\|after\|.*op_request_gang",
    r"broker\|commit\|after\|.*_go_on",
    r"broker\|commit\|before\|.*ended",
    r"broker\|commit\|after\|.*ended",
    r"broker\|commit\|after\|.*op_resize",
    r"broker\|send start\|before",
    r"broker\|send start\|after",
    r"broker\|send answer request_gang\|after",
    r"broker\|start\|after\|.*start_agent",
    r"agent\|send\|before\|.*forkserver",
    r"agent\|send\|after\|.*forkserver",
    r"agent\|rename\|after\|.*_prepare",
    r"agent\|send answer start\|before",
    r"agent\|unlink\|after\|.*forget",
    r"forkserver\|start\|after",
    r"shim\|rename\|after\|.*_start",
    r"shim\|rename\|before\|.*write_record",
    r"shim\|rename\|after\|.*write_record",
    r"client\|send request_gang\|after",
)
"""Where a step is taken and not yet told, or told and not yet taken. The first recorded point that fits is used."""


@pytest.fixture(scope="module")
def undisturbed():
    return explore(Plan())


def fault(undisturbed, pattern: str, how: str = "kill") -> Plan:
    found = [point for point in sorted(undisturbed.hits) if re.match(pattern, point)]
    assert found, f"no recorded point fits {pattern}"
    return Plan(kills=(Kill(found[0], max(1, undisturbed.hits[found[0]] // 2), how=how),))


def run(plans: list[Plan]) -> Tally:
    return campaign(plans, None, side_by_side=max(2, os.cpu_count() or 1))


def test_an_undisturbed_run_meets_every_role_and_kind_of_effect_and_violates_nothing(undisturbed) -> None:
    assert not undisturbed.violations
    met = defaultdict(set)
    for point in undisturbed.hits:
        role, kind = point.split("|")[:2]
        met[role].add(kind.split(" ")[0])
    assert set(met) == set(ROLES)
    assert {role: kinds - met[role] for role, kinds in KINDS.items() if kinds - met[role]} == {}


def test_a_kill_at_any_of_the_most_dangerous_points_violates_nothing(undisturbed) -> None:
    tally = run([fault(undisturbed, pattern) for pattern in DANGEROUS])
    assert tally.violations == []
    assert tally.fired >= 0.8 * tally.runs, "too many kills did not happen: the sample says little"


def test_a_cut_stream_a_broker_that_stands_still_and_a_slow_disk_change_nothing(undisturbed) -> None:
    cut = fault(undisturbed, r"agent\|send answer start\|before", "cut")
    stall = fault(undisturbed, r"broker\|send start\|before", "stall")
    tally = run([cut, stall, Plan(fsync_s=0.05)])
    assert tally.violations == []
    assert tally.fired == 3


def test_the_oracle_notices_a_broker_that_answers_before_its_changes_are_on_disk(undisturbed) -> None:
    assert {violation["kind"] for violation in run(answered_first(undisturbed.hits)[:1]).violations} == {"lost lease"}


def test_the_oracle_notices_agents_that_obey_a_dead_brokers_order_and_nothing_where_they_look_at_fences(undisturbed) -> None:
    without = unfenced(undisturbed.hits)[0]
    late = Plan(kills=without.kills, linger_s=without.linger_s)
    found = run([without, late]).violations
    assert {violation["kind"] for violation in found} == {"double grant"}
    assert {violation["plan"] for violation in found} == {without.describe()}
