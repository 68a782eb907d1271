"""What the training function is handed by whoever runs it, and what it answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tenure.train.programs import Program
from tenure.train.spec import TrainSpec
from tenure.train.store import Store


@dataclass(slots=True, kw_only=True)
class Context:
    """What the handler is handed."""

    spec: TrainSpec
    store: Store
    program: Callable[[], Program]
    """Loads the program; called at most once."""
    invoke: Callable[[dict[str, Any]], None]
    """Have a role started: publish the event under its key. Once is enough, twice does no harm."""
    remaining_s: Callable[[], float] = lambda: math.inf
    """Seconds until the slot ends, by the newest lease file."""
    stopping: Callable[[], bool] = lambda: False
    """Whether the process was told to leave."""
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    timer: Callable[[], float] = time.perf_counter
    """Seconds, for the figures in records."""
    utc: Callable[[], float] = time.time
    since_start_s: Callable[[], float] = lambda: 0.0
    """Seconds since this process was started, for the start-up figure."""
    poll_s: float = 0.01
    """Longest pause between two looks at the store while waiting."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a role ended. Becomes ``result.json``."""

    state: Literal["done", "continue"]
    """`done`: the stage's result is published. `continue`: more events of this worker follow."""
    round: int
    """Rounds finished, as this role saw it."""
    why: str = ""
