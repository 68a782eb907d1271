"""The loop that measures until the answer is certain enough: works on any `Tunable`, knows none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tenure.protocols import Progress, Tunable
from tenure.trials import Configuration, Trial

from .choose import describe

MAX_PROBES = 8
"""Enough where one probe measures many configurations; a search says itself how many it needs."""


def quiet(text: str, *, done: float | None = None) -> None:
    """Be told and say nothing."""


def tune(
    tunable: Tunable,
    known: Sequence[Trial],
    record: Callable[[Trial], None],
    *,
    progress: Progress = quiet,
    max_probes: int = MAX_PROBES,
    max_s: float = 0.0,
    now: Callable[[], float] | None = None,
) -> tuple[Trial, ...]:
    """Return the trials to predict from: the known ones of this fingerprint, and those of the probes made here.

    known: any trials; those of another fingerprint are left out. record: keeps each new trial at once, so that a broken
    probe loses none. No probe is begun after `max_probes`, nor once `max_s` (0: no bound) have passed on `now`, a
    monotonic clock in seconds. An error of a probe goes through to the caller, with the trials before it recorded.
    """
    trials = [trial for trial in known if trial.fingerprint == tunable.fingerprint]
    begun_s = now() if now else 0.0
    fruitless: Configuration | None = None
    for count in range(max_probes):
        configuration = tunable.next_probe(trials)
        if configuration is None or configuration == fruitless or (now and 0 < max_s <= now() - begun_s):
            break
        progress(f"probe {count + 1}: {describe(configuration)}", done=count / max_probes)
        before = len(trials)
        for trial in tunable.probe(configuration):
            record(trial)
            trials.append(trial)
        fruitless = configuration if len(trials) == before else None  # measuring that again would tell nothing again
    return tuple(trials)
