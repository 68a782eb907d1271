"""Pictures of every kind, good and bad, become arrays; what cannot be used is named; nothing half-made stays."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tenure.cli import exits, main
from tenure.errors import Conflict, SpecError
from tenure.train import dataset as dataset_module
from tenure.train import dataset_files, images
from tenure.train.dataset import DatasetSpec, make_dataset, parse_size
from tenure.train.images import BadImage, decode
from tenure.train.programs import load_arrays

RED, BLUE = (200, 10, 20), (10, 20, 200)


def picture(colour=RED, size=(8, 8), mode="RGB", kind="PNG", **more):
    out = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(out, kind, **more)
    return out.getvalue()


def folder(root, names, content=None):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or picture((number % 256, 7, 9)))
    return root


def zipped(path, names, content=None):
    with zipfile.ZipFile(path, "w") as file:
        for number, name in enumerate(names):
            file.writestr(name, content or picture((number % 256, 7, 9)))
    return path


def left_behind(out):
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}"))


def make(sources, out, **spec):
    return make_dataset([Path(path) for path in sources], out, DatasetSpec(**{"size": (8, 8), **spec}))


def test_folders_of_classes_become_arrays_that_a_program_maps(tmp_path):
    source = folder(tmp_path / "in", [f"{name}/{n}.png" for name in ("rose", "aster") for n in range(10)])
    made = make([source], tmp_path / "out", split=0.3)
    train, held_out = load_arrays({"flowers": str(tmp_path / "out")})
    assert (made.classes, made.train, made.test, made.skipped) == (("aster", "rose"), 14, 6, 0)
    assert train["x"].shape == (14, 8, 8, 3)
    assert train["x"].dtype == np.uint8
    assert isinstance(train["x"], np.memmap)
    assert train["y"].tolist() == [0] * 7 + [1] * 7
    assert held_out["y"].tolist() == [0] * 3 + [1] * 3
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["aster", "rose"]
    shades = sorted([*train["x"][:, 0, 0, 0], *held_out["x"][:, 0, 0, 0]])
    assert shades == list(range(20)), "each picture once, in one part"


def test_several_zips_with_train_and_test_folders_keep_their_parts(tmp_path):
    sources = [
        zipped(tmp_path / f"{part}-{name}.zip", [f"{part}/{name}/{n:04d}.png" for n in range(count)])
        for part, count in (("train", 5), ("test", 2))
        for name in ("cat", "dog")
    ]
    made = make(sources, tmp_path / "out")
    assert (made.classes, made.train, made.test) == (("cat", "dog"), 10, 4)


def test_a_folder_around_everything_says_nothing(tmp_path):
    made = make([zipped(tmp_path / "a.zip", [f"set/{c}/{n}.png" for c in "ab" for n in range(4)])], tmp_path / "out")
    assert made.classes == ("a", "b")


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_arrays_become_the_same_arrays(tmp_path, suffix):
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    y = np.arange(20) % 4 + 6
    if suffix == "npz":
        np.savez_compressed(tmp_path / "all.npz", x=x, y=y)
    else:
        np.save(tmp_path / "x.npy", x)
        np.save(tmp_path / "y.npy", y)
    made = make([tmp_path / ("all.npz" if suffix == "npz" else "x.npy")], tmp_path / "out", split=0.25)
    train, _ = load_arrays({"": str(tmp_path / "out")})
    assert made.classes == ("6", "7", "8", "9")
    assert (made.train, made.test) == (16, 4)
    for pixels, label in zip(train["x"], train["y"], strict=True):
        (row,) = np.flatnonzero((x == pixels).all(axis=(1, 2, 3)))
        assert y[row] == label + 6


def test_labels_can_be_rows_of_one(tmp_path):
    make([folder(tmp_path / "in", [f"{c}/{n}.png" for c in "abc" for n in range(4)])], tmp_path / "out", one_hot=True)
    y = np.load(tmp_path / "out" / "y_train.npy")
    assert y.dtype == np.float32
    assert y.sum(axis=1).tolist() == [1.0] * 9
    assert y.argmax(axis=1).tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(
    ("content", "middle"),
    [
        (picture(), RED),
        (picture(mode="CMYK", kind="JPEG", quality=95), RED),
        (picture(mode="L", size=(16, 8)), (68, 68, 68)),
        (picture(mode="P"), RED),
        (picture(mode="1", colour=(255, 255, 255)), (255, 255, 255)),
        (picture(kind="GIF"), RED),
        (picture(kind="TIFF", size=(3, 90)), RED),
    ],
)
def test_pictures_of_every_colour_mode_become_red_green_blue(content, middle):
    found = decode(content, (8, 8))
    assert found.shape == (8, 8, 3)
    assert np.abs(found[4, 4].astype(int) - middle).max() <= 25  # the palette of the web, JPEG


def test_sixteen_bits_become_eight_and_what_is_transparent_becomes_white():
    wide, clear = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(wide, "PNG")
    Image.new("RGBA", (8, 8), (*RED, 0)).save(clear, "PNG")
    assert decode(wide.getvalue(), (8, 8))[4, 4].tolist() == [128, 128, 128]
    assert decode(clear.getvalue(), (8, 8))[4, 4].tolist() == [255, 255, 255]


def test_a_picture_turned_by_its_camera_stands_upright():
    image = Image.new("RGB", (8, 8), RED)
    image.paste(BLUE, (0, 0, 8, 4))
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # by 180 degrees
    image.save(out, "PNG", exif=exif)
    assert decode(out.getvalue(), (8, 8))[7, 4].tolist() == list(BLUE)


def animated():
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def absurd(width, height):
    """Return a few bytes of PNG that say they are a picture of so many pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + bytes(4) + b"IDAT"


