"""Whole runs on tiny jobs, with real processes: what goes wrong, what is left behind, and how a run goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tenure import errors, verbs

from .jobs import tiny

pytestmark = pytest.mark.real

JOBS = Path(__file__).parent / "jobs"
TASK = """
[run]
name = "tiny"

[task]
command = ["python", "-c", {code}]
envelope = {{ cpus = 0.5, memory = "64MiB", disk = "8MiB", slot = "{slot}", total = "{slot}" }}
{more}
"""
TRAIN = """
[run]
name = "tiny"

[train]
program = "tiny.py:Tiny"
shards = 2
workers = {workers}
max_rounds = {rounds}
options = {{ {options} }}
envelope = {{ cpus = 0.5, memory = "192MiB", slot = "{slot}", total = "{total}" }}
probe = {{ memory = "512MiB" }}
"""
GOAL = """
[run]
name = "tiny"

[train]
program = "tiny.py:Tiny"
shards = 2
max_rounds = {rounds}
options = {{ {options} }}
goal = {{ accuracy = 0.9 }}
probe = {{ memory = "256MiB", max = "{probe}" }}
"""
CHAIN = """
[run]
name = "chain"

[[task]]
name = "prepare"
command = ["python", "-c", {code}]
outputs = {{ x = "x.npy" }}

[[task]]
name = "never"
command = ["false"]

[train]
program = "tiny.py:Tiny"
inputs = {{ x = "prepare:x.npy" }}
shards = 2
goal = {{ accuracy = 0.5 }}
probe = {{ memory = "256MiB", max = "10s" }}

[serve]
model = "train:model.onnx"
inputs = {{ x = "prepare:x.npy" }}
goals = [{{ name = "one", p99 = "1s" }}]
"""
SERVE = """
[run]
name = "tiny"

[serve]
model = "{model}"
envelope = {{ cpus = 0.5, memory = "256MiB", slot = "{slot}", total = "{total}" }}
ports = {{ {ports} }}
"""


def until(condition, *, within_s=40.0):
    """Poll until the condition gives something true, and return it."""
    end_s = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end_s, "did not come about in time"
        time.sleep(0.02)
    return value


def of_run(run_id):
    """Return the processes that carry the run's id in their environment."""
    wanted, found = f"TENURE_RUN_ID={run_id}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    return found


