"""What every program keeps, whichever library it is written with. One suite over all of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenure.train.programs import Arrays, Program, load_program
from tenure.train.records import pack, read_arrays

from .driver import Driver

MODELS = Path(__file__).parent / "models"
PROGRAMS: dict[str, dict[str, Any]] = {
    "numpy_net.py:Linear": {},
    "estimators.py:Flat": {"loss": "log_loss"},
    "torch_nets.py:Plain": {"optimizer": "sgd", "rate": 0.05},
    "torch_nets.py:Noisy": {"rate": 0.01},
    "torch_nets.py:Own": {},
    "keras_nets.py:plain": {"optimizer": "sgd", "rate": 0.05},
    "keras_nets.py:noisy": {"rate": 0.01},
    "keras_nets.py:compiled": {},
    "keras_nets.py:Own": {"rate": 0.01},
}
ADDITIVE = ("numpy_net.py:Linear", "torch_nets.py:Plain", "keras_nets.py:plain", "keras_nets.py:compiled")
"""Those whose gradient of examples together is the sum of theirs: no batch statistics, no steps within a shard."""

every_program = pytest.mark.parametrize("reference", PROGRAMS)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small uint8 images whose class is the place of a bright row."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(5)
    y = rng.integers(0, 3, 240)
    x = rng.integers(0, 60, (240, 8, 8, 3)).astype(np.uint8)
    x[np.arange(240), 2 * y] += 120
    for name, values in (("x_train", x[:180]), ("y_train", y[:180]), ("x_test", x[180:]), ("y_test", y[180:])):
        np.save(folder / f"{name}.npy", values)
    return folder


@pytest.fixture(scope="module")
def load(images: Path) -> Callable[..., tuple[Program, Arrays, Arrays]]:
    def loaded(reference: str, **options: Any) -> tuple[Program, Arrays, Arrays]:
        program = load_program(reference, MODELS, options or PROGRAMS.get(reference, {}))
        return program, *program.data({"images": str(images)})

    return loaded


def part(arrays: Arrays, first: int, last: int) -> Arrays:
    return {name: np.array(values[first:last]) for name, values in arrays.items()}


def rng(number: int = 0) -> np.random.Generator:
    return np.random.default_rng((7, number))


def digest(arrays: Arrays) -> str:
    return hashlib.sha256(b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def trained(program: Program, train: Arrays, weights: Arrays, rounds: range) -> Arrays:
    """Follow the protocol for some rounds of three shards of twenty."""
    for round_ in rounds:
        total: Arrays = {}
        for shard in range(3):
            first = 60 * (round_ % 3) + 20 * shard
            found, _, n = program.gradient(weights, part(train, first, first + 20), rng(10 * round_ + shard))
            assert n == 20
            total = {name: total[name] + found[name] if total else found[name] for name in found}
        weights = program.update(weights, total, 60, round_)
    return weights


@every_program
def test_methods_leave_their_arguments_and_earlier_answers_alone(load: Any, reference: str) -> None:
    program, train, held_out = load(reference)
    weights = trained(program, train, program.build(1), range(1))
    batch = part(train, 0, 30)
    found, loss, n = program.gradient(weights, batch, rng())
    following = program.update(weights, found, n, 1)
    before = [digest(arrays) for arrays in (weights, batch, found, following)]
    trained(program, train, program.update(weights, found, n, 1), range(2, 4))
    program.evaluate(following, held_out)
    program.build(2)
    assert [digest(arrays) for arrays in (weights, batch, found, following)] == before
    again, loss_again, _ = program.gradient(weights, batch, rng())
    assert (digest(again), loss_again) == (before[2], loss)
    assert digest(program.update(weights, found, n, 1)) == before[3]


@every_program
def test_first_weights_follow_the_seed_alone(load: Any, reference: str) -> None:
    program, train, _ = load(reference)
    first = program.build(3)
    trained(program, train, program.build(4), range(1))
    assert digest(program.build(3)) == digest(first) == digest(load(reference)[0].build(3))
    if not reference.startswith("estimators"):  # linear ones begin at zero
        assert digest(program.build(4)) != digest(first)


@every_program
def test_a_gradient_has_the_names_shapes_and_types_of_its_weights(load: Any, reference: str) -> None:
    program, train, _ = load(reference)
    weights = program.build(0)
    found, _, _ = program.gradient(weights, part(train, 0, 20), rng())
    assert found
    assert {name: (v.shape, v.dtype) for name, v in found.items()} == {n: (weights[n].shape, weights[n].dtype) for n in found}
    for name, values in found.items():  # adding in place to one must not change another
        others = [other for other in found if other != name]
        assert values.size < 2 or 0 not in values.strides
        assert not any(np.may_share_memory(values, found[other]) for other in others)


@pytest.mark.parametrize("reference", ADDITIVE)
def test_gradients_of_shards_add_up_to_that_of_all_their_examples(load: Any, reference: str) -> None:
    program, train, _ = load(reference)
    weights = trained(program, train, program.build(1), range(1))
    whole, loss, n = program.gradient(weights, part(train, 0, 60), rng())
    edges = (0, 7, 32, 60)
    shards = [program.gradient(weights, part(train, a, b), rng()) for a, b in itertools.pairwise(edges)]
    assert sum(shard[2] for shard in shards) == n == 60
    assert sum(shard[1] for shard in shards) == pytest.approx(loss, rel=1e-4)
    for name, values in whole.items():
        np.testing.assert_allclose(sum(shard[0][name] for shard in shards), values, rtol=1e-3, atol=1e-3)


@every_program
def test_another_process_goes_on_from_a_record_with_the_same_bits(load: Any, tmp_path: Path, reference: str) -> None:
    program, train, _ = load(reference)
    middle = trained(program, train, program.build(1), range(2))
    (tmp_path / "record").write_bytes(b"".join(pack(middle)))
    undisturbed = trained(program, train, middle, range(2, 4))
    other = load(reference)[0]
    trained(other, train, other.build(9), range(3))  # what it computed before must not matter
    _, read = read_arrays(tmp_path / "record")
    assert digest(trained(other, train, read, range(2, 4))) == digest(undisturbed)


@every_program
def test_bits_do_not_depend_on_where_arrays_lie_in_memory(load: Any, reference: str) -> None:
    program, train, _ = load(reference)
    weights, batch = trained(program, train, program.build(1), range(1)), part(train, 0, 40)

    def shifted(values: Any) -> Any:
        room = np.empty(values.nbytes + 64, np.uint8)
        moved = room[4 * values.itemsize :][: values.nbytes].view(values.dtype).reshape(values.shape)
        moved[...] = values
        return moved

    found, _, n = program.gradient(weights, batch, rng())
    moved = {name: shifted(values) for name, values in weights.items()}
    again, _, _ = program.gradient(moved, {name: shifted(values) for name, values in batch.items()}, rng())
    assert digest(again) == digest(found)
    assert digest(program.update(moved, again, n, 1)) == digest(program.update(weights, found, n, 1))


@pytest.fixture(scope="module")
def elsewhere(images: Path) -> dict[str, list[str]]:
    """What a fresh process with one thread computes for each program."""
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from tests.train.test_program_contract import MODELS, PROGRAMS, answers\n"
        "from tenure.train.programs import load_program\n"
        "found = {r: answers(load_program(r, MODELS, o), sys.argv[1]) for r, o in PROGRAMS.items()}\n"
        "import torch\nfound['threads'] = [torch.get_num_threads(), torch.get_num_interop_threads()]\n"
        "print(json.dumps(found))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", code, str(images)]
    done = subprocess.run(argv, env=env, cwd=MODELS.parents[2], capture_output=True, text=True, timeout=110, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def answers(program: Program, images: str) -> list[str]:
    train, held_out = program.data({"images": images})
    weights = trained(program, train, program.build(1), range(3))
    found, loss, _ = program.gradient(weights, part(train, 10, 42), rng(99))
    return [digest(weights), digest(found), repr(loss), repr(program.evaluate(weights, held_out))]


@pytest.mark.real
@every_program
def test_another_process_computes_the_same_bits(load: Any, images: Path, elsewhere: Any, reference: str) -> None:
    program, train, _ = load(reference)
    trained(program, train, program.build(5), range(1))
    assert answers(program, str(images)) == elsewhere[reference]


@pytest.mark.real
def test_torch_has_the_threads_that_the_environment_names(elsewhere: Any) -> None:
    assert elsewhere["threads"] == [1, 1]


@pytest.mark.parametrize("reference", ["torch_nets.py:Noisy", "keras_nets.py:noisy"])
def test_a_stage_trains_to_the_same_weights_with_any_number_of_workers(tmp_path: Path, images: Path, reference: str) -> None:
    shas = []
    for workers in (1, 3):
        program = load_program(reference, MODELS, PROGRAMS[reference])
        driver = Driver(tmp_path / str(workers), program=program, inputs={"d": str(images)}, max_rounds=25, evaluate_every=25)
        shas.append(driver.run(workers))
        _, weights = read_arrays(driver.root / "store" / "result")
        _, held_out = program.data({"d": str(images)})
        assert program.evaluate(weights, held_out) > 0.9
    assert shas[0] == shas[1]
