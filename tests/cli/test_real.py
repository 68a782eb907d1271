"""The command against a real broker, agent and process: what a user types, and what is left afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

JOB = """
[run]
name = "small"

[task]
command = ["{python}", "-c", {code}]
envelope = {{ cpus = 1, memory = "128MiB", slot = "1min" }}
{more}
"""


def command(*argv):
    return [sys.executable, "-m", "tenure.cli", *argv]


def living(folder):
    """Return the processes that have the folder in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in text and int(entry.name) != os.getpid():
            found.append(f"{entry.name} {text}")
    return found


def until(condition, *, within_s):
    """Poll until the condition gives something true, and return it."""
    end_s = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end_s, "did not come about in time"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One home for all: its broker stays between commands that follow quickly. Afterwards nothing of it may live."""
    folder = tmp_path_factory.mktemp("cli") / "home"
    yield folder
    until(lambda: not living(folder), within_s=30)


@pytest.fixture
def tenure(home, tmp_path):
    def call(*argv, code=0):
        env = {**os.environ, "TENURE_HOME": str(home)}
        done = subprocess.run(command(*argv), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


def write_job(tmp_path, code, more=""):
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(python=sys.executable, code=json.dumps(code), more=more))
    return str(path)


def test_a_task_runs_and_every_verb_can_tell_of_it_afterwards(tenure, tmp_path):
    job = write_job(tmp_path, "print('hello from inside')")
    answer = json.loads(tenure("run", job, "--json").stdout)
    run = answer["run"]["id"]
    assert answer["exit_code"] == 0
    assert answer["run"]["state"] == "done"
    assert Path(answer["report_html"]).is_file()

    leases = json.loads(tenure("leases", "--run", run, "--json").stdout)
    assert [lease["end_reason"] for lease in leases] == ["completed"]
    assert "hello from inside" in tenure("logs", leases[0]["id"]).stdout
    assert "lease.ended" in tenure("events", "--run", run).stdout
    of_lease = json.loads(tenure("events", leases[0]["id"], "--json").stdout)
    assert {event["lease_id"] for event in of_lease} == {leases[0]["id"]}
    assert of_lease[-1]["kind"] == "lease.ended"
    assert "does not exist" in tenure("events", "l-0000000000", code=4).stderr
    assert run in tenure("runs").stdout
    assert tenure("trials", "--run", run).stdout == "no trials\n"
    assert "local" in tenure("nodes").stdout
    page = tenure("report", run, "--folder", str(tmp_path / "again")).stdout
    assert str(tmp_path / "again") in page
    assert tenure("run", "--resume", run, code=2).stderr.startswith("tenure: ")


def test_up_stays_until_down_and_offers_the_part_it_was_told(tmp_path):
    home = tmp_path / "up"
    # Shares of its own: a broker of another test may still be about to leave, and holds the machine until then.
    env = {**os.environ, "TENURE_HOME": str(home), "TENURE_SHARES_FILE": str(tmp_path / "shares.json")}

    def call(*argv):
        done = subprocess.run(command(*argv), env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done

    try:
        (node,) = json.loads(call("up", "--node", "part", "--cpus", "0.5", "--memory", "256MiB", "--json").stdout)
        assert (node["name"], node["capacity"]["cpus"], node["capacity"]["memory_bytes"]) == ("part", 0.5, 256 << 20)
    finally:
        assert json.loads(call("down", "--json").stdout) == {"was_up": True}
    until(lambda: not living(home), within_s=30)
    assert call("down").stdout == "nothing was up in this home\n"


def test_a_failing_command_ends_with_1_and_its_last_words(tenure, tmp_path):
    done = tenure("run", write_job(tmp_path, "raise SystemExit('no data here')"), code=1)
    assert "no data here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_job_file_ends_with_2_and_names_file_line_and_key(tenure, tmp_path):
    job = write_job(tmp_path, "pass", more='nvironment = "x"')
    done = tenure("run", job, code=2)
    assert f"{job}:8: " in done.stderr
    assert "nvironment" in done.stderr


def test_an_envelope_no_node_has_ends_with_3_and_the_reason_per_node(tenure, tmp_path):
    job = Path(write_job(tmp_path, "pass"))
    job.write_text(job.read_text().replace("128MiB", "900TiB"))
    assert "local" in tenure("run", str(job), code=3).stderr


def test_names_that_do_not_exist_end_with_4(tenure):
    for argv in (["logs", "l-none"], ["release", "l-none"], ["report", "r-none"], ["run", "--resume", "r-none"]):
        tenure(*argv, code=4)


def test_ctrl_c_ends_what_runs_and_resuming_goes_on(tenure, home, tmp_path):
    marker = tmp_path / "go"
    code = (
        f"import pathlib, time\nprint('begun', flush=True)\nwhile not pathlib.Path({str(marker)!r}).exists(): time.sleep(0.05)"
    )
    job = write_job(tmp_path, code)
    env = {**os.environ, "TENURE_HOME": str(home)}
    with subprocess.Popen(command("run", job), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: [log for log in home.glob("runs/*/task/logs/*") if "begun" in log.read_text()], within_s=60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err
    run = json.loads(tenure("runs", "--json").stdout)[0]
    assert run["state"] == "cancelled"
    assert json.loads(tenure("leases", "--live", "--json").stdout) == []
    marker.touch()
    answer = json.loads(tenure("run", "--resume", run["id"], "--json").stdout)
    assert answer["run"]["id"] == run["id"]
    assert answer["run"]["state"] == "done"


def test_two_runs_at_once_share_one_broker(home, tmp_path):
    job = write_job(tmp_path, "print('ok')")
    env = {**os.environ, "TENURE_HOME": str(home)}
    both = [
        subprocess.Popen(command("run", job, "--json"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=90) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert len({json.loads(out)["run"]["id"] for out, _ in answers}) == 2


def test_a_run_past_its_disk_ends_with_the_figures_and_gc_says_what_would_go(tenure, tmp_path):
    code = "import os, time; open(os.environ['TENURE_WORKER_DIR'] + '/big', 'wb').write(b'x' * (8 << 20)); time.sleep(60)"
    job = Path(write_job(tmp_path, code))
    job.write_text(job.read_text().replace('name = "small"', 'name = "small"\ndisk = "4MiB"'))
    done = tenure("run", str(job), code=1)
    assert "out_of_disk" in done.stderr
    assert "bound is 4MiB ([run] disk)" in done.stderr
    asked = ("--older-than", "0s", "--keep-runs", "0")
    told = {part["kind"]: part for part in json.loads(tenure("gc", *asked, "--dry-run", "--json").stdout)}
    bulk = "stores, worker folders and logs of runs"
    assert told[bulk]["size_bytes"] >= 8 << 20
    freed = {part["kind"]: part for part in json.loads(tenure("gc", *asked, "--json").stdout)}
    assert freed[bulk]["names"] == told[bulk]["names"]
    assert freed["whole runs"]["count"] == 0