class Tenure:
    """The command and the functions, in one home and one folder of job files."""

    def __init__(self, home, folder):
        self.home, self.folder = home, folder
        (folder / "tiny.py").write_bytes((JOBS / "tiny.py").read_bytes())
        self.before = set(home.glob("runs/*"))

    def job(self, text, name="job.toml", **values):
        path = self.folder / name
        path.write_text(text.format(**values) if values else text)
        return path

    def task(self, code, *, slot="30s", more=""):
        return self.job(TASK, code=json.dumps(code), slot=slot, more=more)

    def train(self, *, workers=1, rounds=30, slot="30s", total="1min", **options):
        listed = ", ".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
        return self.job(TRAIN, workers=workers, rounds=rounds, slot=slot, total=total, options=listed)

    def goal(self, *, rounds=400, probe="20s", **options):
        listed = ", ".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
        return self.job(GOAL, rounds=rounds, probe=probe, options=listed)

    def serve(self, *, slot="1min", total="1min", ports="http = 0"):
        tiny.write_model(self.folder / "tiny.onnx", np.eye(2))
        return self.job(SERVE, model="tiny.onnx", slot=slot, total=total, ports=ports)

    def start(self, *argv):
        """Start the command line as a process."""
        env = {**os.environ, "TENURE_HOME": str(self.home)}
        argv = [sys.executable, "-m", "tenure.cli", *map(str, argv)]
        return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def call(self, *argv, code=0):
        """Run the command line; return what it printed."""
        with self.start(*argv) as process:
            out, err = process.communicate(timeout=90)
        assert process.returncode == code, f"{argv}: {process.returncode}\n{out}\n{err}"
        return out if code == 0 else err

    def run(self, job=None, **options):
        return verbs.run(job, home=self.home, **options)

    def interrupted(self, job, when, *, verb="run", number=signal.SIGINT):
        """Start a run, interrupt it once `when` gives something true; return its id and what it told."""
        before = {run.id for run in verbs.runs(home=self.home)}
        with self.start(verb, job) as process:
            try:
                until(lambda: when() or process.poll() is not None)
                assert process.poll() is None, process.communicate()
                process.send_signal(number)
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        (run,) = [run for run in verbs.runs(home=self.home) if run.id not in before]
        return run, process.returncode, out + err

    def files(self, pattern):
        """Return the files of this test's runs that match."""
        return [path for run in set(self.home.glob("runs/*")) - self.before for path in run.glob(pattern)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One broker for all tests here, ended with the last."""
    folder = tmp_path_factory.mktemp("flow") / "home"
    verbs.up(home=folder)
    yield folder
    verbs.down(home=folder)


@pytest.fixture
def tenure(home, tmp_path):
    made = Tenure(home, tmp_path)
    yield made
    left = verbs.leases(home=home, live=True)
    for lease in left:
        verbs.release(lease.id, home=home)
    assert not left


def failed(outcome, error=errors.JobFailed):
    """Check that a run failed as it should and left a report and no process; return what it says."""
    assert type(outcome.error) is error, outcome
    assert outcome.run.state == "failed"
    assert outcome.report_html.is_file()
    assert json.loads(outcome.report_json.read_text())
    assert of_run(outcome.run.id) == []
    return outcome.failed


# --- what is handed in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[run]\nname = "x"\n[train]\nprogram = "gone.py:Tiny"\ngoal = { accuracy = 0.5 }\n', "gone.py"),
        (
            '[run]\nname = "x"\n[train]\nprogram = "tiny.py:Tiny"\ninputs = { x = "no.npy" }\ngoal = { accuracy = 0.5 }\n',
            "no.npy",
        ),
        ('[run]\nname = "x"\n[serve]\nmodel = "no.onnx"\n[serve.envelope]\ncpus = 1\n', "no.onnx"),
        ('[run]\nname = "x"\n[task]\ncommand = ["true"]\n[task.inputs]\nx = "no.npy"\n', "no.npy"),
    ],
)
def test_missing_programs_data_and_models_are_named_before_anything_starts(tenure, text, told):
    outcome = tenure.run(tenure.job(text))
    assert told in failed(outcome, errors.SpecError)
    assert verbs.leases(home=tenure.home, run=outcome.run.id) == ()


def test_a_job_file_that_is_wrong_or_missing_leaves_no_run(tenure):
    before = len(verbs.runs(home=tenure.home))
    with pytest.raises(errors.SpecError, match=r"job\.toml:4: .*programme"):
        tenure.run(tenure.job('[run]\nname = "x"\n[train]\nprogramme = "x.py:X"\n'))
    with pytest.raises(errors.SpecError, match=r"gone\.toml does not exist"):
        tenure.run(tenure.folder / "gone.toml")
    assert len(verbs.runs(home=tenure.home)) == before


def test_a_program_that_cannot_be_loaded_says_why(tenure):
    job = tenure.train()
    job.write_text(job.read_text().replace("tiny.py:Tiny", "tiny.py:Tony"))
    assert "has no 'Tony'" in failed(tenure.run(job))


# --- jobs that misbehave -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason", "told"),
    [
        ("raise", "failed", "last words: ValueError: the seventh image is upside down"),
        ("leak", "out_of_memory", "Each worker may hold 192.0 MiB. Raise the envelope's memory"),
        ("nan", "failed", "training failed in round 3: the loss is nan or a gradient is not finite"),
        ("fork", "failed", "result.json"),
    ],
)
def test_a_training_program_that_goes_wrong_ends_the_run_with_its_reason(tenure, fault, reason, told):
    outcome = tenure.run(tenure.train(workers=2, fault=fault, fault_round=3))
    assert told in failed(outcome)
    assert outcome.error.reason == reason
    leases = verbs.leases(home=tenure.home, run=outcome.run.id)
    assert reason in {lease.end_reason for lease in leases}


def test_more_workers_than_shards_and_another_job_file_beside_a_run_are_refused_before_anything_starts(tenure):
    job, before = tenure.train(), len(verbs.runs(home=tenure.home))
    with pytest.raises(errors.SpecError, match=r"--workers 3: stage train has 2 shards.*at most 2"):
        tenure.run(job, workers=3)
    with pytest.raises(errors.SpecError, match="no training stage"):
        tenure.run(tenure.task("pass"), workers=1)
    assert len(verbs.runs(home=tenure.home)) == before
    run = tenure.run(tenure.train(fault="raise")).run.id
    with pytest.raises(errors.SpecError, match="begun with another job file: max_rounds of stage train differs"):
        tenure.run(tenure.train(rounds=31, fault="raise"), resume=run)
    with pytest.raises(errors.SpecError, match="at most 2"):
        tenure.run(resume=run, workers=3)


def test_a_run_that_was_out_of_memory_goes_on_with_more(tenure, tmp_path):
    job = tenure.train(rounds=8, fault="heavy", fault_round=3, rounds_log=str(tmp_path / "rounds"))
    assert "tenure train FILE --resume RUN" in failed(tenure.run(job))
    (run,) = [run.id for run in verbs.runs(home=tenure.home) if run.source == str(job)]
    job.write_text(job.read_text().replace('memory = "192MiB"', 'memory = "384MiB"', 1))
    outcome = tenure.run(job, resume=run)
    assert outcome.run.state == "done", outcome.failed
    assert (tmp_path / "rounds").read_text().split()[-1] == "7"


def test_a_training_program_that_hangs_is_ended_by_its_slot_and_total(tenure):
    outcome = tenure.run(tenure.train(slot="1s", total="1s", fault="hang"))
    assert "total of 1 s" in failed(outcome)
    assert outcome.error.reason == "out_of_time"


FILL = """
import os, time
with open(os.environ["TENURE_WORKER_DIR"] + "/table", "wb") as file:
    file.write(bytes(32 << 20))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "reason", "told"),
    [
        ("raise SystemExit('no data here')", "failed", "no data here"),
        ("import time; time.sleep(600)", "out_of_time", "deadline"),
        ("x = []\nwhile True: x.append(bytearray(4 << 20))", "out_of_memory", ""),
        (FILL, "out_of_disk", "8388608"),
    ],
)  # fmt: skip
def test_a_task_that_goes_wrong_ends_the_run_with_its_reason(tenure, code, reason, told):
    outcome = tenure.run(tenure.task(code, slot="2s" if reason == "out_of_time" else "30s"))
    assert told in failed(outcome)
    assert outcome.error.reason == reason
    (lease,) = verbs.leases(home=tenure.home, run=outcome.run.id)
    assert lease.end_reason == reason


