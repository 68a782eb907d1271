"""Environments: built once, found by content, errors said with its line. Packages are made here, no index is asked."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest
from tests.wheels import a_wheel

from tenure.errors import NotFound, SpecError, Unavailable
from tenure.runtimes import environments
from tenure.runtimes.environments import ensure_environment, environment_key, read_requirements, sweep


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all pip may look at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    a_wheel(folder, "alpha", "1.0")
    a_wheel(folder, "alpha", "2.0")
    a_wheel(folder, "beta", "1.0", needs=("alpha==1.0",))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def requirements(tmp_path):
    def write(text):
        path = tmp_path / "requirements.txt"
        path.write_text(text)
        return path

    return write


def test_it_is_built_once_and_found_again_by_what_it_says(index, requirements, tmp_path):
    said = []
    first = ensure_environment(tmp_path / "e", requirements("alpha==1.0\n"), told=said.append)
    assert first.built
    assert first.packages == {"alpha": "1.0"}
    assert any("alpha-1.0" in text for text in said)
    seen = subprocess.run(
        [first.python, "-c", "import alpha, sys; print(alpha.VERSION, sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert seen.stdout == f"1.0 {first.path}\n"
    again = ensure_environment(tmp_path / "e", requirements("# a comment\n\nalpha==1.0  # and one more\n"))
    assert (again.built, again.path, again.packages) == (False, first.path, first.packages)
    other = ensure_environment(tmp_path / "e", requirements("alpha==2.0\n"))
    assert other.built
    assert other.path != first.path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alpha\ngamma==3\n", r"requirements.txt:2: no wheel for 'gamma==3'.*no wheel of that name"),
        ("alpha==9\n", r"requirements.txt:1: no wheel for 'alpha==9'.*there are 1.0, 2.0"),
        ("alpha==2.0\nbeta\n", r"cannot be installed together"),
        ("alpha\nwhat is this\n", r"requirements.txt:2: 'what is this' is no requirement"),
    ],
)
def test_what_cannot_be_installed_is_named_with_its_line_and_leaves_nothing(index, requirements, tmp_path, text, says):
    with pytest.raises(SpecError, match=says):
        ensure_environment(tmp_path / "e", requirements(text))
    assert not [path for path in (tmp_path / "e").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "line",
    [
        "-e .",
        "-r other.txt",
        "--no-binary :all:",
        "./folder",
        "/tmp/archive.tar.gz",
        "git+https://example.org/x",
        "x @ https://example.org/x.tar.gz",
        "x @ git+https://example.org/x.git",
        "x @ file:///tmp/x",
    ],
)
def test_a_line_that_would_run_code_to_be_built_or_read_other_files_is_refused_before_anything_runs(requirements, line):
    with pytest.raises(SpecError, match=r"requirements\.txt:2: "):
        read_requirements(requirements(f"alpha\n{line}\n"))


def test_ordinary_lines_are_taken(requirements):
    text = (
        "alpha[extra]>=1,<3 ; python_version > '3.8'\n--pre\n--index-url https://example.org/simple\n"
        "beta==1.0 \\\n    --hash=sha256:00\nx @ https://example.org/x-1-py3-none-any.whl\n"
    )
    assert read_requirements(requirements(text)) == text


def test_a_file_that_is_not_there_or_no_text_is_said(tmp_path, requirements):
    with pytest.raises(NotFound, match=r"none\.txt"):
        read_requirements(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="UTF-8"):
        read_requirements(tmp_path / "binary")


def test_a_build_that_was_killed_is_done_again(index, requirements, tmp_path):
    wanted = requirements("alpha\n")
    left = tmp_path / "e" / environment_key(wanted.read_text())
    (left / "bin").mkdir(parents=True)
    (left / "bin/python").write_text("half")
    assert ensure_environment(tmp_path / "e", wanted).built


def test_two_that_want_the_same_build_it_once(index, requirements, tmp_path):
    wanted, made = requirements("alpha\n"), []
    threads = [threading.Thread(target=lambda: made.append(ensure_environment(tmp_path / "e", wanted))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(each.built for each in made) == [False, True]


def test_a_build_that_takes_too_long_is_ended_and_leaves_nothing(index, requirements, tmp_path):
    with pytest.raises(Unavailable, match="not installed within"):
        ensure_environment(tmp_path / "e", requirements("alpha\n"), max_s=0.01)
    assert not [path for path in (tmp_path / "e").iterdir() if path.is_dir()]


def test_what_nobody_asked_for_in_long_goes_unless_somebody_lives_in_it(requirements, tmp_path):
    root = tmp_path / "e"
    old, held, fresh = (ensure_environment(root, requirements(f"# nothing\n{line}")) for line in ("", "--pre", "--pre\n--pre"))
    now_s = (fresh.path / "environment.json").stat().st_mtime + environments.UNUSED_S - 1
    for each in (old, held):
        os.utime(each.path / "environment.json", (now_s - environments.UNUSED_S - 5,) * 2)
    assert sweep(root, in_use={held.key}, now_s=now_s) == [old.key]
    assert held.path.exists()
    assert fresh.path.exists()
    assert not old.path.exists()
