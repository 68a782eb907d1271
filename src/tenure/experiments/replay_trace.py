"""Traces to replay: what was asked for, when, and how long it took. One reader per form, told apart by their columns.

| form | columns |
| --- | --- |
| our own | `COLUMNS`; only id, submit_s and duration_s are needed |
| openb pod list | name, cpu_milli, memory_mib, num_gpu, gpu_milli, gpu_spec, creation_time, deletion_time, scheduled_time |
| Philly in Gavel's form | vc, job, gpus, submit_s, duration_v100_s |
| ledger | the home's own leases that have run and ended |

Not here: what is made of them (`replay`). No job's duration reaches a decider.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tenure.errors import SpecError
from tenure.experiments.replay_tables import Row, columns_of, distinct, read_text, refuse_unknown, rows_of
from tenure.experiments.simulator import TraceJob
from tenure.leases import Lease
from tenure.resources import Envelope

COLUMNS = ("id", "tenant", "submit_s", "gpus", "gang", "cpus", "memory_bytes", "duration_s", "estimate_s")
"""Of our own table. gang: members that run together or not at all; gpus, cpus, memory_bytes: of each of them."""
LEAST_BYTES = 1 << 20
LEAST_CPUS = 0.001
"""What stands for nothing where a trace states no CPU or no memory: the least that an envelope may have."""
_OPENB = ("name", "cpu_milli", "num_gpu", "gpu_milli")
_PHILLY = ("vc", "job", "gpus", "submit_s", "duration_v100_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTrace:
    """A trace, and what a reader should know of it."""

    name: str
    jobs: tuple[TraceJob, ...]
    """By time of submission; the earliest comes at second 0."""
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Job id -> GPU models that it may run on; absent: any. Only placement alone (`--fill`) looks at it."""
    timed: bool = True
    """Whether it says when jobs came and how long they took."""
    notes: tuple[str, ...] = ()
    """What was left out or stood in for, in sentences."""

    def digest(self) -> str:
        """Return a hash of everything that decides what a replay gives."""
        text = "\n".join(f"{job!r} {self.models.get(job.id, ())!r}" for job in self.jobs)
        return hashlib.sha256(text.encode()).hexdigest()

    def first(self, count: int) -> LoadedTrace:
        """Return the first jobs by submission; 0: all."""
        if not 0 < count < len(self.jobs):
            return self
        return replace(
            self, jobs=self.jobs[:count], notes=(*self.notes, f"Only the first {count:,} of {len(self.jobs):,} jobs.")
        )


def load_trace(path: Path, *, largest_gpus: int = 0, timeless: bool = False) -> LoadedTrace:
    """Return the jobs of a file. Raises NotFound, and SpecError with line and column.

    largest_gpus: GPUs of the largest node, by which a form without gangs has its jobs cut into members. timeless: nobody asks
    when jobs came or how long they took, so those that do not say it are kept.
    """
    text = read_text(path)
    columns = columns_of(text, path)
    if set(_OPENB) <= set(columns):
        return _sorted(_openb(path, text, columns, timeless=timeless))
    if set(_PHILLY) <= set(columns):
        return _sorted(_philly(path, text, largest_gpus))
    if not {"id", "submit_s", "duration_s"} <= set(columns):
        raise SpecError(
            f"{path}:1: no form of a trace has these columns ({', '.join(columns)}). Our own: {', '.join(COLUMNS)}, of which "
            f"id, submit_s and duration_s are needed; openb: {', '.join(_OPENB)} ...; Philly: {', '.join(_PHILLY)}"
        )
    refuse_unknown(columns, COLUMNS, path)
    return _sorted(LoadedTrace(name=path.name, jobs=tuple(_own(row) for row in distinct(rows_of(text, path), "id"))))


def of_leases(leases: Sequence[Lease], *, max_leases: int = 0) -> LoadedTrace:
    """Return a ledger's history: each gang of leases that ran and ended is one job, as long as its longest member was held.

    max_leases: how many were asked for, so that a history that was cut says so; 0: all.
    """
    gangs: dict[str, list[Lease]] = {}
    for lease in leases:
        gangs.setdefault(lease.gang_id or lease.id, []).append(lease)
    jobs = []
    for name, members in gangs.items():
        longest_s = max(lease.held_s for lease in members)
        if longest_s <= 0 or any(not lease.ended_at_s for lease in members):
            continue
        jobs.append(
            TraceJob(
                id=name,
                tenant=members[0].tenant,
                submit_s=min(lease.requested_at_s for lease in members),
                envelope=max((lease.envelope for lease in members), key=_size),
                members=len(members),
                duration_s=longest_s,
            )
        )
    left = len(gangs) - len(jobs)
    notes = [f"Gangs of the ledger that never ran or have not ended are left out: {left:,} of {len(gangs):,}."] if left else []
    unlike = sum(len({lease.envelope for lease in members}) > 1 for members in gangs.values())
    notes += [f"Gangs of unlike members count as their largest: {unlike:,}."] if unlike else []
    notes += [f"Only the newest {max_leases:,} leases of the ledger were read."] if len(leases) == max_leases else []
    if not jobs:
        raise SpecError(
            "the ledger of this home has no lease that has run and ended, so there is no history to replay; "
            "run something first, or name a trace file"
        )
    return _sorted(LoadedTrace(name="ledger", jobs=tuple(jobs), notes=tuple(notes)))


