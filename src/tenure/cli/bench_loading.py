"""`tenure bench load`: a server of models under load. Not here: how it is put there (`tenure.verbs`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tenure.cli import exits, output
from tenure.errors import SpecError

if TYPE_CHECKING:  # NumPy comes with it, which `tenure --help` need not pay
    from tenure.serve.load.payload import Shape
    from tenure.serve.load.report import LoadReport
    from tenure.serve.load.search import SearchReport
    from tenure.serve.load.summary import Figures


SEARCH_S = 300.0
"""No run of a search begins after it."""


def bench_load(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server: http://HOST:PORT or grpc://HOST:PORT.")],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="The model, by its name there.")],
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="R", help="Open loop: requests per second, whatever the server does.")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option("--clients", metavar="N", help="Closed loop: each sends its next request when its last has ended."),
    ] = None,
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", metavar="FILE", help="Open loop: due times from a file, seconds, one per line or .npy."),
    ] = None,
    arrivals: Annotated[
        str, typer.Option("--arrivals", metavar="KIND", help="Of --rate: poisson (independent users) or constant.")
    ] = "poisson",
    goal: Annotated[
        str | None,
        typer.Option(
            "--goal",
            metavar="GOAL",
            help="Such as p99<50ms: whether it is met. Alone, without --rate, --clients and --schedule: the highest rate that "
            "meets it.",
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", metavar="TIME", help="How long requests become due [default: 10s; a search 5min in all]."),
    ] = None,
    warm_up: Annotated[
        str | None,
        typer.Option(
            "--warm-up",
            metavar="TIME",
            help="Requests due before it are sent and not judged [default: a tenth of the time, 2s at most; none of a FILE].",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Rows of a request.")] = 1,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE", help="Rows to send, .npy or .npz by input name [default: random numbers]."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME:[TYPE:]N,N",
            help="Of an input whose lengths are open, beside the batch; with its type where the server tells no inputs. "
            "Repeatable.",
        ),
    ] = None,
    json_tensors: Annotated[
        bool, typer.Option("--json-tensors", help="Over HTTP: tensors as JSON, for servers that take no raw ones.")
    ] = False,
    timeout: Annotated[str, typer.Option("--timeout", metavar="TIME", help="Of a request, from the moment it is due.")] = "10s",
    connections: Annotated[
        int,
        typer.Option(
            "--connections",
            metavar="N",
            min=0,
            help="Opened before the run [default: gRPC 2, HTTP what a second of the load needs, 8 to 256].",
            show_default=False,
        ),
    ] = 0,
    max_in_flight: Annotated[
        int,
        typer.Option("--max-in-flight", metavar="N", min=1, help="Requests; past it due ones wait, which can make it INVALID."),
    ] = 4096,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of arrivals and random inputs.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="A new folder for the report (load.json) and the record of every request."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")] = False,
) -> None:
    """Send a model requests by a schedule laid down beforehand, and tell latency from the due time of every one of them.

    Every run ends VALID, or INVALID with the reasons why it measured the generator and not the server. Ends with 1 when it is
    INVALID, or a goal was given and is not proven to be met.
    """
    from tenure import verbs
    from tenure.decide.verdicts import parse_goal
    from tenure.resources import parse_duration
    from tenure.serve.load.loop import INTERRUPTED
    from tenure.serve.load.plan import LoadPlan

    wanted = None if goal is None else parse_goal(goal)
    searching = wanted is not None and not (rate or clients or schedule)
    plan = LoadPlan(
        url=url,
        model=model,
        rate_per_s=1.0 if searching else rate or 0.0,
        clients=clients or 0,
        schedule=str(schedule) if schedule else "",
        arrivals=arrivals,  # type: ignore[arg-type]  # checked there
        seconds=10.0 if searching or time is None else parse_duration(time),
        warmup_s=None if warm_up is None else parse_duration(warm_up),
        batch=batch,
        inputs=str(inputs) if inputs else "",
        shapes=dict(_shape(text) for text in shape or ()),
        json=json_tensors,
        timeout_s=parse_duration(timeout),
        connections=connections,
        max_in_flight=max_in_flight,
        seed=seed,
    )
    if searching:
        assert wanted is not None
        output.say(
            f"search   highest rate with {wanted}, {plan.arrivals} arrivals, of {output.clean(model)} at {output.clean(url)}",
            sys.stderr,
        )
        found = verbs.bench_rate(
            plan,
            wanted,
            max_s=SEARCH_S if time is None else parse_duration(time),
            folder=out,
            told=lambda report: output.say(_probe_line(report), sys.stderr),
        )
        output.say(output.as_json(found) if json else "\n".join(search_text(found)), sys.stdout)
        proven, ended = found.met_per_s > 0, found.why
    else:
        report = verbs.bench_load(plan, goal=wanted, folder=out)
        output.say(output.as_json(report) if json else "\n".join(load_text(report)), sys.stdout)
        answer, ended = report.verdict.cautious, report.stopped
        proven = report.verdict.valid and (wanted is None or (answer is not None and answer.answer == "met"))
    if ended.startswith(INTERRUPTED):
        raise typer.Exit(exits.INTERRUPTED)
    raise typer.Exit(exits.OK if proven else exits.JOB_FAILED)


def search_text(found: SearchReport) -> list[str]:
    """Return what a search found in lines, for people."""
    edge = f"; open at {', '.join(f'{rate:g}' for rate in found.open_per_s)}/s" if found.open_per_s else ""
    missed = "" if found.missed_per_s is None else f"; {found.missed_per_s:g}/s misses it"
    best = f"{found.met_per_s:g}/s meets" if found.met_per_s else "no rate is proven to meet"
    lines = [
        f"highest  {best} {found.goal}{missed}{edge} ({found.confidence:.0%} sure, {len(found.probes)} runs, "
        f"{found.seconds:.0f} s)",
        f"ended    {found.why}",
    ]
    return lines + ([] if found.report is None else ["", *load_text(found.report)])


def _probe_line(report: LoadReport) -> str:
    verdict, plan = report.verdict, report.plan
    answer = verdict.cautious
    told = "" if answer is None else f"{answer.over:,} of {answer.requests:,} over, alone {answer.answer}"
    return f"run      {plan.rate_per_s:g}/s for {plan.seconds:.3g} s: {verdict.word}, {told}" + (
        f" ({verdict.reasons[0]})" if verdict.reasons else ""
    )


def load_text(report: LoadReport) -> list[str]:
    """Return a report in lines, for people."""
    plan, found = report.plan, report.summary
    counts = found.counts
    bad = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in ("wrong", "failed", "timed_out", "dropped"))
    lines = [
        f"load     {_asked(report)} of {output.clean(plan.model)} at {output.clean(plan.url)}",
        f"requests {found.due:,} due ({found.asked_per_s:,.1f}/s), {counts['ok']:,} answered "
        f"({found.answered_per_s:,.1f}/s), {bad}",
    ]
    lines += [f"         {count:,} x {output.clean(reason)}" for reason, count in report.reasons.items()]
    lines += [
        _row("latency", found.latency, "from the due time" if report.kind == "open" else "from when its client was free"),
        _row("service", found.service, "from being sent, answered ones"),
        _row("delay", found.issue_delay, f"of sending: the generator's own; {found.late:,} later than 1 ms"),
        f"own use  {report.own.cpu_share:.0%} of one core, {report.peak_in_flight:,} in flight at most",
    ]
    warmth = report.warmth
    settled = "until the server had settled" if warmth.settled else "and the server had not settled"
    lines.append(
        f"warm-up  {warmth.requests} requests in {warmth.seconds:.2g} s, {settled}; "
        f"then {report.measured_from_s:g} s not counted"
    )
    if report.stopped:
        lines.append(f"ended    early: {report.stopped}")
    return lines + _verdict(report)


def _verdict(report: LoadReport) -> list[str]:
    verdict = report.verdict
    lines = [f"note     {output.clean(note)}" for note in verdict.notes]
    if (answer := verdict.cautious) is not None:
        more = f"; {answer.missing:,} more within it would prove it met" if answer.missing else ""
        lines.append(
            f"goal     {verdict.goal}: {answer.answer} ({answer.over:,} of {answer.requests:,} requests over it, "
            f"{answer.confidence:.0%} sure{more})"
        )
    if (p99 := verdict.percentiles.get("p99")) is not None:
        span = f"{_time(p99.low_s)} to {_time(p99.high_s)}" if p99.high_s is not None else f"from {_time(p99.low_s)} on"
        lines.append(f"{verdict.word:<8} p99 {_time(p99.value_s)}, {p99.level:.0%} interval {span}")
    else:
        lines.append(verdict.word)
    return lines + [f"         {output.clean(reason)}" for reason in verdict.reasons]


def _asked(report: LoadReport) -> str:
    plan = report.plan
    rows = f", batch {plan.batch}" if plan.batch > 1 else ""
    if plan.clients:
        return f"closed loop, {plan.clients} clients for {plan.seconds:g} s{rows}"
    if plan.schedule:
        return f"open loop, schedule {output.clean(plan.schedule)}{rows}"
    return f"open loop, {plan.rate_per_s:g}/s {plan.arrivals} for {plan.seconds:g} s{rows}"


def _row(name: str, figures: Figures, what: str) -> str:
    times = "  ".join(f"{key} {_time(value)}" for key, value in figures.percentiles_s.items())
    return f"{name:<8} {times}  max {_time(figures.max_s)}  ({what})"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.3g} {unit}"


def _shape(text: str) -> tuple[str, Shape]:
    from tenure.serve.load.payload import Shape

    parts = text.split(":")
    lengths = parts[-1].split(",")
    if len(parts) not in (2, 3) or not parts[0] or not all(part.isdigit() for part in lengths):
        raise SpecError(
            f"--shape is NAME:N,N or NAME:TYPE:N,N such as x:3,224,224 or x:FP32:1024, lengths beside the batch; found {text!r}"
        )
    return parts[0], Shape(tuple(int(part) for part in lengths), parts[1] if len(parts) == 3 else "")
