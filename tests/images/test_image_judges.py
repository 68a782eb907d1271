"""The judges of images' benchmarks: what counts as a miss, as an unseen file, as a wrong answer."""

import json
from dataclasses import replace

import numpy as np
from benchmarks import image_answers as answers
from benchmarks import image_builds as builds
from benchmarks import image_models as models
from benchmarks import image_soundness as soundness
from benchmarks.image_player import Outcome, Said

RIGHT = Said(status="200", tensors={"y": ("FP32", (1,), np.float32([1.0]).tobytes())})
NEAR = replace(RIGHT, tensors={"y": ("FP32", (1,), np.nextafter(np.float32([1.0]), np.float32(2)).tobytes())})
FAR = replace(RIGHT, tensors={"y": ("FP32", (1,), np.float32([1.1]).tobytes())})


class Fixed:
    """A subject whose lives are given."""

    def __init__(self, processes, roots):
        self.subject = soundness.Subject("numpy", None)
        self.subject.expected = lambda run, prefix=(): processes.pop(0)
        self.subject.found = lambda run, root=None: roots.pop(0)
        self.subject.image = lambda kind: None
        self.subject._repair = lambda run, expected, missed: ""

    def judged(self):
        self.subject.tally.runs = 1  # the first is traced
        self.subject.judge(1)
        return self.subject.tally


def ended(exit):
    return Outcome(said=(), exit=exit)


def test_a_run_that_differs_twice_is_a_miss_and_one_that_differs_between_two_processes_is_unsteady():
    missed = Fixed([ended("0"), ended("0")], [ended("1"), ended("1")]).judged()
    assert (len(missed.misses), missed.unsteady) == (1, [])
    unsteady = Fixed([ended("0"), ended("1")], [ended("1"), ended("1")]).judged()
    assert (unsteady.misses, len(unsteady.unsteady)) == ([], 1)
    once = Fixed([ended("0"), ended("0")], [ended("1"), ended("0")]).judged()
    assert (once.misses, len(once.unsteady)) == ([], 1)
    assert Fixed([ended("0")], [ended("0")]).judged().misses == []


def test_the_trace_tells_what_was_opened_for_reading_and_is_in_no_closure(tmp_path):
    here, source = tmp_path.parent / "x.so", "/usr/lib/python3/json/__init__.py"
    seen = [
        f'7 openat(AT_FDCWD</>, "x.so", O_RDONLY|O_CLOEXEC) = 3<{json.__file__}>',
        '7 openat(AT_FDCWD</>, "gone", O_RDONLY) = -1 ENOENT (No such file or directory)',
        '7 openat(AT_FDCWD</>, "out", O_WRONLY|O_CREAT, 0666) = 3</var/lib/out>',
        '7 openat(AT_FDCWD</>, "stat", O_RDONLY) = 3</proc/7/stat>',
    ]
    assert soundness.unseen(seen, {str(here), source}) == {json.__file__}
    assert soundness.unseen(seen, {json.__file__}) == set()


def test_files_are_sorted_by_why_they_are_there(tmp_path):
    entries = [
        {"path": "/a/m.py", "reasons": [["opened", "python"]]},
        {"path": "/a/n.py", "reasons": [["statted"]]},
        {"path": "/a/lib.so.1", "reasons": [["opened", "python"], ["needed", "x"]]},
        {"path": "/a/gone.py", "reasons": [["opened"]]},
    ]
    for entry in entries[:3]:
        path = tmp_path / "root" / entry["path"].lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / builds.LOCK).write_text(json.dumps({"files": entries}))
    image = builds.Built(engine="numpy", kind="convolution", model=tmp_path, home=tmp_path, name="n", folder=tmp_path)
    assert soundness.sorts(image) == {"module": ["/a/m.py"], "shared object": ["/a/lib.so.1"], "only stat-ed": ["/a/n.py"]}


def test_bits_may_differ_only_where_the_cpu_is_emulated():
    assert answers.compare("c", [RIGHT], [RIGHT], emulated=False) == answers.Cell(name="c", exact=True)
    assert answers.compare("c", [RIGHT], [NEAR], emulated=False).wrong
    assert answers.compare("c", [RIGHT], [NEAR], emulated=True) == answers.Cell(name="c")
    assert answers.compare("c", [RIGHT], [FAR], emulated=True).wrong


def test_every_form_gets_the_same_twelve_requests_and_a_program_without_grpc_eight():
    assert answers.requests(models.service("litert"), 3) == answers.requests(models.service("litert"), 3)
    assert len(answers.requests(models.service("litert"), 0)) == 12
    assert len(answers.requests(models.service("numpy"), 0)) == 8


def test_a_turned_bit_is_one_bit(tmp_path):
    path = models.write(tmp_path, "numpy", "convolution")
    before = models.weights("convolution", 0)
    models.turn_a_bit(path)
    with np.load(path) as after:
        changed = {name: (after[name] != before[name]).sum() for name in before}
    assert sum(changed.values()) == changed["filters"] == 1
