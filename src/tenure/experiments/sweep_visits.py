"""Several visits to one setting in one repeat, added up to one cell: times and counts are sums, extremes are extremes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tenure.experiments.sweep_crossing import Crossed
from tenure.experiments.sweep_nodes import Asked
from tenure.experiments.sweep_parties import CellUse, PartyUse
from tenure.serve.load.orders import Cell


def added(visits: Sequence[Asked]) -> Asked:
    """Return the sum of one or more visits to a setting. Its place in the order is their mean."""
    first = visits[0]
    if len(visits) == 1:
        return first
    requests = sum(each.cell.requests for each in visits)

    def per_request(name: str) -> float:
        return float(sum(getattr(each, name) * each.cell.requests for each in visits) / requests)

    return replace(
        first,
        order=statistics.fmean(each.order for each in visits),
        cell=_cell([each.cell for each in visits]),
        latencies_s=np.concatenate([each.latencies_s for each in visits]),
        use=_use([each.use for each in visits]),
        queue_s=per_request("queue_s"),
        compute_s=per_request("compute_s"),
        lease_memory_bytes=max(each.lease_memory_bytes for each in visits),
        crossed=_crossed([each.crossed for each in visits if each.crossed is not None], visits),
    )


def _cell(cells: Sequence[Cell]) -> Cell:
    first = cells[0]
    return replace(
        first,
        requests=sum(each.requests for each in cells),
        images=sum(each.images for each in cells),
        wall_s=sum(each.wall_s for each in cells),
        stages={name: sum(each.stages[name] for each in cells) for name in first.stages},
        latencies_dropped=sum(each.latencies_dropped for each in cells),
        cpu_s=sum(each.cpu_s for each in cells),
        own_cpu_s=sum(each.own_cpu_s for each in cells),
        wrong=sum(each.wrong for each in cells),
        failed=sum(each.failed for each in cells),
    )


def _use(uses: Sequence[CellUse]) -> CellUse:
    span_s = sum(each.span_s for each in uses)
    return CellUse(
        span_s=span_s,
        parties={name: _party([each.parties[name] for each in uses if name in each.parties]) for name in uses[0].parties},
        host_cpu_s=sum(each.host_cpu_s for each in uses),
        gpu_busy=sum(each.gpu_busy * each.span_s for each in uses) / span_s,
        gpu_busy_max=max(each.gpu_busy_max for each in uses),
        gpu_busy_min=min(each.gpu_busy_min for each in uses),
        gpu_memory_bytes=max(each.gpu_memory_bytes for each in uses),
    )


def _party(uses: Sequence[PartyUse]) -> PartyUse:
    return PartyUse(
        cpu_s=sum(each.cpu_s for each in uses),
        cores_min=min(each.cores_min for each in uses),
        cores_max=max(each.cores_max for each in uses),
        memory_bytes=max(each.memory_bytes for each in uses),
    )


def _crossed(found: Sequence[Crossed], visits: Sequence[Asked]) -> Crossed | None:
    if not found:
        return None
    wall_s = [each.cell.wall_s for each in visits]
    return Crossed(
        busy=sum(each.busy * seconds for each, seconds in zip(found, wall_s, strict=True)) / sum(wall_s),
        forwarder_cpu_s=sum(each.forwarder_cpu_s for each in found),
        forwarder_memory_bytes=max(each.forwarder_memory_bytes for each in found),
        invalid=next((each.invalid for each in found if each.invalid), ()),
    )
