import os
import subprocess

from tenure.runtimes import execin, procfs


def test_a_job_whose_program_has_just_begun_is_asked_again_for_its_environment(monkeypatch):
    answers = iter([{}, {}, {"WORD": "inner"}])
    monkeypatch.setattr(procfs, "environment", lambda pid: next(answers))
    assert execin._environment(os.getpid()) == {"WORD": "inner"}


def test_a_job_that_is_gone_has_no_environment():
    process = subprocess.Popen(["true"])
    process.wait()
    assert execin._environment(process.pid) == {}
