"""What a training stage is told: program, data, shards, goal. Written once as ``train.json`` in the stage's folder.

Standard library only, so that a worker can read it before NumPy is imported (thread counts are set between the two).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tenure.errors import NotFound, SpecError
from tenure.jobs import Command, check_exchange
from tenure.train.events import Start, TrainEvent, parse
from tenure.train.files import Files

FILE_NAME = "train.json"
EXIT_FULL = 73
"""Exit status of a worker that could not even write why it failed, the disk being full (sysexits.h, EX_CANTCREAT)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """One training stage. Raises SpecError when a value is out of range."""

    program: str
    """``file.py:Name``, the file relative to `folder`."""
    folder: str
    """Absolute folder of the job file."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name -> absolute path, handed to the program's `data`."""
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Handed to the program's constructor."""
    shards: int = 8
    """Parts of a round's work, whoever computes them."""
    batch: int = 0
    """Examples per round over all shards; 0: the whole training set."""
    seed: int = 0
    goal_accuracy: float = 0.0
    """Stop when this share of the held-out examples is right; 0: no goal."""
    max_rounds: int = 1000
    stop_at_round: int = 0
    """Stop after so many rounds, reached or not (probes); 0: no such bound."""
    evaluate_every: int = 1
    """Rounds between two looks at the held-out examples."""
    same_result: bool = True
    """One thread per shard, gradients added along one tree: weights do not depend on the number of workers."""
    local_steps: int = 0
    """Steps that each worker takes alone in a round, with the program's own update; 0: one step of all together."""
    codec: str = "none"
    """How gradients, differences and their sums are made smaller: `none`, `int8` or `topk:SHARE`."""
    outer_rate: float = 0.7
    """Of the outer Nesterov step after local steps. Source: DiLoCo (Douillard et al. 2023, arXiv 2311.08105)."""
    outer_momentum: float = 0.9
    """Likewise."""
    exchange: str = "sharded"
    """`sharded`: each worker adds its slice of all gradients. `central`: one worker adds everything (study 2)."""
    claim_period_s: float = 5.0
    """A combine claimed for longer without its result may be taken over."""
    wait_s: float = 600.0
    """Longest wait for other workers' shards where no slot ends it."""
    max_idle_slots: int = 20
    """Slots in a row without progress of the run after which a worker gives up."""

    def __post_init__(self) -> None:
        _check("shards", self.shards, 1, 4096)
        _check("batch", self.batch, 0, 1 << 40)
        _check("seed", self.seed, 0, 1 << 63)
        _check("goal_accuracy", self.goal_accuracy, 0, 1)
        _check("max_rounds", self.max_rounds, 1, 10_000_000)
        _check("stop_at_round", self.stop_at_round, 0, 10_000_000)
        _check("evaluate_every", self.evaluate_every, 1, 1_000_000)
        _check("claim_period_s", self.claim_period_s, 0.01, 3600)
        _check("wait_s", self.wait_s, 0.01, 7 * 86400)
        _check("max_idle_slots", self.max_idle_slots, 1, 1_000_000)
        check_exchange(
            same_result=self.same_result,
            exchange=self.exchange,
            local_steps=self.local_steps,
            codec=self.codec,
            outer_rate=self.outer_rate,
            outer_momentum=self.outer_momentum,
        )
        if ":" not in self.program:
            raise SpecError(f'program must read "file.py:Name"; found {self.program!r}')
        if self.batch and self.batch < self.shards:
            raise SpecError(f"batch must give each of the {self.shards} shards an example; found {self.batch}")

    @property
    def last_round(self) -> int:
        """Rounds after which training stops whatever the accuracy."""
        return min(self.max_rounds, self.stop_at_round or self.max_rounds)


def write_spec(stage_dir: Path, spec: TrainSpec) -> Path:
    """Write the stage's spec, and return its path. The same spec again changes nothing; another one raises SpecError."""
    path = stage_dir / FILE_NAME
    content = json.dumps(asdict(spec), indent=1, sort_keys=True).encode()
    files = Files()
    files.make_folder(stage_dir / "store" / "events")
    if not files.publish(path, [content], durable=True) and path.read_bytes() != content:
        raise SpecError(f"{path} holds another training spec; a stage's spec does not change. Begin a new run instead.")
    return path


def read_spec(stage_dir: Path) -> TrainSpec:
    """Return the stage's spec. Raises NotFound when there is none, SpecError when it does not fit."""
    path = stage_dir / FILE_NAME
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"no training spec at {path}; it is written when the stage begins") from error
    except ValueError as error:
        raise SpecError(f"{path} is not JSON: {error}") from error
    known = {f.name for f in fields(TrainSpec)}
    if not isinstance(data, dict) or not data.keys() <= known:
        raise SpecError(f"{path} has unknown keys; valid ones: {', '.join(sorted(known))}")
    return TrainSpec(**data)


def command(env: Mapping[str, str] | None = None, *, grace_s: float = 5.0) -> Command:
    """Return what a training lease runs: once per event addressed to its worker."""
    argv = (sys.executable, "-m", "tenure.train.worker")
    return Command(argv=argv, env=dict(env or {}), on_event=True, expects_result=True, grace_s=grace_s)


def start_event(workers: int, *, generation: int = 0) -> dict[str, Any]:
    """Return the event that begins a stage with so many workers."""
    return Start(workers=workers, generation=generation).to_dict()


def next_start_event(stage_dir: Path, workers: int) -> dict[str, Any]:
    """Return the event that begins the stage, or resumes it: its generation is the first one not yet started."""
    taken = [name for name in Files().names(stage_dir / "store" / "events") if name.startswith("start-")]
    return start_event(workers, generation=len(taken))


def publish_event(stage_dir: Path, event: Mapping[str, Any]) -> bool:
    """Publish an event under its idempotency key in ``store/events``. False when it is there already.

    Only a start is forced to disk: when a machine loses power, the others' leases are lost as well.
    """
    parsed: TrainEvent = parse(event)
    folder = stage_dir / "store" / "events"
    files = Files()
    files.make_folder(folder)
    content = json.dumps({**parsed.to_dict(), "name": parsed.name}).encode()
    return files.publish(folder / f"{parsed.name}.json", [content], durable=isinstance(parsed, Start))


def load_event(path: str | os.PathLike[str]) -> TrainEvent:
    """Return the event in a file. Raises SpecError when it is none."""
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise SpecError(f"no event can be read from {path}: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path} holds no event but {type(data).__name__}")
    return parse(data)


def _check(key: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise SpecError(f"training spec: {key} must lie between {low} and {high}; found {value!r}")
