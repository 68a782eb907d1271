"""When each request is due: laid down from rate and seed, or read from a file, before the first one is sent. Pure but for that.

A schedule knows nothing of the server: it never waits, skips or moves. Not here: who keeps to it (`loop`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tenure.errors import NotFound, SpecError
from tenure.serve.load.records import Floats

Arrivals = Literal["poisson", "constant"]
MAX_REQUESTS = 20_000_000
"""Of one run: 25 bytes each are kept."""
MAX_LINES_BYTES = 1 << 30


def constant(rate_per_s: float, seconds: float) -> Floats:
    """Return due times k / rate from 0, all below `seconds`. Raises SpecError."""
    count = max(1, math.ceil(_expected(rate_per_s, seconds) - 1e-9))
    return np.arange(count, dtype=np.float64) / rate_per_s


def poisson(rate_per_s: float, seconds: float, seed: int) -> Floats:
    """Return the arrivals of a Poisson process below `seconds`: independent users, who do not wait for each other.

    The same rate, length and seed give the same times. Raises SpecError.
    """
    expected = _expected(rate_per_s, seconds)
    chance = np.random.default_rng(seed)
    drawn: list[Floats] = []
    at_s = 0.0
    while at_s < seconds:
        times = at_s + np.cumsum(chance.exponential(1 / rate_per_s, size=int(expected + 4 * math.sqrt(expected)) + 16))
        drawn.append(times)
        at_s = float(times[-1])
    due_s = np.concatenate(drawn)
    return due_s[due_s < seconds]


def drawn(arrivals: Arrivals, rate_per_s: float, seconds: float, seed: int) -> Floats:
    """Return the due times of a kind of arrivals. Raises SpecError."""
    if arrivals not in get_args(Arrivals):
        raise SpecError(f"arrivals are {' or '.join(get_args(Arrivals))}; found {arrivals!r}")
    return constant(rate_per_s, seconds) if arrivals == "constant" else poisson(rate_per_s, seconds, seed)


def recorded(path: Path | str) -> Floats:
    """Return due times from a file: .npy with one column, or text with one number of seconds per line (# starts a remark).

    They are taken as they are, from 0 on. Raises NotFound, SpecError for what isn't a rising row of finite numbers.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            due_s = np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
        else:
            if path.stat().st_size > MAX_LINES_BYTES:
                raise SpecError(f"the schedule {path} is longer than {MAX_LINES_BYTES} bytes; write it as .npy")
            due_s = np.loadtxt(path, dtype=np.float64, comments="#", ndmin=1) if _has_lines(path) else np.empty(0)
    except OSError as error:
        raise NotFound(f"the schedule {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SpecError(f"the schedule {path} is not one number of seconds per line, or a .npy of them: {error}") from error
    if due_s.ndim != 1 or not due_s.size:
        raise SpecError(f"the schedule {path} needs one column of at least one time; found shape {due_s.shape}")
    if due_s.size > MAX_REQUESTS:
        raise SpecError(f"the schedule {path} has {due_s.size} requests; one run takes {MAX_REQUESTS}")
    if not np.isfinite(due_s).all() or due_s[0] < 0 or (np.diff(due_s) < 0).any():
        raise SpecError(f"the schedule {path} must hold finite seconds from 0 on that never fall")
    return due_s


def _has_lines(path: Path) -> bool:
    with path.open() as lines:
        return any(line.strip() and not line.lstrip().startswith("#") for line in lines)


def _expected(rate_per_s: float, seconds: float) -> float:
    if not 0 < rate_per_s <= 1e6 or not 0 < seconds <= 86_400:
        raise SpecError(f"a rate lies between 0 and 1e6 per s, for up to 86400 s; found {rate_per_s!r} for {seconds!r} s")
    expected = rate_per_s * seconds
    if expected > MAX_REQUESTS:
        raise SpecError(f"{rate_per_s:g} per s for {seconds:g} s are {expected:.0f} requests; one run takes {MAX_REQUESTS}")
    return expected
