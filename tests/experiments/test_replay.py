"""Replays: traces and nodes read or refused in words, runs kept and not made twice, the best policy named with its evidence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tenure import verbs
from tenure.errors import Conflict, NotFound, SpecError
from tenure.experiments import replay as replays
from tenure.experiments.replay import LEFT_OUT, Replay, parse_policies, run_replay
from tenure.experiments.replay_compare import FILLED, TIMED, answer
from tenure.experiments.replay_figures import jain, of_outcome, quantile, show_time
from tenure.experiments.replay_fill import arrivals, fill_fleet
from tenure.experiments.replay_nodes import load_nodes
from tenure.experiments.replay_trace import load_trace, of_leases
from tenure.experiments.simulator import JobOutcome, Outcome, Policy, Sample
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState
from tenure.resources import Envelope
from tenure.verbs import SilentDisplay

NODES = "name,cpus,memory_bytes,gpus,gpu_model,count\nbig,16,64GiB,4,G1,2\n"
JOBS = "id,tenant,submit_s,gpus,duration_s\n" + "".join(
    f"j{i},{'ab'[i % 2]},{i * 50},{1 + i % 3},{200 + 10 * i}\n" for i in range(30)
)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "nodes.csv").write_text(NODES)
    (tmp_path / "jobs.csv").write_text(JOBS)
    return tmp_path


class Said(SilentDisplay):
    """Keeps what it was told."""

    def __init__(self):
        self.steps, self.warnings = [], []

    def step_done(self, stage, step, closing_line):
        self.steps.append(step)

    def warn(self, text):
        self.warnings.append(text)


def replayed(files, policies=("firstfit", "bestfit"), *, out="out", **more):
    said = Said()
    nodes = more.pop("nodes", files / "nodes.csv")
    trace = more.pop("trace", files / "jobs.csv")
    done = verbs.replay(trace, policies, nodes=nodes, out=files / out, display=said, **more)
    return done, said


# --- traces ---


def write(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_our_own_table_is_read_with_its_defaults_and_the_first_job_comes_at_second_0(tmp_path):
    trace = load_trace(write(tmp_path, "id,submit_s,duration_s,estimate_s,gang,memory_bytes\nb,70,5,9,3,2GiB\na,50,1,,,\n"))
    first, second = trace.jobs
    assert (first.id, first.tenant, first.submit_s, first.members, first.estimate_s) == ("a", "default", 0.0, 1, None)
    assert (second.submit_s, second.members, second.estimate_s, second.envelope.memory_bytes) == (20.0, 3, 9.0, 2 << 30)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "t.csv:1: a line with the names of the columns"),
        ("a,b\n1,2\n", "t.csv:1: no form of a trace has these columns"),
        ("id,submit_s,duration_s,gpu\n", "t.csv:1: column gpu is not known"),
        ("id,submit_s,submit_s,duration_s\n", "t.csv:1: column submit_s is there twice"),
        ("id,submit_s,duration_s\n", "no job that could be replayed"),
        ("id,submit_s,duration_s\na,0,1\nb,1\n", "t.csv:3: 3 cells were expected, as in line 1; found 2"),
        ("id,submit_s,duration_s\na,0,0\n", "t.csv:2: column duration_s: a number above 0 was expected; found '0'"),
        ("id,submit_s,duration_s\na,-1,2\n", "t.csv:2: column submit_s: a number of at least 0"),
        ("id,submit_s,duration_s\na,nan,2\n", "t.csv:2: column submit_s"),
        ("id,submit_s,duration_s\n,0,2\n", "t.csv:2: column id: a value is needed"),
        ("id,submit_s,duration_s\na,0,2\n\na,1,2\n", "t.csv:4: column id: 'a' is in line 2 already"),
        ("id,submit_s,duration_s,gpus\na,0,2,1.5\n", "t.csv:2: column gpus: whole devices, or a part of one"),
        ("id,submit_s,duration_s,gang\na,0,2,0.5\n", "t.csv:2: column gang: a number of at least 1"),
        ("id,submit_s,duration_s,memory_bytes\na,0,2,3GiX\n", "t.csv:2: column memory_bytes: a size was expected"),
        ("id,submit_s,duration_s,memory_bytes\na,0,2,3\n", "t.csv:2: column memory_bytes: at least 1MiB"),
        ("id,submit_s,duration_s,cpus\na,0,2,0\n", "t.csv:2: column cpus: a number above 0"),
    ],
)
def test_what_is_wrong_in_a_trace_is_told_with_line_and_column(tmp_path, text, says):
    with pytest.raises(SpecError) as error:
        load_trace(write(tmp_path, text))
    assert says in str(error.value)


def test_bytes_that_are_no_text_and_a_missing_file_are_told(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"id,\xff\xfe")
    with pytest.raises(SpecError, match="byte 3: UTF-8 text was expected"):
        load_trace(tmp_path / "b.csv")
    with pytest.raises(NotFound, match="does not exist"):
        load_trace(tmp_path / "none.csv")
    with pytest.raises(SpecError, match="is no file"):
        load_trace(tmp_path)


OPENB = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
    "p0,12000,16384,1,1000,,LS,Running,0,100,10\np1,6000,12288,1,460,G2|G1,BE,Running,5,300,\np2,500,100,0,0,,BE,Failed,9,9,9\n"
)


def test_an_openb_pod_list_is_read_with_times_shares_and_models(tmp_path):
    trace = load_trace(write(tmp_path, OPENB))
    assert [(job.id, job.duration_s, job.envelope.gpus) for job in trace.jobs] == [("p0", 90.0, 1.0), ("p1", 295.0, 0.46)]
    assert trace.models == {"p1": ("G1", "G2")}
    assert "without any time between start and end are left out: 1" in trace.notes[0]
    assert len(load_trace(tmp_path / "t.csv", timeless=True).jobs) == 3


def test_an_openb_list_without_times_is_for_placement_alone(files):
    pods = write(files, "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np0,1000,10,1,1000\np1,1000,10,1,500\n", "pods.csv")
    with pytest.raises(SpecError, match="--fill 130"):
        replayed(files, trace=pods)
    done, _ = replayed(files, trace=pods, fill_percent=50.0)
    assert "No difference" in done.answer


def test_phillys_jobs_are_cut_into_equal_members_that_fit_the_largest_node(tmp_path):
    text = "vc,job,model,batch_size,gpus,submit_s,steps,duration_v100_s\nv,0,m,1,12,0,1,5\nv,1,m,1,8,1,1,5\nv,2,m,1,9,2,1,5\n"
    trace = load_trace(write(tmp_path, text), largest_gpus=8)
    assert [(job.members, job.envelope.gpus) for job in trace.jobs] == [(2, 6.0), (1, 8.0), (3, 3.0)]
    assert "gangs of equal members: 2" in trace.notes[1]


def a_lease(name, *, gang="", began_s=10.0, ended_s=40.0, tenant="t", cpus=1.0):
    ended = ended_s > 0
    return Lease(
        id=name,
        run_id="r",
        stage="s",
        gang_id=gang,
        tenant=tenant,
        envelope=Envelope(cpus=cpus),
        command=Command(argv=("x",)),
        state=LeaseState.ENDED if ended else LeaseState.ACTIVE,
        requested_at_s=5.0,
        starts_at_s=began_s,
        ended_at_s=ended_s,
        end_reason=EndReason.COMPLETED if ended else None,
    )


def test_a_ledgers_history_is_its_gangs_that_ran_and_ended():
    leases = [
        a_lease("a", gang="g"),
        a_lease("b", gang="g", ended_s=60.0, cpus=2.0),
        a_lease("c"),
        a_lease("never", began_s=0.0),
        a_lease("live", ended_s=0.0),
    ]
    trace = of_leases(leases)
    assert [(job.id, job.members, job.duration_s, job.envelope.cpus) for job in trace.jobs] == [
        ("g", 2, 50.0, 2.0),
        ("c", 1, 30.0, 1.0),
    ]
    assert trace.notes == (
        "Gangs of the ledger that never ran or have not ended are left out: 2 of 4.",
        "Gangs of unlike members count as their largest: 1.",
    )
    assert "Only the newest 5 leases" in of_leases(leases, max_leases=5).notes[-1]
    with pytest.raises(SpecError, match="no lease that has run and ended"):
        of_leases([a_lease("live", ended_s=0.0)])


# --- nodes ---


def test_nodes_come_from_csv_toml_and_openbs_list_alike(tmp_path):
    toml = '[[nodes]]\nname = "n"\ncpus = 4\nmemory_bytes = "8GiB"\ngpus = 2\ngpu_model = "G1"\n'
    own = "name,cpus,memory_bytes,gpus,gpu_model\nn,4,8GiB,2,G1\n"
    openb = "sn,cpu_milli,memory_mib,gpu,model\nn,4000,8192,2,G1\n"
    found = [
        load_nodes(write(tmp_path, toml, "n.toml")),
        load_nodes(write(tmp_path, own, "n.csv")),
        load_nodes(write(tmp_path, openb, "o.csv")),
    ]
    assert found[0] == found[1] == found[2]
    assert [node.name for node in load_nodes(write(tmp_path, NODES, "m.csv"))] == ["big-0", "big-1"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("n.csv", "name,cpus\n", "lists no node"),
        ("n.csv", "name,cpu\n", "n.csv:1: column cpu is not known; known: name, cpus"),
        ("n.csv", "name,cpus,memory_bytes\na,4,1GiB\na,4,1GiB\n", "lists node 'a' twice"),
        ("n.csv", "name,cpus,memory_bytes\na,0,1GiB\n", "n.csv:2: column cpus: a number above 0"),
        ("n.csv", "name,cpus,memory_bytes,gpus\na,1,1GiB,5000\n", "n.csv:2: column gpus: a node has at most 1024"),
        ("n.csv", "name,cpus,memory_bytes,count\na,1,1GiB,9999999\n", "n.csv:2: column count: at most 200,000"),
        ("n.toml", "[[nodes]]\nname = 3\n\n[[nodes]]\nname = 'b'\n", "n.toml:1: column cpus: a value is needed"),
        ("n.toml", "[[nodes]]\nname = 'b'\ncpu = 3\n", "n.toml:1: column cpu: is not known"),
        ("n.toml", "[[nodes]]\nname = 'b'\ncpus = [3]\n", "n.toml:1: column cpus: a number or a text was expected"),
        ("n.toml", "nodes = 3\n", "tables [[nodes]]"),
        ("n.toml", "nodes = [\n", "n.toml: "),
    ],
)
def test_what_is_wrong_in_a_list_of_nodes_is_told(tmp_path, name, text, says):
    with pytest.raises(SpecError) as error:
        load_nodes(write(tmp_path, text, name))
    assert says in str(error.value)


# --- policies and runs ---


def test_a_policy_is_an_order_a_placement_or_both():
    found = [(one.order, one.placement) for one in parse_policies(["fifo", "fgd", "fair+bestfit", "las", "fgd"], fill=False)]
    assert found == [("fifo", "tenure"), ("fifo", "fgd"), ("fair", "bestfit"), ("las", "tenure")]
    with pytest.raises(SpecError, match=r"'fi'. Orders of the queue: fifo, backfill, las, fair\. Placements: tenure, fgd"):
        parse_policies(["fi"], fill=False)
    with pytest.raises(SpecError, match="nobody waits"):
        parse_policies(["fifo"], fill=True)


def test_orders_of_the_queue_are_tried_beside_each_other(files):
    long = "id,tenant,submit_s,gpus,duration_s\n" + "long,a,0,4,7200\n" * 1
    long += "wide,a,1,4,7200\n" + "".join(f"short{i},b,{10 + i},4,60\n" for i in range(8))
    (files / "jobs.csv").write_text(long)
    done, _ = replayed(files, ("fifo", "fair"), slot_s=600.0)
    found = json.loads(done.json.read_text())["results"]
    assert found["fair"][0]["mean_completion_s"] < 0.5 * found["fifo"][0]["mean_completion_s"]
    assert found["fifo"][0]["restarts"] == 0 < found["fair"][0]["restarts"]
    assert done.answer.startswith("fair comes first")


def test_the_same_replay_gives_the_same_bytes_and_writes_the_page_with_its_figures(files):
    one, _ = replayed(files, seeds=2)
    two, _ = replayed(files, seeds=2, out="again")
    assert one.html.read_bytes() == two.html.read_bytes()
    assert one.json.read_bytes() == two.json.read_bytes()
    page = one.html.read_text()
    assert page.count("<svg ") == 4
    assert "<script" not in page
    assert one.answer in page.replace("&#39;", "'")
    report = json.loads(one.json.read_text())
    assert set(report["results"]) == {"firstfit", "bestfit"}
    assert all(run["completed"] == run["jobs"] for runs in report["results"].values() for run in runs)


def test_a_seed_after_the_first_leaves_some_jobs_out(files):
    done, _ = replayed(files, ("firstfit",), seeds=3)
    counts = [run["jobs"] for run in json.loads(done.json.read_text())["results"]["firstfit"]]
    assert counts[0] == 30
    assert all(30 * (1 - 3 * LEFT_OUT) <= count < 30 for count in counts[1:])


def test_finished_runs_are_not_made_again_and_a_folder_with_some_is_not_overwritten_unasked(files):
    first, said = replayed(files, seeds=2)
    assert len(said.steps) == 4
    with pytest.raises(Conflict, match="--resume"):
        replayed(files, seeds=2)
    (files / "out" / "cells" / "bestfit-1.json").unlink()
    (files / "out" / "cells" / "firstfit-0.json").write_text('{"key"')
    before = first.json.read_bytes()
    again, said = replayed(files, seeds=2, resume=True)
    assert said.steps == ["firstfit, seed 0", "bestfit, seed 1"]
    assert again.json.read_bytes() == before


def test_runs_of_another_trace_other_settings_or_other_code_are_noticed_and_made_again(files, monkeypatch):
    replayed(files)
    (files / "jobs.csv").write_text(JOBS + "late,a,9999,1,5\n")
    _, said = replayed(files, resume=True)
    assert len(said.steps) == 2
    assert said.warnings[0].startswith("the trace changed")
    _, said = replayed(files, resume=True, slot_s=60.0)
    assert said.warnings[0].startswith("the settings changed")
    monkeypatch.setattr(replays, "code_digest", lambda: "other")
    _, said = replayed(files, resume=True, slot_s=60.0)
    assert said.warnings[0].startswith("Tenure's code changed")


def test_a_replay_that_is_interrupted_keeps_what_it_has(files, monkeypatch):
    display, real = Said(), replays.simulate

    def second_is_interrupted(*args, **more):
        if display.steps:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(replays, "simulate", second_is_interrupted)
    fleet, trace = load_nodes(files / "nodes.csv"), load_trace(files / "jobs.csv")
    asked = Replay(trace=trace, fleet=fleet, policies=parse_policies(["firstfit", "bestfit"], fill=False))
    with pytest.raises(KeyboardInterrupt):
        run_replay(asked, files / "out", resume=False, display=display)
    assert "1 of 2 runs are done" in display.warnings[0]
    monkeypatch.setattr(replays, "simulate", real)
    results = run_replay(asked, files / "out", resume=True, display=display)
    assert display.steps == ["firstfit, seed 0", "bestfit, seed 0"]
    assert list(results) == ["firstfit", "bestfit"]


def test_a_wrong_word_is_told_before_a_broker_is_asked_for_anything(tmp_path):
    with pytest.raises(SpecError, match="no policy is called"):
        verbs.replay("ledger", ["x"], home=tmp_path / "home")
    with pytest.raises(NotFound, match="does not exist"):
        verbs.replay(tmp_path / "none.csv", ["fifo"], home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


# --- placement alone ---


def test_arrivals_are_the_whole_trace_then_draws_until_the_fleet_is_asked_for_so_much(files):
    jobs = load_trace(files / "jobs.csv").jobs
    asked = sum(job.envelope.gpus for job in jobs)
    more = arrivals(jobs, 2 * asked, 7, by_gpu=True)
    assert sum(job.envelope.gpus for job in more) <= 2 * asked < sum(job.envelope.gpus for job in more) + 3
    assert {job.id for job in more} == {job.id for job in jobs}
    assert arrivals(jobs, 2 * asked, 7, by_gpu=True) == more != arrivals(jobs, 2 * asked, 8, by_gpu=True)
    assert sum(job.envelope.gpus for job in arrivals(jobs, 5.0, 7, by_gpu=True)) <= 5.0


def test_a_fleet_is_filled_and_what_it_cannot_hold_is_dropped(files):
    trace, fleet = load_trace(files / "jobs.csv"), load_nodes(files / "nodes.csv")
    rule = replays.RULES["tenure"]
    found = fill_fleet(trace, fleet, rule, 200.0, seed=0)
    assert found["allocated"] <= 1.0
    assert found["dropped"] > 0
    assert found["series"]["allocated"][-1] == found["allocated"]
    held = sum(tenant["asked"] * tenant["served"] for tenant in found["tenants"].values())
    assert held == pytest.approx(found["allocated"] * 8)


def test_a_pod_goes_only_where_its_model_is(files):
    head, *rows = OPENB.splitlines()
    pods = write(files, "\n".join([head, rows[0].replace(",,LS", ",G9,LS"), rows[1], ""]), "pods.csv")
    found = fill_fleet(load_trace(pods), load_nodes(files / "nodes.csv"), replays.RULES["bestfit"], 18.3, seed=0)
    assert (found["jobs"], found["dropped"]) == (2, 1)


OPENB_FOLDER = Path(os.environ.get("TENURE_DATA") or Path(__file__).parents[3] / "shared" / "data") / "traces" / "openb"


@pytest.mark.real
@pytest.mark.skipif(not OPENB_FOLDER.is_dir(), reason=f"no {OPENB_FOLDER}: name a data folder with TENURE_DATA")
def test_on_the_published_trace_the_placements_come_in_the_known_order(tmp_path):
    trace, nodes = OPENB_FOLDER / "openb_pod_list_default.csv", OPENB_FOLDER / "openb_node_list_gpu_node.csv"
    done = verbs.replay(trace, ["firstfit", "fgd", "tenure"], nodes=nodes, fill_percent=130.0, out=tmp_path)
    results = json.loads(done.json.read_text())["results"]
    allocated = {name: runs[0]["allocated"] for name, runs in results.items()}
    assert 0.94 < allocated["firstfit"] < allocated["fgd"] < allocated["tenure"] < 0.97
    assert done.answer.startswith("tenure comes first")


# --- the answer ---


def results_of(**values):
    return {label: [{"mean_completion_s": value} for value in found] for label, found in values.items()}


def test_the_best_policy_is_named_only_with_seeds_enough_that_all_say_the_same():
    many = results_of(a=[50.0] * 5, b=[100.0] * 5)
    assert answer(many, TIMED[0]) == "a is best: mean completion 50.0 s, 50 % below b (better with 5 of 5 seeds)."
    one = answer(results_of(b=[100.0], a=[50.0]), TIMED[0])
    assert one.startswith("a comes first: mean completion 50.0 s, 50 % below b. That is one run each")
    mixed = answer(results_of(a=[50.0] * 4 + [120.0], b=[100.0] * 5), TIMED[0])
    assert "a comes first" in mixed
    assert "better with 4 of 5 seeds). That is no proof" in mixed


def test_equal_policies_and_a_single_one_are_called_so():
    assert answer(results_of(a=[5.0], b=[5.0]), TIMED[0]) == "No difference: mean completion is 5.0 s under every policy tried."
    assert "Only one policy" in answer(results_of(a=[5.0]), TIMED[0])
    shares = {"a": [{"allocated": 0.96}], "b": [{"allocated": 0.9525}]}
    assert "a comes first: allocation 96.00 %, 0.75 points above b" in answer(shares, FILLED[0])


def test_figures_of_a_run_count_what_was_dropped_and_what_never_ended():
    def a_job(name, **more):
        return JobOutcome(**{"id": name, "tenant": "t", "submit_s": 0.0, "gpus": 1.0, "duration_s": 10.0, "restarts": 0} | more)

    jobs = (
        a_job("done", first_start_s=5.0, end_s=15.0),
        a_job("dropped", first_start_s=None, end_s=None, dropped="n: too small"),
        a_job("left", first_start_s=None, end_s=None, submit_s=20.0),
    )
    series = (Sample(0.0, 1.0, 0, 0.0, 0.0), Sample(5.0, 0.5, 0, 0.0, 0.0), Sample(30.0, 0.0, 1, 1.0, 0.0))
    found = of_outcome(Outcome(policy=Policy(), seed=0, jobs=jobs, series=series))
    assert (found["completed"], found["dropped"], found["unfinished"]) == (1, 1, 1)
    assert found["allocated"] == pytest.approx((5 * 1.0 + 15 * 0.5) / 20)
    assert found["tenants"]["t"]["stretch"] == 1.5
    assert found["why_dropped"] == "n: too small"


def test_small_figures():
    assert jain([1.0, 1.0]) == 1.0
    assert jain([1.0, 0.0]) == 0.5
    assert jain([]) == 1.0
    assert (quantile([1.0, 2.0, 3.0, 4.0], 0.5), quantile([], 0.5)) == (2.0, 0.0)
    assert [show_time(s) for s in (4.0, 90.0, 5400.0, 200000.0)] == ["4.0 s", "1.5 min", "1.5 h", "2.3 d"]
