"""All cells of a serving experiment, one after the other in the order that was drawn, and its trials.

What is broken off, by Ctrl-C or by a cell that fails, keeps the trials of whole repeats and every cell as a line of JSON,
and goes on from there when it is run again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from tenure.experiments.following import show_time
from tenure.experiments.sweep import Setting, fresh, in_flight, order
from tenure.experiments.sweep_nodes import Asked, Bench, Nodes, standing
from tenure.experiments.sweep_parties import PartyMeter
from tenure.experiments.sweep_raw import kept, raw_line
from tenure.experiments.sweep_trials import Fresh, trials_of
from tenure.meter.sample import NvmlSampler
from tenure.protocols import Progress
from tenure.sweeps import Sweep
from tenure.trials import Trial

RAW = "cells.jsonl"
"""Every cell as it ended, in the bench's work folder."""
LEAST_REPEATS = 2
"""Measured whatever the bound of time."""
WARM_S = 0.05
"""Of each setting's first cell, which nobody keeps."""
FRESH_SHARE, WARM_SHARE = 0.1, 0.15
"""Of the progress bar: up to where memory is measured, and up to where everything is warm."""


def measure_sweep(
    bench: Bench,
    sweep: Sweep,
    planned: Sequence[Setting],
    *,
    seed: int,
    make_trial: Callable[..., Trial],
    record: Callable[[Trial], None],
    progress: Progress,
    gpu: bool = False,
    now: Callable[[], float] = time.monotonic,
    foretell: Callable[[Sequence[Trial]], Sequence[Trial]] = lambda trials: trials,
) -> tuple[Trial, ...]:
    """Run all cells and return the trials, one per setting, each recorded.

    make_trial: called with source, configuration, metrics, seed, curves, note; adds what all trials share. gpu: watch the first
    one. now: a monotonic clock. foretell: adds to trials what others of them foretell. Raises JobFailed when a cell fails or
    gives a wrong answer, Refused without room.
    """
    path, drawn = bench.workdir / RAW, list(order(planned, sweep, seed))
    asked = kept(path, drawn, cells=len(planned) * sweep.visits)
    resumed = len(asked)
    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(PartyMeter(NvmlSampler if gpu else None))
        memory = measure_fresh(bench, sweep, planned, meter, progress=progress) if sweep.fresh else {}
        progress("starting the server and the applications")
        nodes = stack.enter_context(standing(bench, planned, meter))
        trials: tuple[Trial, ...] = ()
        short = "broken off"
        try:
            with path.open("ab") as raw:
                for each in cells(nodes, sweep, planned, drawn=drawn, done=resumed, progress=progress, now=now):
                    raw.write(raw_line(each))
                    raw.flush()
                    asked.append(each)
            short = "no time for more"
        finally:
            whole = len(asked) // (len(planned) * sweep.visits)
            made = trials_of(
                asked[: whole * len(planned) * sweep.visits],
                prepare_model_s=nodes.prepare_model_s,
                server_start_s=nodes.server_start_s,
                make_trial=make_trial,
                seed=seed,
                note=lambda setting: _note(setting, sweep, nodes, whole, short, resumed // (len(planned) * sweep.visits)),
                fresh=memory,
            )
            trials = tuple(foretell(made))
            for trial in trials:
                record(trial)
    return trials


def measure_fresh(
    bench: Bench, sweep: Sweep, planned: Sequence[Setting], meter: PartyMeter, *, progress: Progress
) -> dict[Setting, Fresh]:
    """Return the memory of each setting's parties on nodes that have run nothing else."""
    told_by = fresh(planned)
    found: dict[Setting, Asked] = {}
    for done, setting in enumerate(dict.fromkeys(told_by.values())):
        progress(f"memory, fresh processes: {setting.describe()}", done=FRESH_SHARE * done / len(set(told_by.values())))
        with standing(bench, [setting], meter) as nodes:
            found[setting] = nodes.run(setting, repeat=-1, order=-1, seconds=sweep.cell_s, in_flight=in_flight(sweep, setting))
    return {setting: Fresh(found[other].use, same_data=setting.data == other.data) for setting, other in told_by.items()}


def cells(
    nodes: Nodes,
    sweep: Sweep,
    planned: Sequence[Setting],
    *,
    drawn: Sequence[tuple[int, Setting]],
    progress: Progress,
    now: Callable[[], float],
    done: int = 0,
) -> Iterator[Asked]:
    """Yield every cell as it ends, repeats as far as `sweep.max_s` goes. A round before the first warms all up.

    drawn: the order of all cells. done: how many of them have been run before.
    """
    for place, setting in enumerate(planned):
        share = FRESH_SHARE + (WARM_SHARE - FRESH_SHARE) * place / len(planned)
        progress(f"warming up: {setting.describe()}", done=share)
        nodes.run(setting, repeat=-1, order=-1, seconds=WARM_S, in_flight=in_flight(sweep, setting), probes=False)
    total, began_s, of_one = len(drawn), now(), len(drawn) // sweep.repeats
    for place, (repeat, setting) in enumerate(drawn[done:], done):
        spent_s, ran = now() - began_s, place - done
        if place % of_one == 0 and repeat >= LEAST_REPEATS and ran and 0 < sweep.max_s < spent_s * (1 + of_one / ran):
            return
        left = f", about {show_time(spent_s / ran * (total - place))} left" if ran >= len(planned) else ""
        text = f"repeat {repeat + 1} of {sweep.repeats}: {setting.describe()}{left}"
        progress(text, done=WARM_SHARE + (1 - WARM_SHARE) * place / total)
        yield nodes.run(setting, repeat=repeat, order=place, seconds=sweep.cell_s, in_flight=in_flight(sweep, setting))


def _note(setting: Setting, sweep: Sweep, nodes: Nodes, whole: int, short: str, resumed: int) -> str:
    """Return what a reader must know of one setting's trial."""
    parts = []
    if setting.interaction == "async":
        parts.append(f"{in_flight(sweep, setting)} requests in flight.")
    if setting.far and nodes.note:
        parts.append(nodes.note)
    if sweep.undisturbed:
        reason = nodes.disturbed
        parts.append(f"It did not go before others: {reason}." if reason else "It went before all else on the machine.")
    if resumed:
        parts.append(f"{resumed} repeats are from before it was broken off.")
    if whole < sweep.repeats:
        parts.append(f"{whole} of {sweep.repeats} repeats: {short}.")
    return " ".join(parts)
