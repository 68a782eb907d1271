"""What lives held-out runs: it sees what differs, and every request that must be refused is."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import image_grammar as grammar
from benchmarks import image_models as models
from benchmarks import image_player as player

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]
SERVICE = models.service("numpy")
SAID = player.Said(status="200", tensors={"y": ("FP32", (1,), b"\0\0\x80\x3f")})
NEARLY = replace(SAID, tensors={"y": ("FP32", (1,), b"\1\0\x80\x3f")})


def numpy_life(path):
    env = {"PATH": os.environ["PATH"]}
    return player.Life([sys.executable, str(ROOT / "benchmarks/programs/numpy_door.py"), str(path)], env)


def a_run(number, model):
    return replace(grammar.draw(SERVICE, number), start=grammar.Start(model=model.name))


def test_two_lives_of_a_run_have_one_outcome_and_another_model_gives_another(tmp_path):
    model = SERVICE.models[1]
    drawn = (a_run(number, model) for number in range(50))
    run = next(run for run in drawn if any(isinstance(exchange, grammar.Infer) for exchange in run.exchanges))
    path, other = (models.write(tmp_path / name, "numpy", model.name, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    outcome = player.live(lambda run: numpy_life(path), run, model)
    assert outcome.exit == "0"
    assert player.differences(outcome, player.live(lambda run: numpy_life(path), run, model)) == []
    assert "other values" in str(player.differences(outcome, player.live(lambda run: numpy_life(other), run, model)))


def test_a_service_that_does_not_start_is_an_outcome(tmp_path):
    outcome = player.live(lambda run: numpy_life(tmp_path / "nothing.npz"), a_run(0, SERVICE.models[1]), SERVICE.models[1])
    assert outcome.exit == "did not listen, 1"
    assert "nothing.npz" in outcome.output
    assert player.differences(replace(outcome, exit="0"), outcome)


def test_floats_are_compared_bit_by_bit_but_of_requests_at_once():
    assert player.differs(SAID, NEARLY) == "y: other values"
    assert player.differs(replace(SAID, near=True), replace(NEARLY, near=True)) == ""
    assert player.differs(replace(SAID, status="503"), SAID).startswith("status")


def test_whatever_must_be_refused_is_by_every_door(tmp_path):
    model = models.service("onnxruntime").models[1]
    path = models.write(tmp_path, "onnxruntime", model.name)
    argv = [sys.executable, "-m", "tenure.serve", "--model", str(path), "--threads", "1"]
    life = player.Life(argv, {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src")})
    try:
        assert life.wait_listening(), life.output()
        with player.Player(life.addresses, model) as client:
            for door in grammar.DOORS:
                for way in grammar.GRPC_REFUSALS if door == "grpc" else grammar.REFUSALS:
                    (said,) = client.play(grammar.Refused(door=door, way=way, values_seed=1))
                    assert said.status.startswith("4") or said.status in ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"), (
                        door,
                        way,
                        said,
                    )
            for door in ("http-json", "grpc"):
                for question in grammar.GRPC_QUESTIONS if door == "grpc" else grammar.QUESTIONS:
                    (said,) = client.play(grammar.Asked(door=door, question=question))
                    wrong = question in ("no such model", "no such page", "options")
                    assert (said.status in ("200", "OK")) != wrong, (door, question, said)
        life.signal(15)
        assert life.wait() == "0"
    finally:
        life.close()


def test_the_program_of_numpy_has_an_exercise(tmp_path):
    path = models.write(tmp_path, "numpy", "convolution")
    life = numpy_life(path)
    try:
        assert life.wait_listening()
        exercise = [
            sys.executable,
            str(ROOT / "benchmarks/programs/numpy_exercise.py"),
            "--at",
            life.addresses["http"],
            "--model",
            "convolution",
        ]
        subprocess.run(exercise, check=True, timeout=60)
    finally:
        life.close()
