"""How long the main job takes: `tenure run examples/digits.toml` in a fresh home, after installation.

Counted: wall seconds from starting the command to its end, the report written. Nothing is reused: the home is new, so every
trial is measured. Checked before a figure is printed: the command ended with 0; every stage is done; the report is one file
without external links; its JSON has figures for training and for serving. `details` has the seconds of each step, from the
command's own closing lines, and the CPU seconds of the command and what it waited for (work in leases is not in it).

--quick runs the stages up to training only; the bar is about the whole job, so `holds` is then null.

Control: the same run held against a bar of 1 s, which must not hold; and its report without the last stage, which the check
must refuse.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Control, Options, Result, Skip, judge

NAME = "demo_time"
BAR = "at most 240 s wall on 2 cores, after installation"
BAR_S = 240.0
MAX_RUN_S = 2 * BAR_S
JOB_FILE = ROOT / "examples" / "digits.toml"
STEP = re.compile(r"^\[\s*([0-9.]+) s\] ([^:]+): (.*)$")


class WrongAnswer(AssertionError):
    """The run did not do what it is timed for; no figure is given."""


def run(options: Options) -> Result:
    """Run the demo once and judge its wall time. Raises WrongAnswer when what it did is not what is timed."""
    if not JOB_FILE.exists():
        raise Skip(f"{JOB_FILE} is not there")
    with tempfile.TemporaryDirectory(prefix="tenure-demo-", ignore_cleanup_errors=True) as home:
        wall_s, cpu_s, output = _timed([("train" if options.quick else "run"), str(JOB_FILE)], home=Path(home))
        steps = _steps(output)
        report = check(output, wanted=("train",) if options.quick else ("train", "serve"))
    control = _control(wall_s, report)
    holds, why = judge(wall_s <= BAR_S, control)
    quick = "only the stages up to training were run; the bar is about the whole job"
    return Result(
        value=round(wall_s, 2),
        spread=None,
        unit="s",
        holds=None if options.quick else holds,
        why=quick if options.quick else why,
        control=control,
        details={"step_s": steps, "command_cpu_s": round(cpu_s, 2), "cores": os.cpu_count(), "figures": len(_figures(report))},
    )


def _timed(argv: list[str], *, home: Path) -> tuple[float, float, str]:
    """Run one `tenure` command to its end; return wall seconds, its CPU seconds, its output. Ends it after MAX_RUN_S."""
    env = {**os.environ, "TENURE_HOME": str(home)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.monotonic()
    command = [sys.executable, "-m", "tenure.cli", *argv]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=MAX_RUN_S)
        except subprocess.TimeoutExpired as late:
            process.send_signal(signal.SIGTERM)  # as Ctrl-C: it ends what it started
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise WrongAnswer(f"tenure {argv[0]} did not end within {MAX_RUN_S:.0f} s") from late
    wall_s = time.monotonic() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode != 0:
        raise WrongAnswer(f"tenure {argv[0]} ended with {process.returncode}:\n{output[-2000:]}")
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, output


def _steps(output: str) -> dict[str, float]:
    """Return the seconds of each step: the differences of the times at which the closing lines were printed."""
    seconds: dict[str, float] = {}
    last_s = 0.0
    for match in filter(None, map(STEP.match, output.splitlines())):
        at_s, step = float(match[1]), match[2]
        seconds[step] = round(seconds.get(step, 0.0) + at_s - last_s, 1)
        last_s = at_s
    return seconds


def check(output: str, *, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Return the report's JSON once what the run left is right. Raises WrongAnswer."""
    paths = {word: Path(path) for word, path in re.findall(r"^(report|figures)\s+(/.+)$", output, re.M)}
    if set(paths) != {"report", "figures"}:
        raise WrongAnswer(f"the run does not say where its report is:\n{output[-2000:]}")
    page, plain = paths["report"], paths["figures"]
    if not page.is_file() or not plain.is_file():
        raise WrongAnswer(f"no report at {page}")
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//[^\"'> ]+", page.read_text())
    if links:
        raise WrongAnswer(f"the report is not self-contained: {links[:3]}")
    report: dict[str, Any] = json.loads(plain.read_text())
    refuse_incomplete(report, wanted=wanted)
    return report


def refuse_incomplete(report: dict[str, Any], *, wanted: tuple[str, ...]) -> None:
    """Raise WrongAnswer unless every stage is done and the wanted ones have figures."""
    sections = {section["name"]: section for section in report["sections"]}
    for name in wanted:
        if name not in sections:
            raise WrongAnswer(f"the report has no {name} stage; it has: {', '.join(sections) or 'none'}")
        if not [block for block in sections[name]["blocks"] if block["kind"] == "figure"]:
            raise WrongAnswer(f"the report's {name} stage has no figure")
    unfinished = [name for name, section in sections.items() if section["state"] != "done"]
    if unfinished:
        raise WrongAnswer(f"not done: {', '.join(unfinished)}")


def _figures(report: dict[str, Any]) -> list[Any]:
    return [block for section in report["sections"] for block in section["blocks"] if block["kind"] == "figure"]


def _control(wall_s: float, report: dict[str, Any]) -> Control:
    """Hold the same run against a bar it can't meet, and a report without its last stage against the check."""
    try:
        refuse_incomplete({**report, "sections": report["sections"][:-1]}, wanted=(report["sections"][-1]["name"],))
        refused = False
    except WrongAnswer:
        refused = True
    failed = wall_s > 1.0 and refused
    return Control(
        name="the same run against a bar of 1 s, and its report without the last stage",
        value=round(wall_s, 2),
        failed=failed,
        how="missed the bar of 1 s; the incomplete report was refused" if failed else "",
    )
