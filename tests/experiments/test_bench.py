"""`tenure bench serve` as a job file, and goals as people write them."""

import numpy as np
import pytest

from tenure.errors import NotFound, SpecError
from tenure.experiments.bench import BenchSpec, bench_job_file, parse_goal
from tenure.jobfile import parse_job_file
from tenure.jobs import ServeGoal
from tenure.sweeps import Search, Sweep


def test_the_experiment_is_an_ordinary_job(tmp_path):
    (tmp_path / "My Model.onnx").touch()
    (tmp_path / "images").mkdir()
    spec = BenchSpec(
        model=tmp_path / "My Model.onnx", examples=tmp_path / "images", sweep=Sweep(batches=(1, 2)), goal="p99<50ms", seed=4
    )
    parsed = parse_job_file(bench_job_file(spec))
    (job,) = parsed.stages
    assert parsed.name == "my-model"
    assert (job.kind, job.sweep, job.seed) == ("serve", Sweep(batches=(1, 2)), 4)
    assert job.serve_goals == (ServeGoal(name="p99<50ms", p99_s=0.05),)
    assert dict(job.inputs) == {"images": str(tmp_path / "images")}


def test_an_array_of_examples_goes_without_pictures(tmp_path):
    (tmp_path / "m.onnx").touch()
    np.save(tmp_path / "x.npy", np.zeros(3))
    (job,) = parse_job_file(bench_job_file(BenchSpec(model=tmp_path / "m.onnx", examples=tmp_path / "x.npy"))).stages
    assert dict(job.inputs) == {"x": str(tmp_path / "x.npy")}


def test_a_search_takes_the_place_of_the_sweep_and_asks_for_the_most_images_without_a_goal(tmp_path):
    (tmp_path / "m.onnx").touch()
    np.save(tmp_path / "x.npy", np.zeros(3))
    spec = BenchSpec(model=tmp_path / "m.onnx", examples=tmp_path / "x.npy", search=Search(instances=(1, 2)), clients=3)
    (job,) = parse_job_file(bench_job_file(spec)).stages
    assert (job.sweep, job.search) == (None, Search(instances=(1, 2)))
    assert job.serve_goals == (ServeGoal(name="the most images/s", clients=3),)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFound, match="is no model file"):
        BenchSpec(model=tmp_path / "m.onnx", examples=tmp_path)
    (tmp_path / "m.onnx").touch()
    with pytest.raises(NotFound, match="does not exist"):
        BenchSpec(model=tmp_path / "m.onnx", examples=tmp_path / "images")


def test_a_goal_reads_as_people_write_it():
    goal = parse_goal("p99 < 50ms, images/s>=100,memory<2GiB")
    assert (goal.p99_s, goal.images_per_s, goal.memory_bytes) == (0.05, 100.0, 2 << 30)
    assert goal.name == "p99 < 50ms, images/s>=100,memory<2GiB"


@pytest.mark.parametrize("text", ["", "p99>50ms", "p99<soon", "speed>1", "p99<1s,p99<2s", "images/s>many", "images/s<3"])
def test_a_goal_that_cannot_be_read_is_refused(text):
    with pytest.raises(SpecError):
        parse_goal(text)
