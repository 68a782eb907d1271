"""From the cells of an experiment to its trials: one per setting, every metric summed up over the repeats.

Not here: what is kept of each cell as it ends (`sweep_raw`), what follows from trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tenure.experiments.architectures import percentile
from tenure.experiments.machine_load import DISTURBED_CORES
from tenure.experiments.sweep import Setting
from tenure.experiments.sweep_nodes import Asked
from tenure.experiments.sweep_parties import CellUse
from tenure.experiments.sweep_visits import added
from tenure.serve.load.orders import STAGES
from tenure.trials import Trial
from tenure.usage import Summary, summarize

QUANTILES = 1000
"""Parts of the curve of latencies."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """What a cell used on nodes that had run nothing else."""

    use: CellUse
    same_data: bool
    """False: its application took its data from elsewhere, and tells the server's memory alone."""


def trials_of(
    asked: Iterable[Asked],
    *,
    prepare_model_s: Callable[[Setting], Sequence[float]],
    server_start_s: Callable[[Setting], float],
    make_trial: Callable[..., Trial],
    seed: int,
    note: Callable[[Setting], str],
    fresh: Mapping[Setting, Fresh] | None = None,
) -> list[Trial]:
    """Return one trial per setting, in the order in which settings were first met.

    make_trial: called with source, configuration, metrics, seed, curves, note. fresh: where memory was measured apart.
    """
    by_setting: dict[Setting, dict[int, list[Asked]]] = {}
    for each in asked:
        by_setting.setdefault(each.setting, {}).setdefault(each.repeat, []).append(each)
    made = []
    for setting, visits in by_setting.items():
        cells = [added(visits[repeat]) for repeat in sorted(visits)]
        metrics = metrics_of(cells) | {"prepare_model_s": summarize(prepare_model_s(setting))}
        if fresh and setting in fresh:
            metrics |= _memory(fresh[setting])
        if start_s := server_start_s(setting):
            metrics["server_start_s"] = summarize([start_s])
        made.append(
            make_trial(
                source="sweep",
                configuration=setting.configuration(),
                metrics=metrics,
                seed=seed,
                curves=curves_of(cells),
                note=" ".join(filter(None, (_invalid(cells), note(setting), _disturbance(metrics)))),
            )
        )
    return made


def metrics_of(cells: Sequence[Asked]) -> dict[str, Summary]:
    """Return the metrics of one setting's cells. Percentiles are of all requests of all repeats in one pool."""
    rows = [row_of(each) for each in cells]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    pool = _pool(cells)
    found = {name: summarize([row[name] for row in rows]) for name in names}
    return found | {"p50_s": summarize([percentile(pool, 50)]), "p99_s": summarize([percentile(pool, 99)])}


def curves_of(cells: Sequence[Asked]) -> dict[str, tuple[float, ...]]:
    """Return what is kept in order: rates by repeat, places in the order, the quantiles of all latencies (0, 0.1 % … 100 %)."""
    pool = _pool(cells)
    return {
        "images_per_s": tuple(each.cell.images / each.cell.wall_s for each in cells),
        "order": tuple(float(each.order) for each in cells),
        "latency_s": (pool[0], *(percentile(pool, 100 * place / QUANTILES) for place in range(1, QUANTILES + 1))),
    }


def _pool(cells: Sequence[Asked]) -> list[float]:
    """Return all latencies of one setting, sorted."""
    pooled: list[float] = np.sort(np.concatenate([each.latencies_s for each in cells])).tolist()
    return pooled


def _memory(fresh: Fresh) -> dict[str, Summary]:
    """Return the memory of the parties that a fresh cell tells of."""
    parties = fresh.use.parties
    return {
        f"{name}_memory_bytes": summarize([party.memory_bytes])
        for name, party in parties.items()
        if name != "app" or fresh.same_data
    }


def row_of(asked: Asked) -> dict[str, float]:
    """Return one cell's metrics. docs/bench-serve.md defines each of them."""
    cell, use, setting = asked.cell, asked.use, asked.setting
    found = {
        "images_per_s": cell.images / cell.wall_s,
        "mean_s": float(asked.latencies_s.mean(dtype=np.float64)),
        "requests": float(cell.requests),
        "wall_s": cell.places * cell.wall_s / cell.requests,
        **{name: cell.stages[name] / cell.requests for name in STAGES if name in cell.stages},
        "wrong_answers": float(cell.wrong),
    }
    parts = {"app": cell.cpu_s}
    client_s = max(0.0, cell.cpu_s - cell.own_cpu_s)  # what is not the application's own work is the client's, or the engine's
    if setting.architecture == "simple":
        parts["recogniser"] = client_s
    else:
        parts["client"] = client_s
    for name in ("server", "recogniser"):
        if name in use.parties:
            parts[name] = use.parties[name].cpu_s
    for name, cpu_s in parts.items():
        found[f"{name}_cpu"] = cpu_s / cell.wall_s
        found[f"{name}_cpu_s_per_image"] = cpu_s / cell.images
    for name, party in use.parties.items():
        found[f"{name}_cpu_max"], found[f"{name}_cpu_min"] = party.cores_max, party.cores_min
        found[f"{name}_memory_bytes"] = party.memory_bytes / (setting.clients if name == "app" else 1)
    own_s = sum(use.parties[name].cpu_s for name in ("app", "server") if name in use.parties)
    found["other_cpu_cores"] = max(0.0, use.host_cpu_s - own_s) / use.span_s if use.span_s else 0.0
    if (crossed := asked.crossed) is not None:
        if crossed.busy:
            found["link_busy"] = crossed.busy
        if crossed.forwarder_memory_bytes:
            found["forwarder_cpu"] = crossed.forwarder_cpu_s / cell.wall_s
            found["forwarder_cpu_s_per_image"] = crossed.forwarder_cpu_s / cell.images
            found["forwarder_memory_bytes"] = crossed.forwarder_memory_bytes
    if asked.compute_s:
        found["queue_s"], found["compute_s"] = asked.queue_s, asked.compute_s
    if asked.lease_memory_bytes:
        found["server_lease_memory_bytes"] = asked.lease_memory_bytes
    if use.gpu_memory_bytes:
        found["gpu_busy"], found["gpu_busy_max"], found["gpu_busy_min"] = use.gpu_busy, use.gpu_busy_max, use.gpu_busy_min
        found["gpu_memory_bytes"] = use.gpu_memory_bytes
    return found


def _invalid(cells: Sequence[Asked]) -> str:
    """Return why some of the cells are no measurement of the declared link; empty when all are."""
    wrong = [each.crossed.invalid for each in cells if each.crossed and each.crossed.invalid]
    return f"INVALID in {len(wrong)} of {len(cells)} repeats: {wrong[0][0]}." if wrong else ""


def _disturbance(metrics: Mapping[str, Summary]) -> str:
    other = metrics["other_cpu_cores"].mean
    return f"Others kept {other:.1f} cores busy meanwhile." if other > DISTURBED_CORES else ""
