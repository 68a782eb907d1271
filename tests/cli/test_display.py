"""Displays of a run: live on a terminal, one plain line per step elsewhere, nothing with --json."""

import io

import pytest

from tenure.cli.display import PlainDisplay, RichDisplay, SilentDisplay, make_display

ESCAPE = "\x1b[31mred\x1b[0m\nsecond"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show_a_run(display):
    with display:
        display.stage_started("train", "measure", "probing")
        display.progress("2 of 4 probes", 0.5)
        display.progress("still going")
        display.step_done("train", "measure", "4 probes, 93 MiB at most")
        display.warn("no cgroups here: memory is advisory")


def test_plain_display_prints_one_line_per_step_with_the_time_so_far():
    times = iter([100.0, 101.0, 102.0, 103.0, 103.25])
    out, err = io.StringIO(), io.StringIO()
    show_a_run(PlainDisplay(out, err, monotonic_s=lambda: next(times)))
    assert out.getvalue() == "[   3.2 s] train measure: 4 probes, 93 MiB at most\n"
    assert err.getvalue() == "warning: no cgroups here: memory is advisory\n"


def test_plain_display_says_every_half_minute_how_far_a_long_step_is():
    now_s, out = [0.0], io.StringIO()
    with PlainDisplay(out, io.StringIO(), monotonic_s=lambda: now_s[0]) as display:
        display.stage_started("train", "lease + train", "2 leases")
        for now_s[0] in range(0, 95, 5):
            display.progress(f"round {now_s[0]}")
    assert out.getvalue().splitlines() == [f"[  {s}.0 s] train lease + train: round {s}" for s in (30, 60, 90)]


def test_silent_display_leaves_stdout_to_the_json_answer():
    out, err = io.StringIO(), io.StringIO()
    display = make_display(out, err, json=True)
    assert type(display) is SilentDisplay
    show_a_run(display)
    assert out.getvalue() == ""
    assert "advisory" in err.getvalue()


def test_a_terminal_gets_bars_and_a_pipe_gets_plain_lines():
    assert type(make_display(Terminal(), io.StringIO(), json=False)) is RichDisplay
    assert type(make_display(io.StringIO(), io.StringIO(), json=False)) is PlainDisplay


def test_live_display_keeps_closing_lines_and_warnings():
    out = Terminal()
    show_a_run(RichDisplay(out, io.StringIO()))
    assert "4 probes, 93 MiB at most" in out.getvalue()
    assert "no cgroups here" in out.getvalue()


@pytest.mark.parametrize("make", [lambda out: PlainDisplay(out, out), lambda out: RichDisplay(out, out)])
def test_other_peoples_text_cannot_move_or_colour_the_terminal(make):
    out = io.StringIO()
    display = make(out)
    with display:
        display.stage_started(ESCAPE, ESCAPE, ESCAPE)
        display.progress(ESCAPE, 2.0)
        display.step_done(ESCAPE, "[bold]x[/nope]", ESCAPE)
        display.warn(ESCAPE)
    assert "\x1b[31m" not in out.getvalue()
    assert "[bold]x[/nope]" in out.getvalue()


def test_progress_without_a_stage_is_ignored():
    out = io.StringIO()
    with RichDisplay(out, out) as display:
        display.progress("nothing began", 0.5)
    assert "nothing began" not in out.getvalue()


def test_a_long_line_of_figures_is_not_cut_off_on_a_terminal_of_eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    out, text = (
        Terminal(),
        "round 32 of 60, loss 1.949, 2 of 2 workers, peak 17.3 MiB of 128.0 MiB, 5.0 s, about 3.1 s left, $0.5",
    )
    with RichDisplay(out, out) as display:
        display.stage_started("train", "lease + train", text)  # drawn at once; `progress` is ten times a second
    assert " ".join(text.split()) in " ".join(out.getvalue().split())
    assert "…" not in out.getvalue()
