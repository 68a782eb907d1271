import os

import pytest

from tenure.errors import SpecError
from tenure.experiments.manifest import Hasher, input_manifest, job_fingerprint
from tenure.jobs import Job, TrainGoal
from tenure.nodes import Machine


def _fingerprint(tmp_path, **changes):
    program, data = tmp_path / "p.py", tmp_path / "data"
    if not data.exists():
        data.mkdir()
        (data / "x.bin").write_bytes(b"123")
        program.write_text("a = 1")
    job = Job(
        **{"kind": "train", "name": "t", "program": "p.py:P", "train_goal": TrainGoal(accuracy=0.9)} | changes.pop("job", {})
    )
    machine = Machine(cpu_model=changes.pop("cpu", "c"))
    hasher = Hasher(tmp_path / "cache.json")
    return job_fingerprint(job, sources=[program], inputs={"data": data}, versions=changes, machine=machine, hasher=hasher)


def test_a_fingerprint_changes_with_content_versions_machine_and_work_but_not_with_the_goal(tmp_path):
    base = _fingerprint(tmp_path)
    assert _fingerprint(tmp_path) == base
    assert _fingerprint(tmp_path, job={"train_goal": TrainGoal(accuracy=0.5)}) == base
    assert _fingerprint(tmp_path, job={"shards": 2}) != base
    assert _fingerprint(tmp_path, job={"program": "p.py:Q"}) != base
    assert _fingerprint(tmp_path, cpu="d") != base
    assert _fingerprint(tmp_path, numpy="2") != base
    (tmp_path / "p.py").write_text("a = 2")
    assert _fingerprint(tmp_path) != base


def test_a_changed_input_of_the_same_size_is_noticed_despite_the_cache(tmp_path):
    base = _fingerprint(tmp_path)
    (tmp_path / "data" / "x.bin").write_bytes(b"124")
    os.utime(tmp_path / "data" / "x.bin", ns=(1, 1))
    assert _fingerprint(tmp_path) != base


def test_a_missing_input_says_which(tmp_path):
    with pytest.raises(SpecError, match="nothing-here does not exist"):
        input_manifest(tmp_path / "nothing-here", Hasher(tmp_path / "c"))
