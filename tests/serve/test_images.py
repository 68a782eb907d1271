"""From image files to labels: pixels as Pillow makes them, order kept, bad files told, memory bounded."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.serve.conftest import Server

from tenure.errors import SpecError
from tenure.serve import Model, pixels
from tenure.serve.faults import Overloaded
from tenure.serve.images import Classified
from tenure.serve.pixels import BadImage, Preparation, preparation_for
from tenure.serve.tensors import ModelMetadata, TensorMetadata

onnx = pytest.importorskip("onnx", reason="onnx (extra demo) makes the test models")

COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
SIDE = 32
UINT8 = Preparation(height=SIDE, width=SIDE, channels_first=False, dtype=np.dtype(np.uint8))


def make_colours(path: Path, *, rows: int | str, floats: bool) -> None:
    """Write a model whose scores are the mean of each colour: the class of a picture is its strongest colour."""
    helper, kinds = onnx.helper, onnx.TensorProto
    shape, axes = ([rows, 3, SIDE, SIDE], [2, 3]) if floats else ([rows, SIDE, SIDE, 3], [1, 2])
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=kinds.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["scores"], axes=axes, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("x", kinds.FLOAT if floats else kinds.UINT8, shape)],
        [helper.make_tensor_value_info("scores", kinds.FLOAT, [rows, 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("colour_models")
    make_colours(folder / "any.onnx", rows="n", floats=False)
    make_colours(folder / "one.onnx", rows=1, floats=True)
    make_colours(folder / "three.onnx", rows=3, floats=True)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> list[str]:
    """50 pictures, red, green, blue in turn."""
    folder = tmp_path_factory.mktemp("pictures")
    names = []
    for index in range(50):
        colour = list(COLOURS.values())[index % 3]
        names.append(str(folder / f"{index:03}.{'jpg' if index % 5 else 'png'}"))
        Image.new("RGB", (60 + index, 48), colour).save(names[-1])
    return names


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def picture(width: int, height: int) -> Image.Image:
    """Smooth, different everywhere, and nothing like its mirror image."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 127 + 120 * np.sin(6 * x / width + 3 * y / height)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def without_simplejpeg(monkeypatch) -> None:
    monkeypatch.setattr(pixels, "_found", [None])


@pytest.mark.parametrize("name", ["any", "one", "three"])
@pytest.mark.parametrize("workers", [1, 4])
def test_every_file_gets_its_label_in_order(models, files, name, workers):
    with Model(models / f"{name}.onnx", instances=2, threads=1) as model:
        how = preparation_for(model.metadata(), normalise="unit" if name != "any" else None)
        found = list(model.classify(iter(files), preparation=how, workers=workers, top=2))
    assert [each.path for each in found] == files
    assert [each.classes[0] for each in found] == [index % 3 for index in range(50)]
    assert all(len(each.scores) == 2 and each.scores[0] > each.scores[1] and not each.error for each in found)


@pytest.mark.parametrize("batch", [0, 1, 7, 64])
def test_a_model_that_takes_any_number_gets_batches(models, files, batch):
    with Model(models / "any.onnx") as model:
        sizes = []
        real = model._transport.infer
        model._transport.infer = lambda name, inputs, outputs: (sizes.append(len(inputs["x"])), real(name, inputs, outputs))[1]
        found = list(model.classify(files, batch=batch, workers=1))
    assert [each.classes[0] for each in found] == [index % 3 for index in range(50)]
    assert sum(sizes) == 50
    assert max(sizes) == min(batch or 8, 50)


