"""Held-out runs: the same for ever, each by itself, and all kinds of exchange are among them."""

from collections import Counter

import numpy as np
from benchmarks import image_grammar as grammar

FLOATS = grammar.Served("floats", (grammar.Tensor("x", "FP32", (-1, 64)),), (grammar.Tensor("y", "FP32", (-1, 10)),))
TWO = grammar.Served(
    "two",
    (grammar.Tensor("a", "FP64", (-1, 8)), grammar.Tensor("b", "INT64", (-1,))),
    (grammar.Tensor("label", "INT64", (-1,)), grammar.Tensor("probability", "FP64", (-1, 3))),
)
SERVICE = grammar.Service("pinned", (FLOATS, TWO))
PLAIN = grammar.Service("plain", (FLOATS,), ("http-json", "http-binary"), settings=False)
HELD_OUT = "77b7a0bee8054478674a35b9929624f5af4487ded7976716f2cfa507b4ecfcf3"


def test_the_held_out_runs_are_those_that_were_committed_before_the_closures():
    assert grammar.digest(grammar.runs(SERVICE, 1000) + grammar.runs(PLAIN, 1000)) == HELD_OUT


def test_a_run_can_be_drawn_by_itself():
    assert grammar.draw(SERVICE, 37) == grammar.runs(SERVICE, 40)[37]
    assert grammar.draw(SERVICE, 37, seed=1) != grammar.draw(SERVICE, 37)


def test_a_thousand_runs_hold_every_kind_of_exchange_refusal_question_and_end():
    drawn = grammar.runs(SERVICE, 1000)
    exchanges = [exchange for run in drawn for exchange in run.exchanges]
    assert {type(exchange) for exchange in exchanges} == {grammar.Infer, grammar.Refused, grammar.Asked, grammar.Crowd}
    assert {exchange.way for exchange in exchanges if isinstance(exchange, grammar.Refused)} == set(grammar.REFUSALS)
    assert {exchange.question for exchange in exchanges if isinstance(exchange, grammar.Asked)} == set(grammar.QUESTIONS)
    assert {run.end for run in drawn} == set(grammar.ENDS)
    doors = Counter(exchange.door for exchange in exchanges if isinstance(exchange, grammar.Infer))
    assert set(doors) == set(grammar.DOORS)


def test_a_program_without_settings_and_grpc_gets_neither():
    for run in grammar.runs(PLAIN, 200):
        assert run.start == grammar.Start(model="floats")
        assert all("grpc" not in repr(exchange) for exchange in run.exchanges)


def test_values_have_shape_type_and_kind():
    a, b = TWO.inputs
    assert grammar.values(a, 3, "normal", 5).shape == (3, 8)
    assert np.isnan(grammar.values(a, 3, "nan", 5)).sum() == 1
    assert np.signbit(grammar.values(a, 1, "negative zero", 5)).all()
    assert grammar.values(b, 4, "nan", 5).dtype == np.int64
    assert (grammar.values(a, 3, "normal", 5) == grammar.values(a, 3, "normal", 5)).all()
    assert grammar.values(grammar.Tensor("x", "FP32", (1, 4)), 7, "ones", 0).shape == (1, 4)
