"""What the adapters of torch and Keras promise beyond the contract of all programs."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenure.errors import MissingExtra, SpecError
from tenure.train.programs import Arrays, load_program

from .test_program_contract import MODELS, digest, part, rng, trained
from .test_program_contract import images as images

torch = pytest.importorskip("torch", reason="needs the extra torch")
keras_too = pytest.mark.parametrize("reference", ["torch_nets.py:Plain", "keras_nets.py:plain"])


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def load(reference: str, images: Path, **options: Any) -> tuple[Any, Arrays, Arrays]:
    if "cut" in options:
        options["cache"] = False  # what the adapter does by itself; the cache is `features`
    program: Any = load_program(reference, MODELS, options)
    return program, *program.data({"images": str(images)})


@pytest.mark.parametrize(
    ("reference", "mean"), [("torch_nets.py:Noisy", "features.3.running_mean"), ("keras_nets.py:noisy", "004.moving_mean")]
)
def test_running_statistics_move_by_the_mean_of_the_shards_changes_by_examples(images: Path, reference: str, mean: str) -> None:
    program, train, _ = load(reference, images)
    weights = program.build(0)
    shards = [program.gradient(weights, part(train, 0, 30), rng(0)), program.gradient(weights, part(train, 30, 40), rng(1))]
    means = [weights[mean] + found[mean] / n for found, _, n in shards]
    summed = {key: shards[0][0][key] + shards[1][0][key] for key in shards[0][0]}
    following = program.update(weights, summed, 40, 0)
    np.testing.assert_allclose(following[mean], 0.75 * means[0] + 0.25 * means[1], rtol=1e-5, atol=1e-7)
    assert not np.array_equal(following[mean], weights[mean])
    if reference.startswith("torch"):
        assert following["features.3.num_batches_tracked"] == 1


def test_what_is_not_trained_is_in_the_weights_and_never_in_a_gradient(images: Path) -> None:
    for reference, frozen in (("torch_nets.py:Noisy", "features.0.bias"), ("keras_nets.py:noisy", "000.kernel")):
        program, train, _ = load(reference, images)
        weights = program.build(0)
        found, _, _ = program.gradient(weights, part(train, 0, 20), rng())
        assert frozen in weights
        assert frozen not in found
        assert np.array_equal(trained(program, train, weights, range(2))[frozen], weights[frozen])


def test_randomness_follows_the_shards_generator_and_leaves_the_others_alone(images: Path) -> None:
    for reference in ("torch_nets.py:Noisy", "keras_nets.py:noisy"):
        program, train, _ = load(reference, images)
        before = torch.get_rng_state()
        weights, batch = program.build(0), part(train, 0, 20)
        found = [digest(program.gradient(weights, batch, rng(number))[0]) for number in (1, 2, 1)]
        assert found[0] == found[2] != found[1]
        assert torch.equal(torch.get_rng_state(), before)


def test_a_ready_object_begins_with_weights_of_the_seed(images: Path) -> None:
    for reference in ("torch_nets.py:ready", "keras_nets.py:ready"):
        first, second = load(reference, images, rate=0.01)[0], load(reference, images)[0]
        assert digest(first.build(1)) == digest(first.build(1))
        names = [name for name in first.build(1) if not name.startswith("optimizer")]
        assert all(np.array_equal(first.build(1)[name], second.build(1)[name]) for name in names)


def test_a_plain_torch_loop_ends_with_the_same_weights(images: Path) -> None:
    program, train, held_out = load("torch_nets.py:Plain", images, optimizer="adam", rate=0.01, width=4)
    weights = program.build(3)
    own = load_program("torch_nets.py:Plain", MODELS, {"width": 4})._whole  # type: ignore[attr-defined]
    own.load_state_dict({name: torch.tensor(values) for name, values in weights.items()})
    optimizer = torch.optim.Adam(own.parameters(), lr=0.01)
    for round_ in range(4):
        first = 40 * round_
        found, _, n = program.gradient(weights, part(train, first, first + 40), rng())
        weights = program.update(weights, found, n, round_)
        x = torch.tensor(np.array(train["x"][first : first + 40])).permute(0, 3, 1, 2) / 255
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(own(x), torch.tensor(train["y"][first : first + 40])).backward()
        optimizer.step()
    for name, values in own.state_dict().items():
        np.testing.assert_allclose(weights[name], values.numpy(), rtol=1e-4, atol=1e-6)
    assert 0 <= program.evaluate(weights, held_out) <= 1


def test_images_keep_their_layout_unless_the_module_cannot_take_it(images: Path, tmp_path: Path) -> None:
    free, train, _ = load("torch_nets.py:Plain", images, width=6)
    bound = load("torch_nets.py:Viewing", images)[0]
    weights = free.build(0)
    counted = {**weights, "calls": np.zeros(1, np.float32)}
    found, loss, _ = free.gradient(weights, part(train, 0, 40), rng())
    again, loss_again, n = bound.gradient(counted, part(train, 0, 40), rng())
    assert (free._channels_last, bound._channels_last) == (True, False)
    assert loss_again == pytest.approx(loss, rel=1e-5)
    assert all(np.allclose(again[name], found[name], rtol=1e-3, atol=1e-4) for name in found)
    assert again["calls"] == n  # one call; the trial left nothing behind
    bound.export(counted, tmp_path / "model.onnx")


def test_memory_that_a_step_frees_stays_with_the_process(images: Path) -> None:
    load("torch_nets.py:Plain", images)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    block = torch.ones(16 << 20)  # 64 MiB: more than glibc ever keeps of its own accord
    before = resident()
    del block
    assert before - resident() < 32 << 20


def test_own_pieces_are_used(images: Path) -> None:
    program, train, held_out = load("torch_nets.py:Own", images)
    weights = trained(program, train, program.build(0), range(2))
    assert "optimizer/classifier.bias/grad_avg" in weights  # RMSprop's
    assert program.augments(train["x"][:2])
    assert not load("torch_nets.py:Plain", images)[0].augments(train["x"][:2])
    plain = load("torch_nets.py:Plain", images)[0]
    state = {name: values for name, values in weights.items() if not name.startswith("optimizer")}
    assert not np.array_equal(program.predict(weights, held_out["x"]), plain.predict(state, held_out["x"]))


@pytest.mark.parametrize("reference", ["torch_nets.py:Own", "keras_nets.py:Own"])
def test_a_schedule_scales_the_rate_by_the_round_alone(images: Path, reference: str) -> None:
    program, train, _ = load(reference, images)
    weights = program.build(0)
    found, _, n = program.gradient(weights, part(train, 0, 60), rng())
    late = digest(program.update(weights, found, n, 9))
    first = digest(program.update(weights, found, n, 0))
    assert late != first
    assert digest(program.update(weights, found, n, 9)) == late


@keras_too
def test_an_exported_model_gives_the_programs_labels_for_any_batch(images: Path, tmp_path: Path, reference: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    for options in ({}, {"cut": "classifier"}):
        program, train, held_out = load(reference, images, rate=0.01, **options)
        weights = trained(program, train, program.build(0), range(6))
        program.export(weights, tmp_path / "model.onnx")
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["label", "probabilities"]
        for n in (1, 60):
            labels, shares = session.run(None, {"x": held_out["x"][:n].astype(np.float32)})
            assert labels.dtype == np.int64
            assert np.array_equal(labels, program.predict(weights, held_out["x"][:n]))
            np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)


@keras_too
def test_a_head_on_cached_features_trains_as_one_behind_the_frozen_part(images: Path, reference: str) -> None:
    program, train, held_out = load(reference, images, cut="classifier", rate=0.01)
    weights = program.build(2)
    found, loss, _ = program.gradient(weights, part(train, 0, 40), rng())
    assert len(found) == 2  # the classifier's weights and its bias
    features = program.features(np.array(train["x"][:40]))
    expected = program.evaluate(weights, held_out)
    program.on_features = True
    again, loss_again, _ = program.gradient(weights, {"x": features, "y": np.array(train["y"][:40])}, rng())
    assert loss_again == pytest.approx(loss, rel=1e-5)
    assert all(np.allclose(found[name], again[name], rtol=1e-4, atol=1e-5) for name in found)
    x = program.features(np.array(held_out["x"]))
    assert program.evaluate(weights, {"x": x, "y": held_out["y"]}) == expected
    assert np.mean(program.predict(weights, held_out["x"]) == held_out["y"]) == expected  # of images, as ever


@keras_too
def test_the_frozen_parts_identity_changes_with_its_weights_and_its_cut(images: Path, reference: str) -> None:
    program = load(reference, images, cut="classifier")[0]
    same, other = load(reference, images, cut="classifier")[0], load(reference, images, cut="classifier", width=5)[0]
    assert program.identity() == same.identity() != other.identity()
    with pytest.raises(SpecError, match="no frozen part"):
        load(reference, images)[0].identity()


def test_a_module_can_be_cut_where_training_and_evaluation_differ(images: Path) -> None:
    program, train, held_out = load("torch_nets.py:Branching", images, cut="classifier", rate=0.01)
    weights = trained(program, train, program.build(0), range(2))
    whole = load("torch_nets.py:Branching", images)[0]
    all_weights = whole.build(0)
    for name, tensor in program._whole.state_dict().items():
        all_weights[name] = tensor.numpy().copy()
    assert np.array_equal(program.predict(weights, held_out["x"]), whole.predict(all_weights, held_out["x"]))


@pytest.mark.parametrize(
    ("reference", "options", "text"),
    [
        ("torch_nets.py:Plain", {"optimizer": "lbfgs"}, "no optimizer 'lbfgs'; valid: adam, adamw, sgd"),
        ("torch_nets.py:Plain", {"rate": -1.0}, "optimizer 'adam': Invalid learning rate"),
        ("torch_nets.py:Plain", {"depth": 3}, "its options .*depth.* do not fit"),
        ("torch_nets.py:Plain", {"cut": "head"}, "cut = 'head' names no submodule; it has: features"),
        ("torch_nets.py:Skipping", {"cut": "classifier"}, "after 'classifier', step .* uses .* of the part before it"),
        ("torch_nets.py:Looking", {"cut": "classifier"}, "steps can't be recorded"),
        ("torch_nets.py:Lazy", {}, "classifier.weight gets its shape from the first input only"),
        ("torch_nets.py:Half", {}, "features.0.weight is torch.bfloat16 on cpu; weights must be"),
        ("keras_nets.py:plain", {"cut": "head"}, "cut = 'head' names no layer; it has: .*classifier"),
        ("keras_nets.py:Own", {"cut": "dense"}, "can't be cut at 'dense'"),
        ("keras_nets.py:compiled", {"rate": 0.1}, "compiled with its optimizer"),
        ("keras_nets.py:plain", {"optimizer": "lbfgs"}, "no optimizer 'lbfgs'"),
        ("numpy_net.py:Linear", {"rate": 0.1}, "no model of torch or Keras but Linear"),
    ],
)
def test_what_does_not_fit_a_model_is_refused_in_words(images: Path, reference: str, options: Any, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        load(reference, images, **options)


def test_losses_of_another_shape_and_weights_of_another_model_are_refused_in_words(images: Path) -> None:
    program, train, _ = load("torch_nets.py:Summed", images)
    with pytest.raises(SpecError, match=r"gave shape \(1,\) for 20 examples"):
        program.gradient(program.build(0), part(train, 0, 20), rng())
    for reference in ("torch_nets.py:make", "keras_nets.py:plain"):
        small, large = load(reference, images, width=3)[0], load(reference, images, width=4)[0]
        with pytest.raises(SpecError, match=r"the weights have \(3,.*begin a new run|the weights have \(3, 3, 3, 3\)"):
            large.gradient(small.build(0), part(train, 0, 20), rng())


def test_a_transform_that_evaluation_needs_cannot_be_exported(images: Path, tmp_path: Path) -> None:
    program, _, _ = load("torch_nets.py:Scaled", images)
    with pytest.raises(SpecError, match=r"transform.*changes x"):
        program.export(program.build(0), tmp_path / "model.onnx")


def test_a_missing_library_is_named_with_what_installs_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    with pytest.raises(MissingExtra, match=r'pip install "tenure\[torch\]"'):
        load_program("net.py:Net", tmp_path, {})


def test_another_backend_of_keras_is_refused(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    keras = pytest.importorskip("keras", reason="needs the extra keras")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(SpecError, match="Keras runs on jax here"):
        load("keras_nets.py:plain", images)
