"""What commands print: nouns as JSON, or as aligned plain tables. Not here: progress of a run (`display`)."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # the nouns cost 60 ms, which `tenure --help` need not pay
    from tenure.broker.ledgers import Restored
    from tenure.events import Event
    from tenure.experiments.flow import Outcome
    from tenure.leases import Lease
    from tenure.meter.doctor import Finding
    from tenure.nodes import Node
    from tenure.retention import Freed
    from tenure.runs import Run
    from tenure.trials import Candidate, Recommendation, Trial
    from tenure.wire import Backup

MAX_CELL = 60
"""Longest text of a table cell; --json has all of it."""


def clean(text: str) -> str:
    """Return the text in one line without control, format or surrogate characters, which could move or recolour a terminal."""
    return _printable(" ".join(str(text).split()))


def clean_lines(text: str) -> str:
    """Return the text as `clean` does, its lines and their indents kept."""
    return "\n".join(_printable(line.expandtabs(4)) for line in text.splitlines())


def _printable(line: str) -> str:
    return "".join("�" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in line)


def say(text: str, out: TextIO) -> None:
    """Write one text and a newline, at once."""
    out.write(text + "\n")
    out.flush()


def as_json(value: Any) -> str:
    """Return nouns (also in tuples and dicts), paths and plain data as one line of JSON."""
    # imported here: msgspec is not needed for --help
    from pathlib import Path

    import msgspec

    def other(item: Any) -> Any:
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"cannot print {type(item).__name__} as JSON")

    return msgspec.json.encode(value, enc_hook=other).decode()


def outcome_json(outcome: Outcome, code: int) -> str:
    """Return how a run ended as one line of JSON, with the exit code that the command ends with."""
    fields = {
        "run": outcome.run,
        "closing": outcome.closing,
        "report_html": outcome.report_html,
        "report_json": outcome.report_json,
        "failed": outcome.failed,
        "exit_code": code,
    }
    return as_json(fields)


def tell_outcome(outcome: Outcome, code: int, out: TextIO, err: TextIO, *, json: bool) -> None:
    """Say how a run ended, where its report is, and on `err` why it failed if it did."""
    if json:
        say(outcome_json(outcome, code), out)
    else:
        say(f"run      {clean(outcome.run.id)} {outcome.run.state}", out)
        if outcome.report_html.exists():  # a full disk may have kept it from being written, and that was told
            say(f"report   {outcome.report_html}\nfigures  {outcome.report_json}", out)
    if outcome.failed:
        say(clean_lines(f"tenure: {outcome.failed}"), err)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> str:
    """Return aligned columns, two spaces apart, or `empty` when there is no row."""
    if not rows:
        return empty
    cells = [[_cut(clean(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(heads), *cells]) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [heads, *cells])


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def when(utc_s: float) -> str:
    """Return UTC seconds as ``2025-01-31 14:05:09``, or a dash for 0, which means not yet."""
    return datetime.fromtimestamp(utc_s, UTC).strftime("%Y-%m-%d %H:%M:%S") if utc_s else "-"


def gpu_text(lease: Lease, nodes: Sequence[Node], *, at_length: bool = False) -> str:
    """Return a lease's devices and how far they are held, at length with the means; a dash for a lease without."""
    from tenure.devices import hold
    from tenure.resources import show_bytes

    gpus = next((node.capacity.gpus for node in nodes if node.name == lease.node), ())
    held = hold(gpus, lease.devices, runtime=lease.command.runtime)
    if held is None:
        return "-"
    which = ",".join(str(share.index) for share in lease.devices)
    size = f"{lease.envelope.gpus:g} on gpu {which}"
    if lease.envelope.gpu_memory_bytes:
        size += f", {show_bytes(lease.envelope.gpu_memory_bytes)}"
    words = f"share {held.share}, memory {held.memory}"
    return f"{size}; {words}: {held.means}" if at_length else f"{size} ({words})"


def leases_table(leases: Sequence[Lease], nodes: Sequence[Node] = ()) -> str:
    """Return one row per lease; of GPUs only where a lease has some. nodes: those that leases hold devices of."""
    from tenure.resources import show_bytes

    with_gpus = any(lease.devices for lease in leases)
    rows = [
        (
            lease.id,
            lease.run_id,
            f"{lease.stage}/{lease.worker}",
            _state(lease),
            lease.node or "-",
            f"{lease.envelope.cpus:g}",
            show_bytes(lease.envelope.memory_bytes),
            *([gpu_text(lease, nodes)] if with_gpus else []),
            when(lease.starts_at_s),
            when(lease.ended_at_s or lease.ends_at_s),
        )
        for lease in leases
    ]
    gpu = ("GPU",) if with_gpus else ()
    heads = ("LEASE", "RUN", "STAGE/WORKER", "STATE", "NODE", "CPUS", "MEMORY", *gpu, "FROM (UTC)", "UNTIL (UTC)")
    return table(heads, rows, empty="no leases")


def _state(lease: Lease) -> str:
    if lease.end_reason is None:
        return str(lease.state)
    return f"{lease.state} ({lease.end_reason})" if lease.state in ("draining", "ended") else f"{lease.state} (gives way)"


