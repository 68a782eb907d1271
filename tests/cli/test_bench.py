"""`tenure bench serve`: what its options mean."""

import pytest

from tenure.cli.bench_serving import _names, _numbers
from tenure.errors import SpecError


def test_lists_are_read_by_commas_and_what_is_left_out_stays_out():
    assert _names("http, grpc") == ("http", "grpc")
    assert _names(None) is None
    assert _numbers("--batches", "1,8, 32") == (1, 8, 32)
    with pytest.raises(SpecError, match="--batches takes whole numbers"):
        _numbers("--batches", "1,many")


def test_the_options_that_are_given_become_a_sweep_and_no_others(monkeypatch):
    from typer.testing import CliRunner

    from tenure import verbs
    from tenure.cli.commands import app

    seen = {}

    def measured(model, examples, **options):
        seen.update(options, model=model.name, examples=examples.name)
        raise SpecError("far enough")

    monkeypatch.setattr(verbs, "bench_serve", measured)
    done = CliRunner().invoke(
        app, ["bench", "serve", "m.onnx", "images", "--repeats", "5", "--cell", "300ms", "--data", "files"]
    )
    assert isinstance(done.exception, SpecError)
    seen.pop("display")
    assert seen.pop("options").instances == 0
    assert seen == {
        "model": "m.onnx",
        "examples": "images",
        "home": None,
        "goal": "",
        "seed": 0,
        "repeats": 5,
        "cell_s": 0.3,
        "data": ("files",),
    }
    CliRunner().invoke(app, ["bench", "serve", "m.onnx", "images", "--quick", "--repeats", "5"])
    assert (seen["repeats"], seen["cell_s"], seen["fresh"]) == (5, 0.2, False)