def test_bad_files_are_reported_with_their_reason_and_the_others_answered(models, files, tmp_path):
    content = Path(files[1]).read_bytes()
    bad = {"torn.jpg": content[: len(content) // 2], "text.jpg": b"no picture", "empty.png": b"", "head.jpg": b"\xff\xd8\xff"}
    for name, what in bad.items():
        (tmp_path / name).write_bytes(what)
    asked = [str(tmp_path / "absent.jpg"), files[0], *(str(tmp_path / name) for name in bad), files[1], str(tmp_path)]
    with Model(models / "any.onnx") as model:
        found = list(model.classify(asked))
        only_bad = list(model.classify([asked[0]]))
    assert [each.path for each in found] == asked
    assert [each.classes[:1] for each in found] == [(), (0,), (), (), (), (), (1,), ()]
    assert all(bool(each.error) != bool(each.classes) for each in found)
    assert "No such file" in found[0].error
    assert "\n" not in "".join(each.error for each in found)
    assert [each.error for each in only_bad] == [found[0].error]


@pytest.mark.real
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_model_of_a_server_gives_the_same_labels(models, files, scheme, tmp_path):
    server = Server(models, tmp_path)
    try:
        target = f"{scheme}://{server.endpoints[scheme]}"
        with Model(target, "any") as model:
            found = list(model.classify(files))
        with Model(models / "any.onnx") as here:
            assert found == list(here.classify(files))
    finally:
        server.end()


def test_nothing_is_read_ahead_of_who_takes_no_results(models, files):
    taken = []

    def named():
        while True:
            taken.append(1)
            yield files[0]

    with Model(models / "any.onnx") as model:
        results = model.classify(named(), workers=2)
        assert not taken
        for _ in range(100):
            next(results)
        assert len(taken) <= 100 + 2 * 3 * 8 + 8
        results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_an_overloaded_server_is_asked_again_and_other_failures_end_the_run(models, files):
    with Model(models / "any.onnx") as model:
        real, refusals = model._transport.infer, iter([Overloaded("full", retry_after_s=0.001)] * 5)

        def infer(name, inputs, outputs):
            refused = next(refusals, None)
            if refused is not None:
                raise refused
            return real(name, inputs, outputs)

        model._transport.infer = infer
        assert len(list(model.classify(files))) == 50

        def fail(name, inputs, outputs):
            raise SpecError("no more")

        model._transport.infer = fail
        with pytest.raises(SpecError, match="no more"):
            list(model.classify(files))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (40, 33), (SIDE, SIDE), (3, 2000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_middle_is_cut_and_resized_as_pillow_does(size, kind):
    content = encoded(picture(*size), kind)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    side = min(size) * 0.875
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    expected = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    difference = np.abs(pixels.decode(content, UINT8).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 3


def test_a_picture_far_larger_than_needed_is_decoded_small_and_looks_the_same(monkeypatch):
    content = encoded(picture(1600, 1200), quality=95)
    found = pixels.decode(content, UINT8).astype(int)
    without_simplejpeg(monkeypatch)
    assert np.abs(found - pixels.decode(content, UINT8).astype(int)).max() <= 3


def test_without_simplejpeg_pillow_decodes_alike(monkeypatch, caplog):
    content = encoded(picture(320, 240))
    found = pixels.decode(content, UINT8).astype(int)
    monkeypatch.setattr(pixels, "_found", [])
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    for _ in range(2):
        assert np.abs(found - pixels.decode(content, UINT8).astype(int)).max() <= 2
    assert caplog.text.count("tenure[images]") == 1
    with pytest.raises(BadImage):
        pixels.decode(content[:2000], UINT8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(300, 200), exif=exif, quality=95)
    fast = pixels.decode(content, UINT8).astype(int)
    without_simplejpeg(monkeypatch)
    assert np.abs(fast - pixels.decode(content, UINT8).astype(int)).max() <= 3


def test_gray_cmyk_transparent_and_deep_pictures_become_colours():
    gray = picture(100, 100).convert("L")
    for content in (encoded(gray), encoded(gray, "PNG"), encoded(picture(100, 100).convert("CMYK")), encoded(gray, "GIF")):
        assert pixels.decode(content, UINT8).shape == (SIDE, SIDE, 3)
    clear = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    assert pixels.decode(encoded(clear, "PNG"), UINT8).min() == 255
    deep = Image.fromarray(np.full((50, 50), 200 << 8, np.uint16))
    assert np.unique(pixels.decode(encoded(deep, "PNG"), UINT8)).tolist() == [200]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(kind, monkeypatch):
    monkeypatch.setattr(pixels, "MAX_PIXELS", 9_999)
    with pytest.raises(BadImage, match="100 x 100 pixels; at most 9999"):
        pixels.decode(encoded(picture(100, 100), kind), UINT8)


def test_a_file_that_is_too_large_is_refused(monkeypatch, files):
    monkeypatch.setattr(pixels, "MAX_FILE_BYTES", 100)
    with pytest.raises(BadImage, match="at most 100 are read"):
        pixels.read_into(np.zeros(UINT8.shape, np.uint8), files[0], UINT8)


@pytest.mark.parametrize(
    ("normalise", "formula"),
    [
        ("none", lambda p: p),
        ("unit", lambda p: p / 255),
        ("signed", lambda p: p / 127.5 - 1),
        ("imagenet", lambda p: (p / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])),
    ],
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_floats_are_normalised_as_said(normalise, formula, first, dtype):
    shown = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    how = Preparation(height=SIDE, width=SIDE, channels_first=first, dtype=np.dtype(dtype), normalise=normalise)
    row = np.empty(how.shape, how.dtype)
    pixels.fill(row, shown, how)
    expected = formula(shown.astype(float))
    np.testing.assert_allclose(np.moveaxis(row, 0, 2) if first else row, expected, rtol=2e-3, atol=2e-3)


def test_integers_are_pixels_and_signed_ones_128_less():
    shown = np.arange(SIDE * SIDE * 3, dtype=np.int64).astype(np.uint8).reshape(SIDE, SIDE, 3)
    for dtype, less in ((np.uint8, 0), (np.int8, 128)):
        how = Preparation(height=SIDE, width=SIDE, channels_first=True, dtype=np.dtype(dtype))
        row = np.empty(how.shape, dtype)
        pixels.fill(row, shown, how)
        np.testing.assert_array_equal(np.moveaxis(row, 0, 2).astype(int), shown.astype(int) - less)


def metadata(datatype: str, *shape: int) -> ModelMetadata:
    return ModelMetadata(name="m", inputs=(TensorMetadata("x", datatype, shape),), outputs=())


def test_how_pictures_are_prepared_is_found_out_or_asked_for():
    found = preparation_for(metadata("UINT8", 1, 224, 192, 3))
    assert (found.height, found.width, found.channels_first, found.dtype) == (224, 192, False, np.uint8)
    found = preparation_for(metadata("FP32", -1, 3, -1, -1), normalise="imagenet", size=160)
    assert (found.height, found.width, found.channels_first, found.normalise) == (160, 160, True, "imagenet")
    with pytest.raises(SpecError, match="normalise=none or unit or signed or imagenet"):
        preparation_for(metadata("FP32", 1, 3, 224, 224))
    for wrong, options in (
        (metadata("FP32", -1, 16), {}),
        (metadata("UINT8", 1, 224, 224, 4), {}),
        (metadata("UINT8", 1, 3, 9, 3), {}),
        (metadata("UINT8", 1, -1, -1, 3), {}),
        (metadata("UINT8", 1, 224, 224, 3), {"size": 99}),
        (metadata("UINT8", 1, 224, 224, 3), {"normalise": "unit"}),
        (metadata("INT64", 1, 224, 224, 3), {}),
        (metadata("UINT8", 1, 224, 224, 3), {"crop": 0}),
    ):
        with pytest.raises(SpecError):
            preparation_for(wrong, **options)


def test_scores_are_ordered_and_equal_ones_by_their_place(models):
    from tenure.serve.images import _Task

    task = _Task(model=None, input="x", how=UINT8, output="y", top=3, rows=1, fixed=True)
    assert task._best("p", np.array([3, 250, 7, 250, 0], np.uint8)) == Classified("p", (1, 3, 2), (250.0, 250.0, 7.0))
    assert task._best("p", np.array([np.nan, -1.0, 2.0])).classes == (2, 1, 0)


@pytest.mark.real
def test_the_command_prints_a_line_per_file_and_tells_what_was_skipped(models, files, tmp_path):
    (tmp_path / "a_bad.jpg").write_bytes(b"no picture")
    (tmp_path / "b.jpg").write_bytes(Path(files[1]).read_bytes())
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "notes.txt").write_text("not looked at")
    command = [sys.executable, "-m", "tenure.serve.images", str(models / "any.onnx")]

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, input=stdin)

    labelled = run(str(tmp_path), "--labels", str(tmp_path / "labels.txt"), "--top", "1")
    assert labelled.returncode == 1
    skipped, answered = labelled.stdout.splitlines()
    assert skipped == f"{tmp_path}/a_bad.jpg: skipped: no picture that can be read ({', '.join(pixels.FORMATS)})"
    assert answered.startswith(f"{tmp_path}/b.jpg: green ")
    assert labelled.stderr.startswith("1 answered, 1 skipped, ")
    listed = run("-", "--json", stdin="\n".join(files[:4]) + "\n")
    assert listed.returncode == 0
    assert [json.loads(line)["classes"][0]["class"] for line in listed.stdout.splitlines()] == [0, 1, 2, 0]
    wrong = run(files[0], "--output", "colour")
    assert wrong.returncode == 2
    assert 'no output of numbers "colour"' in wrong.stderr