def runs_table(runs: Sequence[Run]) -> str:
    """Return one row per run."""
    rows = [
        (run.id, run.name, run.tenant, str(run.state), when(run.created_at_s), _stages(run), run.source or "-") for run in runs
    ]
    return table(("RUN", "NAME", "TENANT", "STATE", "BEGUN (UTC)", "STAGES", "JOB FILE"), rows, empty="no runs")


def _stages(run: Run) -> str:
    return ", ".join(f"{stage.name} {stage.state}" for stage in run.stages)


def events_table(events: Sequence[Event]) -> str:
    """Return one row per event."""
    rows = [
        (str(e.seq), when(e.at_s), e.kind, e.who, e.run_id or "-", e.stage or "-", e.lease_id or "-", e.why) for e in events
    ]
    return table(("SEQ", "WHEN (UTC)", "KIND", "WHO", "RUN", "STAGE", "LEASE", "WHY"), rows, empty="no events")


def trials_table(trials: Sequence[Trial]) -> str:
    """Return one row per trial; metrics as mean ± standard error."""
    rows = [
        (trial.id, trial.run_id, trial.stage, trial.source, configuration_text(trial.configuration), _metrics(trial))
        for trial in trials
    ]
    return table(
        ("TRIAL", "RUN", "STAGE", "SOURCE", "CONFIGURATION", "METRICS (mean ± standard error)"), rows, empty="no trials"
    )


def configuration_text(configuration: Mapping[str, Any]) -> str:
    """Return factors and levels in one line."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in configuration.items()
    )


def _metrics(trial: Trial) -> str:
    return ", ".join(f"{name} {s.mean:.4g}±{s.standard_error:.2g}" for name, s in trial.metrics.items())


def nodes_table(nodes: Sequence[Node]) -> str:
    """Return one row per node."""
    from tenure.resources import show_bytes

    rows = [
        (
            node.name,
            str(node.state),
            f"{node.held_cpus:g} of {node.capacity.cpus:g}",
            f"{show_bytes(node.held_memory_bytes)} of {show_bytes(node.capacity.memory_bytes)}",
            str(len(node.capacity.gpus)),
            "; ".join(node.confinement.values()) or ", ".join(node.runtimes),
            node.machine.cpu_model,
        )
        for node in nodes
    ]
    return table(("NODE", "STATE", "CPUS HELD", "MEMORY HELD", "GPUS", "CONFINEMENT", "CPU MODEL"), rows, empty="no nodes")


def freed_table(freed: Sequence[Freed], *, dry_run: bool) -> str:
    """Return one row per kind of what went, or would go, and the sum."""
    from tenure.resources import show_bytes

    rows = [(part.kind, str(part.count), show_bytes(part.size_bytes), ", ".join(part.names)) for part in freed]
    rows.append(("together", "", show_bytes(sum(part.size_bytes for part in freed)), ""))
    return table(("WOULD GO" if dry_run else "REMOVED", "COUNT", "SIZE", "WHICH"), rows, empty="nothing")


def findings_text(findings: Sequence[Finding]) -> str:
    """Return what `doctor` found: what is there, what follows from it, and what each missing thing would take."""
    words = {True: "ok", False: "BROKEN", None: "absent"}
    lines = []
    for finding in findings:
        lines.append(f"{words[finding.ok]:<7} {clean(finding.name)}: {clean(finding.found)}")
        lines += [f"{'':<7} {prefix}{clean(text)}" for prefix, text in (("", finding.means), ("-> ", finding.remedy)) if text]
    return "\n".join(lines)


def recommendations_text(recommendations: Sequence[Recommendation]) -> str:
    """Return each recommendation: what to lease, what is expected, what was ruled out and the constraint it broke."""
    return "\n\n".join(_recommendation(item) for item in recommendations) or "no stage has a goal: nothing to recommend"


def _recommendation(item: Recommendation) -> str:
    lines = [f"{clean(item.stage)}: {clean(item.goal)}"]
    if item.chosen is None:
        lines.append("  lease: nothing; every configuration breaks a constraint")
    else:
        lines.append(f"  lease: {_candidate(item.chosen)}")
        lines += [
            f"    {name}: {p.value:.4g} ({p.level:.0%} between {p.low:.4g} and {p.high:.4g})"
            for name, p in item.chosen.predictions.items()
        ]
    if item.why:
        lines.append(f"  why: {clean(item.why)}")
    if item.thin:
        lines.append(f"  too little data: {clean(item.thin)}")
    for candidate in item.ruled_out:
        reasons = "; ".join(clean(broken.reason) for broken in candidate.broken) or "costs more"
        lines.append(f"  not {configuration_text(candidate.configuration)}: {reasons}")
    return "\n".join(lines)


def _candidate(candidate: Candidate) -> str:
    envelope = f", {candidate.leases} x [{candidate.envelope.describe()}]" if candidate.envelope else ""
    return f"{configuration_text(candidate.configuration)}{envelope}"


def backup_text(made: Backup) -> str:
    """Return what a backup holds."""
    counts = ", ".join(f"{count} {clean(name)}" for name, count in made.rows.items() if count)
    return f"backup   {clean(made.path)}\nholds    {counts or 'nothing yet'} (schema {clean(made.schema)})"


def restored_text(made: Restored) -> str:
    """Return what was restored, where to, and where what was there before is now."""
    lines = [backup_text(made.backup), f"ledger   {clean(made.ledger)}"]
    lines += [f"before   {clean(made.aside)}"] if made.aside else []
    return "\n".join(lines)
