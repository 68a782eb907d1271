"""The command as a whole: arguments in, one answer and an exit code out. The verbs behind it are stood in for here."""

import errno
import json
import os
import signal
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from tenure import errors
from tenure.cli import main as cli
from tenure.runs import Run, RunState


@dataclass(frozen=True, kw_only=True)
class Outcome:
    run: Run
    closing: tuple[str, ...] = ()
    report_html: Path = Path("/r/report.html")
    report_json: Path = Path("/r/report.json")
    failed: str = ""
    error: errors.TenureError | None = None


def an_outcome(**fields):
    return Outcome(run=Run(id="r-1", name="x", tenant="t", job_file="", source="x.toml", state=RunState.DONE), **fields)


@pytest.fixture
def verbs(monkeypatch):
    """A stand-in for `tenure.verbs`, so that these tests are about the command line only."""
    import tenure

    module = types.ModuleType("tenure.verbs")
    monkeypatch.setitem(sys.modules, "tenure.verbs", module)
    monkeypatch.setattr(tenure, "verbs", module, raising=False)
    return module


def raising(error):
    def verb(*_args, **_kwargs):
        raise error

    return verb


def test_run_tells_where_the_report_is_when_there_is_one(verbs, capsys, tmp_path):
    seen = {}
    page = tmp_path / "report.html"

    def run(job_file, **options):
        seen.update(options, job_file=job_file)
        options["display"].step_done("train", "measure", "4 probes")
        return an_outcome(report_html=page)

    verbs.run = run
    assert cli.run(["run", "x.toml", "--home", "/h"]) == 0
    assert "report" not in capsys.readouterr().out
    page.write_text("<html>")
    assert cli.run(["run", "x.toml", "--home", "/h"]) == 0
    out = capsys.readouterr().out
    assert "train measure: 4 probes" in out
    assert f"report   {page}" in out
    assert seen["job_file"] == Path("x.toml")
    assert seen["home"] == Path("/h")
    assert seen["resume"] == ""


def test_run_with_json_prints_one_object_and_nothing_else(verbs, capsys):
    verbs.run = lambda *_args, **_options: an_outcome(failed="out of memory", error=errors.JobFailed("out of memory"))
    assert cli.run(["run", "x.toml", "--json"]) == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["failed"] == "out of memory"
    assert answer["exit_code"] == 1
    assert answer["run"]["id"] == "r-1"
    assert captured.err == "tenure: out of memory\n"


def test_train_and_serve_are_run_restricted_to_that_stage(verbs):
    seen = []
    verbs.run = lambda *_args, **options: seen.append(options["only"]) or an_outcome()
    assert cli.run(["train", "x.toml"]) == 0
    assert cli.run(["serve", "x.toml"]) == 0
    assert seen == ["train", "serve"]


def test_up_without_an_option_leaves_everything_as_it_was(verbs):
    asked = []
    verbs.up = lambda **options: asked.append(options) or raising(errors.Refused("enough"))()
    assert cli.run(["up"]) == 3
    assert cli.run(["up", "--metrics", "9100"]) == 3
    assert [options["metrics_port"] for options in asked] == [0, 9100]


def test_a_run_is_gone_on_with_without_its_job_file(verbs):
    seen = []
    verbs.run = lambda file, **options: seen.append((file, options["resume"], options["workers"])) or an_outcome()
    assert cli.run(["run", "--resume", "r-1"]) == 0
    assert cli.run(["train", "--resume", "r-1", "--workers", "2"]) == 0
    assert seen == [(None, "r-1", 0), (None, "r-1", 2)]


