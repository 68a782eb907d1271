"""The grid of predicted pictures: taken from the artefact it cites, readable without colour, and no report fails over it."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tenure.experiments.report import build_report, render_html
from tenure.experiments.report_predictions import read_predictions

from .synthetic import full_run


def made(**more):
    rng = np.random.default_rng(1)
    expected = np.repeat(np.arange(3), 4)
    predicted = np.where(np.arange(12) % 4 == 0, (expected + 1) % 3, expected)
    confusion = np.zeros((3, 3), np.int64)
    np.add.at(confusion, (expected, predicted), 1)
    return {
        "index": np.arange(12) * 5,
        "expected": expected,
        "predicted": predicted,
        "confusion": confusion,
        "classes": np.array(["cat", "dog", "<b>ship"]),
        "pictures": rng.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8),
        **more,
    }


def report(found):
    plain = replace(full_run(), predictions={"train": found}, trials=(), recommendations=(), leases=(), events=(), usage=())
    return build_report(plain)


def blocks(report, kind):
    return [block for section in report["sections"] for block in section["blocks"] if block["kind"] == kind]


def test_every_picture_and_count_is_the_element_it_cites():
    found = made()
    (grid,) = blocks(report(found), "pictures")
    names = [str(name) for name in found["classes"]]
    for item in grid["items"]:
        assert item["cite"]["artefact"] == "train/predictions.npz"
        place = item["cite"]["index"]
        assert item["predicted"] == names[found[item["cite"]["array"]][place]]
        with Image.open(io.BytesIO(base64.b64decode(item["png"]))) as picture:
            assert np.array_equal(np.asarray(picture), found["pictures"][place])
    assert sum(item["right"] for item in grid["items"]) == 9
    assert "9 of these 12 are right; of all, 9 (75.0%)" in grid["alt"]
    table = next(block for block in blocks(report(found), "table") if "true class" in block["columns"])
    cells = [cell for row in table["rows"] for cell in row if "cite" in cell]
    assert [cell["value"] for cell in cells] == [int(found["confusion"][tuple(cell["cite"]["index"])]) for cell in cells]


def test_right_and_wrong_are_told_by_sign_word_and_frame_and_each_picture_has_a_text():
    page = render_html(report(made()))
    assert page.count('<li class="right"') == page.count("✓</span>") == page.count("<span>right</span>") == 9
    assert page.count('<li class="wrong"') == page.count("✗</span>") == 3
    assert page.count("<span>true: ") == 3
    assert re.findall(r'alt="([^"]*)"', page)[0] == "held-out picture 0, a cat"
    assert "dashed" in page
    assert "<b>ship" not in page, "names are text"
    sources = re.findall(r'<img src="([^"]*)"', page)
    assert len(sources) == 12
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_examples_that_are_no_pictures_have_the_table_alone():
    found = made()
    del found["pictures"]
    assert not blocks(report(found), "pictures")
    assert any("true class" in block["columns"] for block in blocks(report(found), "table"))


@pytest.mark.parametrize(
    "broken",
    [
        {"predicted": np.full(12, 3)},
        {"confusion": np.zeros((2, 2))},
        {"pictures": np.zeros((11, 8, 8, 3), np.uint8)},
        {"classes": np.array([None])},
    ],
    ids=["label", "confusion", "pictures", "objects"],
)
def test_an_artefact_of_another_make_costs_the_grid_and_not_the_report(tmp_path, broken):
    np.savez(tmp_path / "p.npz", **made(**broken))
    assert read_predictions(tmp_path / "p.npz") is None
    (tmp_path / "torn.npz").write_bytes((tmp_path / "p.npz").read_bytes()[:100])
    assert read_predictions(tmp_path / "torn.npz") is None
    assert read_predictions(tmp_path / "none.npz") is None
    np.savez(tmp_path / "whole.npz", **made())
    assert read_predictions(tmp_path / "whole.npz") is not None
