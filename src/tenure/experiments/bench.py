"""`tenure bench serve MODEL IMAGES/` as a job: one serving stage that is an experiment, in the ledger like any other run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tenure.errors import NotFound, SpecError
from tenure.jobfile import JobFile, format_job_file
from tenure.jobs import Job, ServeGoal, ServerOptions
from tenure.resources import parse_bytes, parse_duration
from tenure.sweeps import Search, Sweep

STAGE = "serve"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """What to measure."""

    model: Path
    examples: Path
    """A folder of pictures, or an .npy file of examples."""
    sweep: Sweep = field(default_factory=Sweep)
    search: Search | None = None
    """Instead of a sweep: what the goal is searched in."""
    goal: str = ""
    """Such as ``p99<50ms, images/s>100``; empty: none."""
    clients: int = 1
    """Applications that ask at the same time, of a search."""
    options: ServerOptions = field(default_factory=ServerOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.model.is_file():
            raise NotFound(f"{self.model} is no model file")
        if not self.examples.exists():
            raise NotFound(f"{self.examples} does not exist: name a folder of pictures, or an .npy file of examples")
        for path in (self.model, self.examples):
            if ":" in str(path.absolute()):
                raise SpecError(
                    f"{path.absolute()} has a colon in it, which means an earlier stage in a job file: rename or link it"
                )


def bench_job_file(spec: BenchSpec) -> str:
    """Return the text of the job file that is this experiment. Raises SpecError for a goal that can't be read."""
    name = re.sub(r"[^a-z0-9._-]+", "-", spec.model.absolute().stem.lower()).lstrip("._-")[:63] or "model"
    goal = parse_goal(spec.goal) if spec.goal else ServeGoal(name="the most images/s") if spec.clients > 1 else None
    given = "x" if spec.examples.suffix == ".npy" else "images"
    job = Job(
        kind="serve",
        name=STAGE,
        model=str(spec.model.absolute()),
        inputs={given: str(spec.examples.absolute())},
        serve_goals=(replace(goal, clients=spec.clients),) if goal else (),
        server=spec.options,
        sweep=spec.sweep if spec.search is None else None,
        search=spec.search,
        seed=spec.seed,
    )
    return format_job_file(JobFile(name=name, tenant="default", stages=(job,)))


_BOUNDS: Mapping[str, tuple[str, str, Callable[[Any], Any]]] = {
    "p99": ("<", "p99_s", parse_duration),
    "images/s": (">", "images_per_s", float),
    "memory": ("<", "memory_bytes", parse_bytes),
}
_BOUND = re.compile(r"\s*([a-z0-9/]+)\s*(<=?|>=?)\s*(\S+)\s*")


def parse_goal(text: str) -> ServeGoal:
    """Return the goal of ``p99<50ms``, ``images/s>100``, ``memory<2GiB``, several of them by commas. Raises SpecError."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        match = _BOUND.fullmatch(part)
        sign, name, parse = _BOUNDS.get(match[1] if match else "", ("", "", str))
        if match is None or not name or match[2][0] != sign or name in found:
            raise SpecError(
                f"a goal is p99<TIME, images/s>NUMBER, memory<SIZE, each once, such as p99<50ms; found {part.strip()!r}"
            )
        try:
            found[name] = parse(match[3])
        except ValueError as error:
            raise SpecError(f"{match[1]} needs a number; found {match[3]!r}") from error
    return ServeGoal(name=" ".join(text.split()), **found)
