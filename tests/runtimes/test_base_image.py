"""The base image is made beside by a process of its own; whoever asks meanwhile is told how far it is."""

import sys
import threading

import pytest

from tenure.errors import Unavailable
from tenure.runtimes import base_image
from tenure.runtimes.base_image import BaseImage


@pytest.fixture
def maker(monkeypatch, tmp_path):
    """Have another program make the image: give a function that takes its source."""

    class Popen(base_image.subprocess.Popen):
        def __init__(self, argv, **options):
            super().__init__([sys.executable, "-S", "-c", source[0], *argv[-1:]], **options)

    source = [""]
    monkeypatch.setattr(base_image.subprocess, "Popen", Popen)

    def use(code):
        source[0] = code

    return use


def test_who_asks_too_early_is_told_how_far_it_is_and_who_waits_has_it(maker, tmp_path):
    go_on = tmp_path / "go"
    maker(
        "import os, sys, time\nprint('packing 7 files', flush=True)\n"
        f"while not os.path.exists({str(go_on)!r}): time.sleep(0.01)\nprint('made tenure-base:1', flush=True)"
    )
    image = BaseImage()
    image.begin("/engine")
    end = threading.Event()
    for _ in range(1000):
        if "packing 7 files" in image.describe():
            break
        end.wait(0.01)
    with pytest.raises(Unavailable, match=r"is being made \(packing 7 files; \d+ s so far\)"):
        image.name("/engine", wait_s=0.01)
    go_on.touch()
    assert image.name("/engine", wait_s=60) == "tenure-base:1"
    assert image.describe() == ""
    assert image.name("/engine", wait_s=0) == "tenure-base:1"


def test_it_is_made_once_for_all_who_ask_at_once_and_again_when_it_is_gone(maker, tmp_path):
    made = tmp_path / "made"
    maker(f"open({str(made)!r}, 'a').write('x'); print('made tenure-base:1')")
    image, found = BaseImage(), []
    threads = [threading.Thread(target=lambda: found.append(image.name("/engine", wait_s=60))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["tenure-base:1"] * 8
    assert made.read_text() == "x"
    image.forget()
    assert image.name("/engine", wait_s=60) == "tenure-base:1"
    assert made.read_text() == "xx"


@pytest.mark.parametrize(
    "code", ["print('the engine did not take it'); raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)"]
)
def test_why_it_cannot_be_made_is_told_and_it_is_tried_again(maker, monkeypatch, code):
    maker(code)
    image = BaseImage()
    with pytest.raises(Unavailable, match=r"cannot be made: (the engine did not take it|its maker died)"):
        image.name("/engine", wait_s=60)
    assert "cannot be made" in image.describe()
    monkeypatch.setattr(base_image, "_AGAIN_S", -1.0)
    maker("print('made tenure-base:2')")
    assert image.name("/engine", wait_s=60) == "tenure-base:2"


def test_without_an_engine_the_maker_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(base_image, "die_with_parent", lambda: None)  # here it is the tests' own process
    monkeypatch.setattr(base_image.os, "nice", lambda by: by)
    assert base_image.main([str(tmp_path / "none.sock")]) == 1
    assert "none.sock" in capsys.readouterr().out