def test_a_task_whose_declared_output_is_missing_fails_and_names_it(tenure):
    outcome = tenure.run(tenure.task("pass", more='outputs = { table = "table.csv" }'))
    assert "table.csv" in failed(outcome)


def test_a_task_that_forks_leaves_nothing(tenure):
    code = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    outcome = tenure.run(tenure.task(code))
    assert outcome.run.state == "done"
    assert of_run(outcome.run.id) == []


# --- interrupted, and gone on --------------------------------------------------------------------------------------------


def cancelled(tenure, run, code, told):
    """Check what Ctrl-C leaves: the exit code, the hint, a report, no live lease and no process."""
    assert code == 130, told
    assert f"tenure run --resume {run.id}" in told
    assert run.state == "cancelled"
    assert (tenure.home / "runs" / run.id / "report" / "report.html").is_file()
    assert of_run(run.id) == []
    assert not verbs.leases(home=tenure.home, run=run.id, live=True)


def test_ctrl_c_during_a_task_leaves_nothing_and_the_run_goes_on(tenure, tmp_path):
    go = tmp_path / "go"
    begun = tmp_path / "begun"
    code = (
        f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)"
    )
    run, status, told = tenure.interrupted(tenure.task(code), begun.exists)
    cancelled(tenure, run, status, told)
    go.touch()
    assert tenure.run(resume=run.id).run.state == "done"
    with pytest.raises(errors.SpecError, match="is done"):
        tenure.run(resume=run.id)