def postscript():
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


BAD = {
    "torn": (picture(kind="JPEG", size=(64, 64))[:400], "(?i)truncated"),
    "empty": (b"", "no picture that can be read"),
    "text": (b"<html>not found</html>", "no picture that can be read"),
    "animated": (animated(), "animated"),
    "large": (absurd(9_000, 9_000), "9000 x 9000 pixels; at most 32,000,000 of PNG"),
    "huge": (absurd(1 << 30, 1 << 30), "exceeds limit of .* pixels"),
    "program": (postscript(), "no picture that can be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_skipped_and_named_with_its_reason(tmp_path, kind):
    content, reason = BAD[kind]
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(4)])
    (source / "a" / "bad.jpg").write_bytes(content)
    made = make([source], tmp_path / "out", limit_bad=0.5)
    assert (made.train + made.test, made.skipped) == (8, 1)
    heads, line = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    where, name, text = line.split("\t")
    assert heads.split("\t") == ["source", "name", "reason"]
    assert (where, name) == (str(source), "a/bad.jpg")
    assert re.search(reason, text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_a_file_ends_the_process(data):
    content = bytearray(
        data.draw(st.sampled_from([picture(), picture(kind="JPEG"), picture(kind="GIF"), picture(kind="TIFF")]))
    )
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)):
        content[at] = byte
    cut = data.draw(st.integers(0, len(content)))
    with contextlib.suppress(BadImage):
        assert decode(bytes(content[:cut]), (4, 4)).shape == (4, 4, 3)


@pytest.mark.parametrize("name", ["../../a/x.png", "/etc/a/x.png", "C:\\a\\x.png"])
def test_a_name_that_leads_out_of_a_zip_is_skipped_and_nothing_is_written_there(tmp_path, name):
    path = zipped(tmp_path / "in.zip", [*(f"{c}/{n}.png" for c in "ab" for n in range(4)), name])
    made = make([path], tmp_path / "out", limit_bad=0.5)
    assert made.skipped == 1
    assert "leads out" in (tmp_path / "out" / "skipped.tsv").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zip", "out"]


def test_a_member_that_unpacks_to_too_much_is_never_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("tenure.train.sources.MAX_FILE_BYTES", 1000)
    path = zipped(tmp_path / "in.zip", [f"{c}/{n}.png" for c in "ab" for n in range(4)])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/bomb.png", bytes(10_000_000))
    made = make([path], tmp_path / "out", limit_bad=0.5)
    assert made.skipped == 1
    assert "10,000,000 bytes unpacked" in (tmp_path / "out" / "skipped.tsv").read_text()


def test_one_torn_member_of_a_zip_costs_one_picture(tmp_path):
    path = zipped(tmp_path / "in.zip", [f"{c}/{n}.png" for c in "ab" for n in range(4)])
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    assert make([path], tmp_path / "out", limit_bad=0.5).skipped == 1