def test_a_failed_stage_ends_with_the_code_of_its_reason(verbs):
    verbs.run = lambda *_args, **_options: an_outcome(failed="no room", error=errors.NoPlacement("no room"))
    assert cli.run(["run", "x.toml"]) == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.JobFileError("unknown key 'gaol'; valid keys: goal", source="x.toml", line=4), 2),
        (errors.NotFound("no run r-9"), 4),
        (errors.Unavailable("the broker did not answer within 15 s"), 6),
        (errors.CorruptData("block 3"), 8),
        (ZeroDivisionError("oops"), 70),
    ],
)
def test_errors_become_one_message_and_a_code_without_a_trace(verbs, capsys, monkeypatch, error, code):
    monkeypatch.delenv("TENURE_DEBUG", raising=False)
    verbs.runs = raising(error)
    assert cli.run(["runs"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tenure: ")
    assert str(error) in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_the_trace(verbs, capsys, monkeypatch):
    monkeypatch.setenv("TENURE_DEBUG", "1")
    verbs.runs = raising(ZeroDivisionError("oops"))
    assert cli.run(["runs"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_errors_are_also_json_when_asked(verbs, capsys):
    verbs.logs = raising(errors.NotFound("no lease l-9"))
    assert cli.run(["logs", "l-9", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"kind": "NotFound", "message": "no lease l-9", "exit_code": 4}


def test_a_jobs_own_words_in_an_error_keep_their_lines_but_not_their_escapes(verbs, capsys):
    verbs.run = lambda *_args, **_options: an_outcome(failed="ended 1\n  \x1b[2Jlast words")
    assert cli.run(["run", "x.toml"]) == 1
    assert capsys.readouterr().err == "tenure: ended 1\n  �[2Jlast words\n"


def test_sigterm_ends_a_command_as_ctrl_c_does(verbs):
    def run(*_args, **_options):
        os.kill(os.getpid(), signal.SIGTERM)

    verbs.run = run
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(["run", "x.toml"]) == 130
    assert signal.getsignal(signal.SIGTERM) == before


def test_interrupting_ends_with_130_and_says_how_to_go_on(verbs, capsys):
    verbs.run = raising(KeyboardInterrupt())
    assert cli.run(["run", "x.toml"]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run"], "name a job file"),
        (["train"], "name a job file"),
        (["frobnicate"], "frobnicate"),
        (["runs", "--frob"], "--frob"),
        (["release"], "LEASE"),
        (["events", "--after", "-1"], "--after"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_names_what_is_wrong(verbs, capsys, argv, says):
    assert cli.run(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_version_is_printed(capsys):
    from tenure import __version__

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"tenure {__version__}\n"


def test_listing_passes_its_filters_on(verbs, capsys):
    seen = {}
    verbs.events = lambda **options: seen.update(options) or ()
    assert cli.run(["events", "--run", "r-1", "--after", "12"]) == 0
    assert seen == {"home": None, "run": "r-1", "lease": "", "after": 12}
    assert cli.run(["events", "l-1"]) == 0
    assert seen["lease"] == "l-1"
    assert capsys.readouterr().out == "no events\nno events\n"


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool | None
    found: str
    means: str
    remedy: str = ""


def test_doctor_says_what_is_missing_and_what_it_would_take(verbs, capsys):
    verbs.doctor = lambda _home: (
        Finding("cgroups", True, "v2, writable", "memory is exact"),
        Finding("GPU", None, "none", "jobs run on CPUs", "install a driver"),
    )
    assert cli.run(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok      cgroups: v2, writable",
        "        memory is exact",
        "absent  GPU: none",
        "        jobs run on CPUs",
        "        -> install a driver",
    ]


def test_doctor_ends_with_1_when_something_needed_is_broken(verbs, capsys):
    verbs.doctor = lambda _home: (Finding("home", False, "not writable", "nothing can run", "set TENURE_HOME"),)
    assert cli.run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["ok"] is False


@pytest.mark.parametrize("named", [(), ("/h/ledger",)])
def test_a_full_disk_is_told_as_such_and_not_as_a_bug(verbs, capsys, named):
    verbs.runs = raising(OSError(errno.ENOSPC, "No space left on device", *named))
    assert cli.run(["runs", "--home", "/h"]) == 3
    assert "the disk is full" in (said := capsys.readouterr().err)
    assert "bug" not in said


def test_replay_hands_on_what_was_asked_and_prints_the_answer_and_where_the_report_is(verbs, capsys):
    asked = {}

    def replay(trace, policies, **more):
        asked.update(more, trace=trace, policies=policies)
        return types.SimpleNamespace(answer="a is best", html=Path("/o/report.html"), json=Path("/o/report.json"))

    verbs.replay = replay
    assert (
        cli.run(["replay", "t.csv", "--policy", "a,b", "--nodes", "n.csv", "--seeds", "3", "--slot", "30min", "--fill", "130"])
        == 0
    )
    assert capsys.readouterr().out == "a is best\nreport   /o/report.html\nfigures  /o/report.json\n"
    assert (asked["trace"], asked["policies"], asked["seeds"], asked["slot_s"]) == ("t.csv", ["a", "b"], 3, 1800.0)
    assert (asked["nodes"], asked["fill_percent"], asked["resume"]) == ("n.csv", 130.0, False)
