"""What is kept of each cell, and what an experiment that was broken off goes on with."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tenure.experiments.sweep_raw import kept, raw_line

from .test_sweep_visits import SETTING, visit

OTHER = replace(SETTING, interaction="async")
DRAWN = [(0, SETTING), (0, OTHER), (1, OTHER), (1, SETTING), (2, SETTING), (2, OTHER)]


@pytest.fixture
def asked():
    """Five cells of an experiment of two settings: two repeats and a half."""
    return [
        replace(visit(3, 0.5, order=place), repeat=repeat, setting=setting) for place, (repeat, setting) in enumerate(DRAWN)
    ][:5]


def written(tmp_path, asked, torn=b""):
    path = tmp_path / "cells.jsonl"
    path.write_bytes(b"".join(map(raw_line, asked)) + torn)
    return path


def same(one, other):
    return np.allclose(one.latencies_s, other.latencies_s) and replace(one, latencies_s=None) == replace(
        other, latencies_s=None
    )


def test_a_line_tells_people_the_setting_its_place_and_every_metric(asked):
    told = json.loads(raw_line(asked[1]))
    assert (told["architecture"], told["interaction"], told["repeat"], told["order"]) == ("distributed", "async", 0, 1)
    assert told["images_per_s"] == 12.0
    assert told["latencies_s"] == [pytest.approx(0.5 / 3)] * 3


def test_whole_repeats_are_kept_and_the_file_holds_no_others(asked, tmp_path):
    path = written(tmp_path, asked, torn=b'{"architecture": "dis')
    found = kept(path, DRAWN, cells=2)
    assert [each.order for each in found] == [0, 1, 2, 3]
    assert all(map(same, found, asked))
    assert len(path.read_bytes().splitlines()) == 4
    assert all(map(same, kept(path, DRAWN, cells=2), found))


def test_what_another_experiment_left_or_one_that_is_done_is_set_aside(asked, tmp_path):
    path = written(tmp_path, asked)
    content = path.read_bytes()
    other = [(repeat, replace(setting, batch=9)) for repeat, setting in DRAWN]
    for expected in (other, DRAWN[:4]):
        path.write_bytes(content)
        assert kept(path, expected, cells=2) == []
        assert not path.exists()
    assert [each.read_bytes() for each in tmp_path.glob("cells-*.jsonl")] == [content] * 2
    assert kept(tmp_path / "nothing.jsonl", DRAWN, cells=2) == []