def _size(envelope: Envelope) -> tuple[float, ...]:
    return (envelope.gpus, envelope.cpus, envelope.memory_bytes)


def _sorted(trace: LoadedTrace) -> LoadedTrace:
    if not trace.jobs:
        raise SpecError(f"{trace.name} has no job that could be replayed. {' '.join(trace.notes)}".strip())
    first_s = min(job.submit_s for job in trace.jobs)
    jobs = [replace(job, submit_s=job.submit_s - first_s) for job in trace.jobs]
    return replace(trace, jobs=tuple(sorted(jobs, key=lambda job: job.submit_s)))


def _own(row: Row) -> TraceJob:
    gpus = row.number("gpus", 0.0)
    if gpus > 1 and gpus != int(gpus):
        raise row.error("gpus", f"whole devices, or a part of one below 1, were expected; found {row.text('gpus')!r}")
    memory_bytes = row.size("memory_bytes", 256 << 20)
    if memory_bytes < LEAST_BYTES:
        raise row.error("memory_bytes", f"at least 1MiB was expected; found {row.text('memory_bytes')!r}")
    cpus = row.number("cpus", 1.0, above=True)
    estimate = (row.cells.get("estimate_s") or "").strip()
    return TraceJob(
        id=row.text("id"),
        tenant=row.text("tenant", "default"),
        submit_s=row.number("submit_s"),
        envelope=row.checked("gpus", lambda: Envelope(cpus=cpus, memory_bytes=memory_bytes, gpus=gpus, disk_bytes=0)),
        members=row.whole("gang", 1, low=1),
        duration_s=row.number("duration_s", above=True),
        estimate_s=row.number("estimate_s", above=True) if estimate else None,
    )


def _openb(path: Path, text: str, columns: Sequence[str], *, timeless: bool) -> LoadedTrace:
    timed = not timeless and {"creation_time", "deletion_time", "scheduled_time"} <= set(columns)
    jobs, models, unused = [], {}, 0
    for row in distinct(rows_of(text, path), "name"):
        count, milli = row.whole("num_gpu"), row.whole("gpu_milli")
        if count and not 0 < milli <= 1000:
            raise row.error("gpu_milli", f"1 to 1000 was expected; found {milli}")
        cpus, memory_bytes = row.number("cpu_milli") / 1000, row.whole("memory_mib", 1) << 20
        began_s = row.number("scheduled_time", row.number("creation_time")) if timed else 0.0
        duration_s = row.number("deletion_time", began_s) - began_s if timed else 1.0
        if duration_s <= 0:
            unused += 1
            continue
        spec = row.text("gpu_spec", "")
        if spec:
            models[row.text("name")] = tuple(sorted(spec.split("|")))
        jobs.append(
            TraceJob(
                id=row.text("name"),
                tenant=row.text("qos", "default"),
                submit_s=row.number("creation_time") if timed else 0.0,
                envelope=Envelope(
                    cpus=max(cpus, LEAST_CPUS),
                    memory_bytes=max(memory_bytes, LEAST_BYTES),
                    gpus=float(count) if milli == 1000 or not count else milli / 1000,
                    disk_bytes=0,
                ),
                duration_s=duration_s,
            )
        )
    notes = [f"Pods without any time between start and end are left out: {unused:,}."] if unused else []
    notes += [f"Pods that name GPU models: {len(models):,}; only --fill looks at that."] if models else []
    return LoadedTrace(name=path.name, jobs=tuple(jobs), models=models, timed=timed, notes=tuple(notes))


def _philly(path: Path, text: str, largest_gpus: int) -> LoadedTrace:
    jobs, cut = [], 0
    for row in distinct(rows_of(text, path), "vc", "job"):
        gpus = row.whole("gpus", low=1)
        members = _members(gpus, largest_gpus)
        cut += members > 1
        jobs.append(
            TraceJob(
                id=f"{row.text('vc')}/{row.text('job')}",
                tenant=row.text("vc"),
                submit_s=row.number("submit_s"),
                envelope=Envelope(cpus=LEAST_CPUS, memory_bytes=LEAST_BYTES, gpus=gpus / members, disk_bytes=0),
                members=members,
                duration_s=row.number("duration_v100_s", above=True),
            )
        )
    notes = ["Philly states no CPU and no memory: only GPUs count."]
    notes += [f"Jobs that ask for more GPUs than a node has are gangs of equal members: {cut:,}."] if cut else []
    return LoadedTrace(name=path.name, jobs=tuple(jobs), notes=tuple(notes))


def _members(gpus: int, largest: int) -> int:
    """Return into how many equal members of whole GPUs a job is cut so that each fits on the largest node."""
    if largest <= 0 or gpus <= largest:
        return 1
    return next(members for members in range(-(-gpus // largest), gpus + 1) if gpus % members == 0)