def test_too_many_bad_pictures_are_taken_for_a_mistake_and_nothing_stays(tmp_path):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(4)])
    (source / "a" / "0.png").write_bytes(b"")
    with pytest.raises(SpecError, match=r"1 of the 8 pictures are bad so far; at most 0\.05 of all may be"):
        make([source], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not left_behind(tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "spec", "text"),
    [
        ([], {}, "no picture in a folder that names its class"),
        (["0.png"], {}, "(?s)no picture .* first of 1 that were skipped:.*lies in no folder"),
        (["a/0.png", "b/0.png"], {}, "no picture of a, b is left to train with"),
        (["train/a/0.png", "test/b/0.png"], {"split": 0.5}, "leave --split away"),
        (["a/0.png", "a/1.png"], {}, "all pictures are of one class, 'a'"),
        (["train/a/0.png", "test/a/0.png", "b/0.png"], {}, "b/0.png lies neither in train nor in test"),
        (["test/a/0.png", "b/0.png"], {}, "b/0.png lies neither in train nor in test"),
    ],
)
def test_sources_that_make_no_data_set_are_refused_by_name(tmp_path, names, spec, text):
    source = tmp_path / "in"
    source.mkdir()
    with pytest.raises(SpecError, match=text):
        make([folder(source, names)], tmp_path / "out", **spec)
    assert not left_behind(tmp_path / "out")


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), "must be uint8 .* found float32"),
        (np.zeros((4, 3, 8, 8), np.uint8), "transpose"),
        (np.zeros((5, 8, 8, 3), np.uint8), "has 5 images and labels"),
        (np.zeros((4, 0, 8, 3), np.uint8), "must be uint8"),
        (np.array([None]), "cannot be mapped|not an array file"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(tmp_path, x, text):
    np.save(tmp_path / "x.npy", x, allow_pickle=True)
    np.save(tmp_path / "y.npy", np.arange(4))
    with pytest.raises(SpecError, match=text):
        make([tmp_path / "x.npy"], tmp_path / "out")


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (np.array([1.0, 10.0, 9.0, 1.0, 9.0, 10.0]), ("1", "9", "10")),
        (np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]], ("0", "1", "2")),
        (np.array([["cat"], ["dog"]] * 3), ("cat", "dog")),
        (np.array([0.5, 1, 2, 0.5, 1, 2]), None),
        (np.array([np.nan, 1, 2, 1, 1, 2]), None),
    ],
)
def test_labels_may_be_numbers_texts_or_rows_of_one(tmp_path, y, classes):
    np.savez(tmp_path / "set.npz", x=np.zeros((6, 8, 8), np.uint8), y=y)
    if classes:
        assert make([tmp_path / "set.npz"], tmp_path / "out").classes == classes
    else:
        with pytest.raises(SpecError, match="labels are classes, as whole numbers"):
            make([tmp_path / "set.npz"], tmp_path / "out")


def test_names_that_are_no_text_stay_told_apart(tmp_path):
    source = tmp_path / "in"
    for name in (b"kl\xe4sse", b"kl\xf6sse"):
        folder(source / os.fsdecode(name), ["0.png", "1.png"])
    made = make([source], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == list(made.classes)
    assert [os.fsencode(name) for name in made.classes] == [b"kl\xe4sse", b"kl\xf6sse"]


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(2)])
    two, met, plain = threading.Barrier(2), [], images._fit

    def fit(image, size):
        with contextlib.suppress(threading.BrokenBarrierError):
            met.append(two.wait(0.2))
        return plain(image, size)

    monkeypatch.setattr(images, "_fit", fit)
    monkeypatch.setattr(images, "LARGE_PIXELS", 8 * 8 - 1)
    monkeypatch.setattr(dataset_module, "BATCH", 1)
    make([source], tmp_path / "out", threads=2)
    assert not met
    monkeypatch.setattr(images, "LARGE_PIXELS", 8 * 8)
    two.reset()
    make([source], tmp_path / "others", threads=2)
    assert met, "two small ones at a time"


def test_what_is_there_is_never_written_over(tmp_path):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(4)])
    make([source], tmp_path / "out")
    with pytest.raises(SpecError, match="is there already"):
        make([source], tmp_path / "out")


