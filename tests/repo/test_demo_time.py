"""The check inside the demo benchmark: it refuses runs that did not do what is timed."""

import json

import pytest
from benchmarks import demo_time

OUTPUT = """[   2.0 s] prepare run: 1,797 images
[   9.5 s] train measure: 6 probes
[  10.0 s] train recommend: 2 workers
[  31.0 s] train measure: 1 probe more
run      r-1 done
"""


def a_report(**states):
    figure = {"kind": "figure", "figure": {}}
    return {"sections": [{"name": name, "state": state, "blocks": [figure]} for name, state in states.items()]}


def written(tmp_path, report, page="<html><svg xmlns='http://www.w3.org/2000/svg'></svg></html>"):
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "report.json").write_text(json.dumps(report))
    return OUTPUT + f"report   {tmp_path}/report.html\nfigures  {tmp_path}/report.json\n"


def test_each_step_has_the_seconds_between_closing_lines():
    assert demo_time._steps(OUTPUT) == {"prepare run": 2.0, "train measure": 28.5, "train recommend": 0.5}


def test_a_whole_run_is_accepted(tmp_path):
    report = a_report(prepare="done", train="done", serve="done")
    assert demo_time.check(written(tmp_path, report), wanted=("train", "serve")) == report


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ({"train": "done"}, "no serve stage"),
        ({"train": "done", "serve": "failed"}, "not done: serve"),
    ],
)
def test_a_run_with_a_stage_missing_or_failed_is_refused(tmp_path, states, says):
    with pytest.raises(demo_time.WrongAnswer, match=says):
        demo_time.check(written(tmp_path, a_report(**states)), wanted=("train", "serve"))


def test_a_report_that_links_elsewhere_is_refused(tmp_path):
    output = written(tmp_path, a_report(train="done"), page="<script src='https://example.org/x.js'></script>")
    with pytest.raises(demo_time.WrongAnswer, match="self-contained"):
        demo_time.check(output, wanted=("train",))


def test_a_run_without_a_report_is_refused():
    with pytest.raises(demo_time.WrongAnswer, match="where its report is"):
        demo_time.check(OUTPUT, wanted=("train",))


@pytest.mark.parametrize(("wall_s", "failed"), [(50.0, True), (0.5, False)])
def test_the_control_fails_unless_the_run_is_impossibly_quick(wall_s, failed):
    assert demo_time._control(wall_s, a_report(train="done", serve="done")).failed is failed
