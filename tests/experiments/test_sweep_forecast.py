"""Forecasts over a declared link: from the right trials of the same experiment, kept and shown beside what was measured."""

from dataclasses import replace

import pytest

from tenure.decide.links import Connections
from tenure.experiments.report import build_report, render_html
from tenure.experiments.sweep_forecast import CURVE, with_forecasts
from tenure.links import parse_link

from .bench_synthetic import bench_run, sweep_trials

LINK = parse_link("rate=1Gbit,delay=20ms")
IMAGE_BYTES, ANSWER_BYTES = 602_112, 4004


def foretold(trials, link=LINK):
    return with_forecasts(
        trials,
        link,
        image_bytes=IMAGE_BYTES,
        answer_bytes=ANSWER_BYTES,
        in_flight=lambda batch: 8,
        tcp=lambda transport, places: Connections(count=places),
    )


def test_what_goes_over_the_link_is_foretold_from_the_same_transport_batch_and_data():
    trials = foretold(sweep_trials())
    far = [trial for trial in trials if trial.configuration["architecture"] == "distributed"]
    assert far
    assert all((CURVE in trial.curves) == (trial in far) for trial in trials)
    for trial in far:
        value, low, high = trial.curves[CURVE]
        assert low < value < high
        assert "Foretold bound: " in trial.note
        factors = trial.configuration
        (near,) = [
            other.metrics["images_per_s"].mean
            for other in trials
            if other.configuration == {**factors, "architecture": "microservice", "link": "loopback"}
        ]
        assert value <= near * 1.001
        assert value <= 1e9 / 8 / IMAGE_BYTES
        if factors["interaction"] == "sync":  # a request is alone on the link: there and back, at least
            assert value <= factors["batch"] / 0.04


def test_without_the_local_trials_nothing_is_foretold_and_the_note_says_why():
    alone = [trial for trial in sweep_trials() if trial.configuration["architecture"] == "distributed"]
    for trial in foretold(alone):
        assert CURVE not in trial.curves
        assert "Nothing foretold: local trials with 1 and" in trial.note


@pytest.mark.parametrize("declared", ["", "rate=2Gbit"])
def test_another_link_than_the_declared_one_is_left_alone(declared):
    trials = sweep_trials()
    assert foretold(trials, parse_link(declared)) == tuple(trials)


def test_the_page_shows_what_was_foretold_beside_what_was_measured():
    page = render_html(build_report(replace(bench_run(), trials=foretold(sweep_trials()))))
    table = page[page.index("Images/s over the declared link") :]
    assert "foretold" in table
    assert "inside" in table or "outside" in table
    assert "The link: foretold, and measured" not in render_html(build_report(bench_run()))
