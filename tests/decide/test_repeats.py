"""Paired ratios against the first setting: a drift that all share falls out, what one setting does alone stays."""

import numpy as np
import pytest

from tenure.decide.repeats import errors, in_words, paired_with_first
from tenure.nodes import Machine
from tenure.trials import Trial
from tenure.usage import summarize


def trial(name, rates, *, batch=1, twin=0, **factors):
    rates = [float(rate) for rate in rates]
    configuration = {"architecture": "simple", "interaction": "sync", "batch": batch, "load": "closed", **factors}
    configuration |= {"twin": 1} if twin else {}
    return Trial(
        id=name, run_id="r", stage="s", fingerprint="f", source="sweep", configuration=configuration,
        metrics={"images_per_s": summarize(rates)}, machine=Machine(cpu_model="m"), curves={"images_per_s": tuple(rates)},
    )  # fmt: skip


def test_the_error_is_that_of_the_mean_of_the_ratios_by_repeat():
    drift = np.array([1.0, 0.8, 0.6, 0.9])
    first, twin = trial("first", 10 * drift), trial("twin", 10 * drift * [1.0, 1.02, 0.98, 1.0], twin=1)
    other = trial("other", 20 * drift * [1.0, 1.1, 1.0, 1.1], interaction="async")
    pairs = {pair.trial: pair for pair in paired_with_first([other, first, twin])}
    assert set(pairs) == {"other", "twin"}
    ratios = [2.0, 2.2, 2.0, 2.2]
    assert pairs["other"].mean == pytest.approx(2.1)
    assert pairs["other"].standard_error == pytest.approx(np.std(ratios, ddof=1) / 2 / 2.1)
    assert pairs["twin"].twin
    assert pairs["twin"].standard_error == pytest.approx(np.std([1.0, 1.02, 0.98, 1.0], ddof=1) / 2)


def test_each_batch_has_a_first_of_its_own_and_one_without_a_twin_has_none():
    made = [trial("a1", [1, 2]), trial("a1-twin", [1, 2], twin=1), trial("b1", [3, 5], interaction="async")]
    made += [trial("a8", [1, 2], batch=8), trial("b8", [3, 5], batch=8, interaction="async")]
    assert {(pair.trial, pair.against) for pair in paired_with_first(made)} == {("a1-twin", "a1"), ("b1", "a1")}


def test_distributed_settings_have_a_figure_of_their_own():
    made = [
        trial("a", [10, 10, 10]),
        trial("t", [10, 10.1, 10], twin=1),
        trial("n", [20, 20.4, 20], architecture="microservice"),
    ]
    made.append(trial("f", [20, 25, 20], architecture="distributed"))
    found = errors(paired_with_first(made))
    assert found.machine < found.near < found.far
    assert "distributed" in in_words(found)


def test_what_does_not_pair_is_left_out():
    first, twin = trial("a", [10, 10, 10]), trial("t", [10, 10, 10], twin=1)
    assert errors(paired_with_first([first, twin])) is None
    shorter = trial("short", [10, 10], interaction="async")
    assert {pair.trial for pair in paired_with_first([first, twin, shorter])} == {"t"}
    assert paired_with_first([first, shorter]) == ()
