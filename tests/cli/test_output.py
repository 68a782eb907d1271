"""What commands print: tables for people, JSON for programs."""

import json
from pathlib import Path

from tenure.cli import output
from tenure.events import Event
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, Envelope
from tenure.retention import Freed
from tenure.runs import Run, Stage
from tenure.trials import Broken, Candidate, Prediction, Recommendation, Trial
from tenure.usage import summarize

MACHINE = Machine(cpu_model="Fast 3000", cores=2)
LEASE = Lease(
    id="l-1",
    run_id="r-1",
    stage="train",
    worker=1,
    envelope=Envelope(memory_bytes=64 << 20),
    command=Command(argv=("python",)),
    state=LeaseState.ENDED,
    node="local",
    starts_at_s=1.0,
    ended_at_s=3.0,
    end_reason=EndReason.OUT_OF_MEMORY,
)


def test_tables_align_their_columns_and_never_break_a_row():
    text = output.table(("A", "LONGER"), [("a long cell", "x"), ("b", "two\nlines")], empty="none")
    assert text.splitlines() == ["A            LONGER", "a long cell  x", "b            two lines"]
    assert output.table(("A",), [], empty="none") == "none"


def test_control_characters_never_reach_the_terminal():
    assert output.clean("a\x1b[2Jb\u202ec") == "a�[2Jb�c"


def test_a_lease_row_shows_who_holds_what_and_how_it_ended():
    text = output.leases_table([LEASE])
    assert "train/1" in text
    assert "ended (out_of_memory)" in text
    assert "64.0 MiB" in text
    assert "1970-01-01 00:00:03" in text


def test_every_noun_has_a_table_and_a_json_line():
    run = Run(
        id="r-1", name="digits", tenant="default", job_file="", source="x.toml", stages=(Stage(name="train", kind="train"),)
    )
    event = Event(seq=7, at_s=1.0, kind="lease.ended", who="broker", why="told to", lease_id="l-1")
    node = Node(name="local", capacity=Capacity(cpus=2, memory_bytes=1 << 30), machine=MACHINE)
    trial = Trial(
        id="t-1",
        run_id="r-1",
        stage="train",
        fingerprint="f",
        source="probe",
        configuration={"workers": 2, "cpus": 0.5},
        metrics={"round_s": summarize([1.0, 2.0, 3.0])},
        machine=MACHINE,
    )
    assert "digits" in output.runs_table([run])
    assert "train pending" in output.runs_table([run])
    assert "lease.ended" in output.events_table([event])
    assert "Fast 3000" in output.nodes_table([node])
    assert "workers=2 cpus=0.5" in output.trials_table([trial])
    assert "round_s 2±0.58" in output.trials_table([trial])
    parsed = json.loads(output.as_json({"all": (run, event, node, trial, LEASE), "path": Path("/x")}))
    assert parsed["path"] == "/x"
    assert parsed["all"][1]["seq"] == 7
    assert parsed["all"][4]["end_reason"] == "out_of_memory"


def test_what_leases_hold_of_a_node_stands_beside_what_it_has():
    node = Node(
        name="a", capacity=Capacity(cpus=4.0, memory_bytes=8 << 30), machine=MACHINE, held_cpus=1.5, held_memory_bytes=1 << 30
    )
    row = output.nodes_table([node]).splitlines()[1]
    assert "1.5 of 4" in row
    assert "1.0 GiB of 8.0 GiB" in row


def test_what_went_is_told_by_kind_with_its_size_and_the_sum():
    freed = [Freed(kind="whole runs", count=2, size_bytes=3 << 20, names=("r-1", "r-2")), Freed(kind="events", count=9)]
    lines = output.freed_table(freed, dry_run=False).splitlines()
    assert lines[0].split() == ["REMOVED", "COUNT", "SIZE", "WHICH"]
    assert lines[1].split() == ["whole", "runs", "2", "3.0", "MiB", "r-1,", "r-2"]
    assert lines[3].split() == ["together", "3.0", "MiB"]
    assert output.freed_table(freed, dry_run=True).startswith("WOULD GO")


def test_a_recommendation_names_what_was_ruled_out_and_the_constraint_it_broke():
    broken = Broken(constraint="p99_s", limit=0.01, found=0.2, reason="p99 of 200 ms is above 10 ms")
    item = Recommendation(
        id="c-1",
        run_id="r-1",
        stage="serve",
        goal="p99 <= 10 ms",
        chosen=Candidate(
            configuration={"architecture": "simple"},
            envelope=Envelope(),
            predictions={"p99_s": Prediction(value=0.004, low=0.003, high=0.005)},
        ),
        ruled_out=(Candidate(configuration={"architecture": "distributed"}, broken=(broken,)),),
        why="cheapest that meets it",
    )
    text = output.recommendations_text([item])
    assert "lease: architecture=simple, 1 x [1 cpu, 256.0 MiB" in text
    assert "p99_s: 0.004 (90% between 0.003 and 0.005)" in text
    assert "not architecture=distributed: p99 of 200 ms is above 10 ms" in text
    nothing = Recommendation(id="c-2", run_id="r-1", stage="serve", goal="impossible", chosen=None, thin="2 probes only")
    assert "every configuration breaks a constraint" in output.recommendations_text([nothing])
    assert "too little data: 2 probes only" in output.recommendations_text([nothing])