def combined(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def test_ctrl_c_during_training_keeps_what_was_done_and_training_goes_on_from_its_last_round(tenure, tmp_path):
    log, prepared = tmp_path / "rounds", tmp_path / "prepared"
    job = tenure.goal(pause_s=0.05, needed=9, rounds_log=str(log))
    code = json.dumps(f"open({str(prepared)!r}, 'a').write('once ')")
    job.write_text(job.read_text().replace("[train]", f'[task]\ncommand = ["python", "-c", {code}]\n\n[train]'))
    run, status, told = tenure.interrupted(job, lambda: tenure.files("train/store/weights/00000003*"))
    cancelled(tenure, run, status, told)
    assert [stage.state for stage in run.stages] == ["done", "cancelled"]
    before = combined(log)
    assert before[-1] < 8
    trials = verbs.trials(home=tenure.home, run=run.id)
    outcome = tenure.run(resume=run.id)
    assert outcome.run.state == "done", outcome.failed
    assert prepared.read_text() == "once "
    assert [step.partition(": ")[2][:4] for step in outcome.closing[:2]] == ["done", "kept"]
    assert before[-1] <= combined(log)[len(before)] <= before[-1] + 1
    assert trials == verbs.trials(home=tenure.home, run=run.id)[: len(trials)]
    assert (tenure.home / "runs" / run.id / "train" / "artefacts" / "model.onnx").is_file()


def test_ctrl_c_while_measuring_keeps_the_trials_and_the_run_goes_on(tenure, tmp_path):
    log = tmp_path / "rounds"
    job = tenure.goal(pause_s=0.02, rounds_log=str(log))
    run, status, told = tenure.interrupted(job, lambda: len(combined(log)) > 10)  # in the second probe
    cancelled(tenure, run, status, told)
    trials = verbs.trials(home=tenure.home, run=run.id)
    assert [trial.source for trial in trials] == ["probe"]
    outcome = tenure.run(resume=run.id)
    assert outcome.run.state == "done", outcome.failed
    assert trials[0] in verbs.trials(home=tenure.home, run=run.id)


def test_ctrl_c_ends_a_served_model_that_outlived_its_first_slot(tenure):
    def in_a_later_slot():
        return [e for e in verbs.events(home=tenure.home) if e.kind == "lease.renewed"]

    job = tenure.serve(slot="2s", total="1min")
    run, status, told = tenure.interrupted(job, in_a_later_slot, verb="serve")
    cancelled(tenure, run, status, told)


def test_ctrl_c_while_a_model_is_measured_leaves_nothing(tenure):
    np.save(tenure.folder / "x.npy", np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32))
    job = tenure.serve()
    job.write_text('[serve]\nmodel = "tiny.onnx"\ninputs = { x = "x.npy" }\ngoals = [{ name = "one", p99 = "1s" }]\n')
    run, status, told = tenure.interrupted(job, lambda: tenure.files("serve/workers/1/*/*"))
    cancelled(tenure, run, status, told)


def test_a_killed_command_leaves_a_run_that_resumes_without_running_twice(tenure, tmp_path):
    log = tmp_path / "rounds"
    job = tenure.train(workers=2, rounds=30, pause_s=0.05, rounds_log=str(log))
    run, status, _ = tenure.interrupted(job, lambda: len(combined(log)) > 5, number=signal.SIGKILL)
    assert status == -signal.SIGKILL
    outcome = tenure.run(resume=run.id)
    assert outcome.run.state == "done", outcome.failed
    rounds = combined(log)
    assert set(rounds) == set(range(30))
    assert len(rounds) <= 2 * 31  # each of the two workers makes each update itself
    assert of_run(run.id) == []


