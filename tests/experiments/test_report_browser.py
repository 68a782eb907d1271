"""The page in a real browser: every plot is there and has something in it."""

import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from tenure.experiments.report import ReportData, build_report, figures, render_html, write_report

from .bench_synthetic import bench_run
from .synthetic import full_run
from .test_report_predictions import made

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.real,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def chromium(folder, *words):
    """Run a headless browser with a profile of its own and return what it prints."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True, cwd=folder).stdout


RUNS = pytest.mark.parametrize("made_run", [full_run, bench_run], ids=["run", "experiment"])


@RUNS
def test_the_browser_finds_every_plot_with_its_title_and_marks(made_run, tmp_path):
    page, _ = write_report(made_run(), tmp_path)
    dom = chromium(tmp_path, "--dump-dom", page.as_uri())
    for figure in figures(build_report(made_run())):
        start = dom.index(f'<figure id="{figure["id"]}"')
        svg = dom[start : dom.index("</figure>", start)]
        marks = sum(len(series["points"]) for series in figure["series"] if series.get("style") != "level")
        assert f'aria-labelledby="{figure["id"]}--t' in svg
        drawn = len(re.findall(r"<path |<use ", svg))
        assert drawn > (10 if figure["kind"] == "lines" else marks), figure["id"]


@RUNS
def test_the_browser_paints_every_plot(made_run, tmp_path):
    """All plots on one sheet, each in a box of known size, so that one screenshot tells of each."""
    from PIL import Image

    report = build_report(made_run())
    page = render_html(report)
    svgs = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(svgs) == len(figures(report))
    box = '<div style="width:640px;height:480px;overflow:hidden">'
    sheet = tmp_path / "sheet.html"
    sheet.write_text(
        "<!doctype html><meta charset=utf-8><style>body{margin:0}svg{width:640px;height:480px}</style>"
        + "".join(f"{box}{svg}</div>" for svg in svgs)
    )
    chromium(tmp_path, f"--window-size=640,{480 * len(svgs)}", f"--screenshot={tmp_path / 'sheet.png'}", sheet.as_uri())
    with Image.open(tmp_path / "sheet.png") as shot:
        for index, figure in enumerate(figures(report)):
            part = shot.convert("RGB").crop((0, 480 * index, 640, 480 * (index + 1)))
            colours = part.getcolors(maxcolors=640 * 480)
            coloured = sum(count for count, (r, g, b) in colours if max(r, g, b) - min(r, g, b) > 40)
            assert len(colours) > 20, figure["id"]
            assert coloured > 150, figure["id"]


def test_the_browser_paints_the_predicted_pictures(tmp_path):
    from PIL import Image

    red = np.zeros((12, 8, 8, 3), np.uint8)
    red[..., 0] = 250
    data = replace(ReportData(run=full_run().run), predictions={"train": made(pictures=red)})
    page, _ = write_report(data, tmp_path)
    chromium(tmp_path, "--window-size=1000,1600", f"--screenshot={tmp_path / 'page.png'}", page.as_uri())
    with Image.open(tmp_path / "page.png") as shot:
        painted = sum(count for count, colour in shot.convert("RGB").getcolors(1000 * 1600) if colour == (250, 0, 0))
    assert painted == 12 * 64 * 64


def test_the_browser_finds_every_plot_of_a_replay(tmp_path):
    from tenure import verbs

    (tmp_path / "nodes.csv").write_text("name,cpus,memory_bytes,gpus,count\nn,16,64GiB,4,2\n")
    rows = [f"j{i},t{i % 3},{i * 40},{1 + i % 3},{300 + i}" for i in range(40)]
    (tmp_path / "jobs.csv").write_text("\n".join(["id,tenant,submit_s,gpus,duration_s", *rows, ""]))
    done = verbs.replay(
        tmp_path / "jobs.csv", ["tenure", "firstfit"], nodes=tmp_path / "nodes.csv", seeds=2, out=tmp_path / "out"
    )
    dom = chromium(tmp_path, "--dump-dom", done.html.as_uri())
    for name in ("allocated", "waiting", "fragmentation", "tenants"):
        start = dom.index(f'<figure id="replay-{name}"')
        svg = dom[start : dom.index("</figure>", start)]
        assert len(re.findall(r"<path |<use ", svg)) > 8, name


def test_nothing_on_an_experiments_page_is_wider_than_a_laptop_shows(tmp_path):
    """Tables that are wider scroll within themselves; the page does not. Measured by the page in the browser."""
    page, _ = write_report(bench_run(), tmp_path)
    probe = tmp_path / "probe.html"
    script = (
        "<script>document.title = document.documentElement.scrollWidth + ' ' + document.querySelectorAll('svg').length</script>"
    )
    probe.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    dom = chromium(tmp_path, "--window-size=1000,1400", "--dump-dom", probe.as_uri())
    width, svgs = re.search(r"<title>(\d+) (\d+)</title>", dom).groups()
    assert int(width) <= 1000
    assert int(svgs) == len(figures(build_report(bench_run())))