def test_ctrl_c_leaves_nothing_and_the_next_try_makes_the_same_bytes(tmp_path):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(200)])

    def interrupt(seen, count, skipped):
        if seen == 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset([source], tmp_path / "out", DatasetSpec(size=(8, 8)), progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    make([source], tmp_path / "out", threads=1)
    make([source], tmp_path / "again", threads=4)
    for name in ("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy", "classes.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(4)])
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "x_train.npy").write_bytes(b"half")
    make([source], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_two_that_make_the_same_folder_do_not_mix(tmp_path):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(4)])
    with dataset_files.scratch(tmp_path / "out"), pytest.raises(Conflict, match="another process is making"):
        make([source], tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_is_ended_half_way_leaves_no_folder_of_that_name(tmp_path, number):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(20)])
    argv = ["dataset", str(source), "--out", str(tmp_path / "out")]
    halting = f"""
import sys
from tenure.cli import main
from tenure.train.dataset import Writer
plain = Writer.add
def add(self, pixels, label):
    plain(self, pixels, label)
    if self.counts == [16, 8]:
        print("half", flush=True)
        sys.stdin.read()
Writer.add = add
main.main({argv!r})
"""
    with subprocess.Popen([sys.executable, "-c", halting], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(number)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else exits.INTERRUPTED)
    assert not (tmp_path / "out").exists()
    assert bool(left_behind(tmp_path / "out")) == (number == signal.SIGKILL)
    assert main.run(argv) == exits.OK, "the next one finds nothing in its way"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_full_disk_is_told_with_the_folder_and_nothing_stays(tmp_path, monkeypatch, capsys):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(4)])

    def full(self, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset_files.Growing, "append", full)
    assert main.run(["dataset", str(source), "--out", str(tmp_path / "out")]) == exits.REFUSED
    assert f"the disk is full at {tmp_path / 'out'}" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_the_command_prints_where_the_set_is_and_how_much_is_in_it(tmp_path, capsys):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(40)])
    (source / "a" / "bad.png").write_bytes(b"")
    argv = ["dataset", str(source), "--out", str(tmp_path / "out"), "--size", "6x4", "--split", "0.25"]
    assert main.run([*argv, "--json"]) == exits.OK
    made = json.loads(capsys.readouterr().out)
    assert (made["classes"], made["train"], made["test"], made["skipped"]) == (["a", "b"], 60, 20, 1)
    assert np.load(tmp_path / "out" / "x_train.npy").shape == (60, 4, 6, 3), "height before width"
    assert main.run([*argv[:2], "--out", str(tmp_path / "again")]) == exits.OK
    told = capsys.readouterr()
    assert "64 to train with, 16 held out, 2 classes" in told.out
    assert "skipped.tsv says which and why" in told.err
    assert main.run(argv) == exits.WRONG_INPUT, "it is there already"


@pytest.mark.parametrize("text", ["", "x", "32x", "0", "32x4096", "-1", "32x32x32", "1e2", "٣"])
def test_a_size_that_is_none_is_refused_with_what_was_found(text):
    with pytest.raises(SpecError, match="size must"):
        DatasetSpec(size=parse_size(text))


def test_zips_that_lie_in_a_folder_are_sources_beside_its_pictures(tmp_path):
    source = folder(tmp_path / "in", [f"train/a/{n}.png" for n in range(3)])
    zipped(source / "more.zip", [f"{part}/b/{n}.png" for part in ("train", "test") for n in range(2)])
    made = make([source], tmp_path / "out")
    assert (made.classes, made.train, made.test) == (("a", "b"), 5, 2)


def test_bad_pictures_end_it_as_soon_as_there_are_too_many(tmp_path):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(100)], b"torn")
    seen = []
    with pytest.raises(SpecError, match="11 of the 200 pictures are bad so far"):
        make_dataset([source], tmp_path / "out", DatasetSpec(), progress=lambda *counts: seen.append(counts))
    assert len(seen) == 10


def test_what_waits_to_be_written_has_the_same_bytes_for_any_size(tmp_path):
    assert dataset_module._at_once((32, 32)) == dataset_module.BATCH
    assert dataset_module._at_once((512, 512)) * 512 * 512 * 3 <= dataset_module.BATCH_BYTES
    assert dataset_module._at_once((4096, 4096)) == 1


def test_few_pictures_are_in_memory_however_many_there_are(tmp_path, monkeypatch):
    source = folder(tmp_path / "in", [f"{c}/{n}.png" for c in "ab" for n in range(300)])
    waiting = most = 0
    plain = images.decode

    def counted(content, size):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return plain(content, size)

    def taken(seen, count, skipped):
        nonlocal waiting
        waiting -= 1

    monkeypatch.setattr("tenure.train.sources.decode", counted)
    monkeypatch.setattr(dataset_module, "BATCH", 10)
    make_dataset([source], tmp_path / "out", DatasetSpec(size=(8, 8), threads=1), progress=taken)
    assert 0 < most <= 40


@settings(max_examples=25, deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), st.integers(2, 9), min_size=1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_a_split_holds_out_its_share_of_every_class(counts, share, seed):
    found = [
        dataset_module.Example(None, n, f"{label}/{n}", label, "") for label, count in counts.items() for n in range(count)
    ]
    parts = dataset_module._parts(list(found), DatasetSpec(split=share, seed=seed))
    assert sorted(e.name for part in parts.values() for e in part) == sorted(e.name for e in found)
    for label, count in counts.items():
        held_out = sum(e.label == label for e in parts["test"])
        assert 1 <= held_out <= count - 1
        assert abs(held_out - share * count) <= 1
    again = dataset_module._parts(found[::-1], DatasetSpec(split=share, seed=seed))
    assert again == parts, "whatever order the names come in"