def test_a_run_in_progress_cannot_be_resumed_beside_itself(tenure, tmp_path):
    begun = tmp_path / "begun"
    job = tenure.task(f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(60)")
    with tenure.start("run", job) as process:
        try:
            until(begun.exists)
            run = verbs.runs(home=tenure.home)[0]
            with pytest.raises(errors.Conflict, match=f"pid {process.pid}"):
                tenure.run(resume=run.id)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_failed_run_goes_on_once_its_program_is_mended(tenure, tmp_path):
    log = tmp_path / "rounds"
    outcome = tenure.run(tenure.train(rounds=12, fault="raise", fault_round=5, rounds_log=str(log)))
    assert "upside down" in failed(outcome)
    program = tenure.folder / "tiny.py"
    program.write_text(program.read_text().replace('raise ValueError("the seventh image is upside down")', "return 0.0"))
    again = tenure.run(resume=outcome.run.id)
    assert again.run.state == "done", again.failed
    assert sorted(set(combined(log))) == list(range(12))  # who starts repeats the updates since the newest checkpoint


def test_a_result_that_rots_is_told_and_made_again_by_a_resumed_run(tenure, tmp_path):
    outcome = tenure.run(tenure.train(rounds=6, rot=str(tmp_path / "rotten")))
    assert "losing bits" in failed(outcome)
    again = tenure.run(resume=outcome.run.id)
    assert "does not match its checksum. It was put into quarantine: resume the run" in failed(again)
    once_more = tenure.run(resume=outcome.run.id)
    assert once_more.run.state == "done", once_more.failed


def test_a_second_ctrl_c_does_not_disturb_the_cleaning_up(tenure, tmp_path):
    begun = tmp_path / "begun"
    code = (
        "import pathlib, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), exit()))\n"
        f"pathlib.Path({str(begun)!r}).touch()\ntime.sleep(60)"
    )
    with tenure.start("run", tenure.task(code)) as process:
        try:
            until(begun.exists)
            run = verbs.runs(home=tenure.home)[0]
            process.send_signal(signal.SIGINT)
            until(lambda: verbs.leases(home=tenure.home, run=run.id)[0].state == "draining")
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    cancelled(tenure, verbs.runs(home=tenure.home)[0], process.returncode, out + err)


def test_recommending_trains_and_serves_nothing_and_runs_only_the_tasks_it_needs(tenure):
    code = json.dumps("import numpy, os; numpy.save(os.environ['TENURE_WORKER_DIR'] + '/x.npy', numpy.zeros((8, 2)))")
    answer = json.loads(tenure.call("recommend", tenure.job(CHAIN, code=code), "--json"))
    assert [recommendation["stage"] for recommendation in answer] == ["train"]
    leases = verbs.leases(home=tenure.home, run=answer[0]["run_id"])
    assert {lease.stage.partition(".probe.")[0] for lease in leases} == {"prepare", "train"}
    assert not [lease for lease in leases if lease.stage == "train"]


# --- beside each other ---------------------------------------------------------------------------------------------------


def test_a_taken_port_is_named(tenure):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = tenure.run(tenure.serve(ports=f"http = {port}"))
        assert str(port) in failed(outcome)


def test_two_runs_at_once_in_one_home_both_end_right(tenure):
    capacity = verbs.nodes(home=tenure.home)[0].capacity
    job = tenure.task("import time; time.sleep(0.3)")
    job.write_text(job.read_text().replace("cpus = 0.5", f"cpus = {capacity.cpus:g}"))
    both = [tenure.start("run", job, "--json") for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in both]
    assert [json.loads(out)["run"]["state"] for out, _ in answers] == ["done", "done"], answers


def test_a_second_home_is_refused_with_who_holds_the_machine(tenure, tmp_path):
    told = tenure.call("run", tenure.task("pass"), "--home", tmp_path / "other", code=6)
    assert str(tenure.home) in told
    assert "holds" in told
    assert verbs.runs(home=tmp_path / "other") == ()
    verbs.down(home=tmp_path / "other")


def test_a_served_model_that_dies_fails_its_run(tenure):
    with tenure.start("serve", tenure.serve()) as process:
        try:
            until(lambda: tenure.files("serve/workers/0/*/endpoints.json"))
            run = verbs.runs(home=tenure.home)[0]
            pids = [int(line.partition(":")[0]) for line in of_run(run.id)]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "signal" in err
