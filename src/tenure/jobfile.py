"""A job file: TOML text in, jobs out, and jobs back to text. Not here: reading files, resolving paths.

    [run]
    name = "digits"

    [task]                       # stages, in the order they are written
    command = ["python", "prepare.py"]
    envelope = { cpus = 1, memory = "512MiB", slot = "1min" }
    outputs = { digits = "digits" }

    [train]
    program = "digits_program.py:Digits"
    goal = { accuracy = 0.95, time = "2min" }

A second stage of one kind gets a name: ``[train.big]`` is not one; write ``[[train]]`` with ``name = "big"``.
Unknown keys are refused with the valid ones listed; every refusal names file, line, key, the value found, and what is allowed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import partial
from typing import Any

from tenure.errors import JobFileError, SpecError
from tenure.jobs import JOB_KINDS, Job, JobKind, Probe, Retry, ServeGoal, ServerOptions, TrainGoal
from tenure.resources import Envelope, format_bytes, format_duration, parse_bytes, parse_duration
from tenure.runs import DEFAULT_DISK_BYTES
from tenure.sweeps import Search, Sweep
from tenure.tenants import check_name

MAX_JOB_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFile:
    """A parsed job file."""

    name: str
    tenant: str
    stages: tuple[Job, ...]
    disk_bytes: int = DEFAULT_DISK_BYTES
    """What the run may occupy, all stages together; 0 for no bound."""


_UNITS: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], str]]] = {
    "_bytes": (parse_bytes, format_bytes),
    "_s": (parse_duration, format_duration),
}
_PLAIN_S = frozenset({"images_per_s"})
"""Fields that end like a time but are rates."""
_RUNTIMES = ("process", "container", "microvm")


def _key(name: str) -> str:
    """Return a field's name in the job file: ``memory_bytes`` is written ``memory = "512MiB"``."""
    if name in _PLAIN_S:
        return name
    for suffix in _UNITS:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


class _Reader:
    """Turns TOML tables into nouns, and mistakes into JobFileErrors that name the line."""

    def __init__(self, text: str, source: str) -> None:
        self._lines = text.splitlines()
        self._source = source

    def fail(self, message: str, *path: str | int) -> JobFileError:
        dotted = ".".join(str(part) for part in path)
        return JobFileError(message, source=self._source, line=self._line(path), key=dotted)

    def _line(self, path: tuple[str | int, ...]) -> int:
        """Return the line of the deepest part of the path that the text shows: its table header, then its key."""
        names = [part for part in path if isinstance(part, str)]
        index = next((part for part in path if isinstance(part, int)), 0)
        best, seen, depth_now = 0, -1, 0
        for number, line in enumerate(self._lines, 1):
            header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line)
            if header:
                parts = [part.strip().strip('"') for part in header[2].split(".")]
                inside = parts == names[: len(parts)]
                if inside and header[1] == "[[":
                    seen += 1
                    inside = seen == index
                depth_now = len(parts) if inside else -1
                best = number if inside else best
            elif depth_now >= 0 and depth_now < len(names):
                wanted = names[depth_now:]
                key = re.match(r'\s*("?[\w-]+"?(?:\s*\.\s*"?[\w-]+"?)*)\s*=', line)
                found = [part.strip().strip('"') for part in key[1].split(".")] if key else []
                if found and found == wanted[: len(found)]:
                    return number
        return best

    def table(self, value: Any, *path: str | int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(f"{path[-1]} must be a table; found {value!r}", *path)
        return value

    def known(self, table: Mapping[str, Any], allowed: Mapping[str, Any] | tuple[str, ...], *path: str | int) -> None:
        for name in table:
            if name not in allowed:
                where = ".".join(str(part) for part in path if isinstance(part, str)) or "the file"
                raise self.fail(f"unknown key {name!r} in [{where}]; valid keys: {', '.join(sorted(allowed))}", *path, name)

    def noun(self, cls: type, value: Any, *path: str | int) -> Any:
        """Build a dataclass from a table: sizes and times by their suffix, numbers and texts by their type."""
        table = self.table(value, *path)
        by_key: dict[str, Field[Any]] = {_key(f.name): f for f in fields(cls)}
        self.known(table, by_key, *path)
        missing = [k for k, f in by_key.items() if f.default is MISSING and f.default_factory is MISSING and k not in table]
        if missing:
            where = ".".join(str(part) for part in path if isinstance(part, str))
            raise self.fail(f"[{where}] needs {', '.join(missing)}", *path)
        values = {by_key[key].name: self.scalar(by_key[key], item, *path, key) for key, item in table.items()}
        if cls is Envelope and "total_s" not in values:
            values["total_s"] = max(Envelope.__dataclass_fields__["total_s"].default, values.get("slot_s", 0.0))
        return self.guard(lambda: cls(**values), *path)

    def scalar(self, field: Field[Any], value: Any, *path: str | int) -> Any:
        if str(field.type).startswith("tuple["):
            return self.levels(field, value, *path)
        if field.name not in _PLAIN_S:
            for suffix, (parse, _) in _UNITS.items():
                if field.name.endswith(suffix):
                    return self.guard(partial(parse, value), *path)
        wanted: type | tuple[type, ...] = {"float": (int, float), "int": int, "str": str, "bool": bool}[str(field.type)]  # type: ignore[assignment]
        if not isinstance(value, wanted) or (isinstance(value, bool) and field.type != "bool"):
            raise self.fail(f"{path[-1]} must be {_A_TYPE[str(field.type)]}; found {value!r}", *path)
        return float(str(value)) if field.type == "float" else value

    def levels(self, field: Field[Any], value: Any, *path: str | int) -> tuple[Any, ...]:
        """Return a list of whole numbers, times or texts, whichever the field holds."""
        if field.name.endswith("_s"):
            if not isinstance(value, list):
                raise self.fail(f'{path[-1]} must be a list of times, such as ["0ms", "3ms"]; found {value!r}', *path)
            return self.guard(lambda: tuple(parse_duration(item) for item in value), *path)  # type: ignore[no-any-return]
        kind = int if "int" in str(field.type) else str
        if not isinstance(value, list) or not all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
            raise self.fail(f"{path[-1]} must be a list of {_MANY[kind]}; found {value!r}", *path)
        return tuple(value)

    def guard(self, build: Callable[[], Any], *path: str | int) -> Any:
        try:
            return build()
        except JobFileError:
            raise
        except SpecError as error:
            where = ".".join(str(part) for part in path if isinstance(part, str))
            named = re.match(r"\w+(?:\.(\w+))? must ", str(error))  # "envelope.cpus must …", "shards must …"
            key = (named[1] or named[0].split()[0],) if named else ()
            raise self.fail(f"{where}: {error}", *path, *key) from error

    def texts(self, value: Any, *path: str | int) -> dict[str, str]:
        table = self.table(value, *path)
        for name, item in table.items():
            if not isinstance(item, str):
                raise self.fail(f"{name} must be a text; found {item!r}", *path, name)
        return table


_MANY = {int: "whole numbers, such as [1, 8]", str: 'texts, such as ["http", "grpc"]'}
_A_TYPE = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}

_COMMON = ("name", "runtime", "envelope", "inputs", "env", "secrets")
_COMMAND = ("image", "command", "outputs", "ports", "retry")
_EXCHANGE = ("same_result", "exchange", "local_steps", "codec", "outer_rate", "outer_momentum")
_KEYS: Mapping[JobKind, tuple[str, ...]] = {
    "task": (*_COMMON, *_COMMAND),
    "workspace": (*_COMMON, *_COMMAND),
    "train": (
        *(*_COMMON, "program", "goal", "workers", "shards", "batch", "max_rounds", "evaluate_every"),
        *("seed", "options", "probe", *_EXCHANGE),
    ),
    "serve": (*_COMMON, "image", "model", "goals", "ports", "server", "sweep", "search", "probe", "seed"),
}
"""Only what a kind of stage honours: a worker of a training stage is always started again, so it takes no `retry`."""
_TABLES: Sequence[tuple[str, type]] = (
    *(("envelope", Envelope), ("server", ServerOptions), ("sweep", Sweep), ("search", Search)),
    *(("retry", Retry), ("probe", Probe)),
)
_SCALARS = ("image", "program", "model", "workers", "shards", "batch", "max_rounds", "evaluate_every", "seed")


def parse_job_file(text: str, *, source: str = "") -> JobFile:
    """Return the jobs that a TOML text describes.

    source: file name for messages. Raises JobFileError: file, line, key, value found, what is allowed.
    """
    if len(text.encode()) > MAX_JOB_FILE_BYTES:
        raise JobFileError(f"a job file may have {format_bytes(MAX_JOB_FILE_BYTES)} at most", source=source)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"at line (\d+)", str(error))
        raise JobFileError(f"not valid TOML: {error}", source=source, line=int(place[1]) if place else 0) from error
    reader = _Reader(text, source)
    reader.known(data, ("run", *JOB_KINDS))
    run = reader.table(data.get("run", {}), "run")
    reader.known(run, ("name", "tenant", "disk"), "run")
    name = reader.guard(lambda: check_name("run", run.get("name", "run")), "run", "name") if _is_text(run, "name") else None
    tenant = reader.guard(lambda: check_name("tenant", run.get("tenant", "default")), "run", "tenant")
    disk_bytes = reader.guard(lambda: parse_bytes(run.get("disk", DEFAULT_DISK_BYTES)), "run", "disk")
    if name is None:
        raise reader.fail(f"name must be a text; found {run['name']!r}", "run", "name")
    stages: list[Job] = []
    for kind in (key for key in data if key != "run"):
        tables = data[kind] if isinstance(data[kind], list) else [data[kind]]
        for number, table in enumerate(tables):
            path: tuple[str | int, ...] = (kind, number) if isinstance(data[kind], list) else (kind,)
            stages.append(_job(reader, kind, reader.table(table, *path), path))  # type: ignore[arg-type]
    if not stages:
        raise JobFileError(f"no stage: write at least one of {', '.join(f'[{kind}]' for kind in JOB_KINDS)}", source=source)
    names = [job.name for job in stages]
    for number, stage in enumerate(names):
        if stage in names[:number]:
            raise reader.fail(f'two stages are called {stage!r}; give one another name = "…"', stages[number].kind, number)
    _check_references(reader, stages)
    return JobFile(name=name, tenant=tenant, stages=tuple(stages), disk_bytes=disk_bytes)


def _is_text(table: Mapping[str, Any], key: str) -> bool:
    return isinstance(table.get(key, ""), str)


def _job(reader: _Reader, kind: JobKind, table: dict[str, Any], path: tuple[str | int, ...]) -> Job:
    reader.known(table, _KEYS[kind], *path)
    values: dict[str, Any] = {"kind": kind}
    given = table.get("name", kind)
    values["name"] = reader.guard(lambda: check_name("stage", given if isinstance(given, str) else repr(given)), *path, "name")
    if (runtime := table.get("runtime", "process")) not in _RUNTIMES:
        raise reader.fail(f"runtime must be one of {', '.join(_RUNTIMES)}; found {runtime!r}", *path, "runtime")
    values["runtime"] = runtime
    by_name = {f.name: f for f in fields(Job)}
    for key in (k for k in (*_SCALARS, *_EXCHANGE) if k in table):
        values[key] = reader.scalar(by_name[key], table[key], *path, key)
    for key in ("command", "secrets"):
        items = table.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise reader.fail(f'{key} must be a list of texts, such as ["python", "x.py"]; found {items!r}', *path, key)
        values[key] = tuple(items)
    for key in ("inputs", "outputs", "env"):
        values[key] = reader.texts(table.get(key, {}), *path, key)
    ports = reader.table(table.get("ports", {}), *path, "ports")
    for port_name, port in ports.items():
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
            raise reader.fail(f"port {port_name} must lie between 0 (any) and 65535; found {port!r}", *path, "ports", port_name)
    values["ports"] = ports
    options = reader.table(table.get("options", {}), *path, "options")
    for option, value in options.items():
        if not isinstance(value, (str, int, float, bool)):
            raise reader.fail(
                f"option {option} must be a text, a number, true or false; found {value!r}", *path, "options", option
            )
    values["options"] = options
    for key, cls in _TABLES:
        if key in table:
            values[key] = reader.noun(cls, table[key], *path, key)
    if "goal" in table:
        values["train_goal"] = reader.noun(TrainGoal, table["goal"], *path, "goal")
    if "goals" in table:
        if not isinstance(table["goals"], list):
            raise reader.fail(f"goals must be written as [[{kind}.goals]]; found {table['goals']!r}", *path, "goals")
        values["serve_goals"] = tuple(
            reader.noun(ServeGoal, goal, kind, "goals", number) for number, goal in enumerate(table["goals"])
        )
    job: Job = reader.guard(lambda: Job(**values), *path)
    return job


def _check_references(reader: _Reader, stages: list[Job]) -> None:
    """Refuse ``stage:file`` inputs that name no earlier stage."""
    for number, job in enumerate(stages):
        earlier = [stage.name for stage in stages[:number]]
        references = {f"inputs.{name}": value for name, value in job.inputs.items()} | {"model": job.model}
        for key, value in references.items():
            stage, colon, _ = value.partition(":")
            if colon and stage not in earlier:
                raise reader.fail(
                    f"{key} = {value!r} names no earlier stage; earlier stages: {', '.join(earlier) or 'none'}",
                    job.kind,
                    *key.split("."),
                )


def format_job_file(job_file: JobFile) -> str:
    """Return the text of a job file: parsing it gives the same jobs again."""
    lines = ["[run]", f"name = {_toml(job_file.name)}", f"tenant = {_toml(job_file.tenant)}"]
    lines.append(f"disk = {_toml(format_bytes(job_file.disk_bytes))}")
    kinds = [job.kind for job in job_file.stages]
    for job in job_file.stages:
        lines += ["", f"[[{job.kind}]]" if kinds.count(job.kind) > 1 else f"[{job.kind}]"]
        for key in (k for k in _KEYS[job.kind] if k not in ("goal", "goals")):
            if (value := getattr(job, key)) not in (None, "", (), {}):
                lines.append(f"{key} = {_toml(value)}")
        if job.train_goal is not None:
            lines.append(f"goal = {_toml(job.train_goal)}")
        if job.serve_goals:
            lines.append(f"goals = {_toml(job.serve_goals)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(c if c >= " " and c not in '"\\\x7f' else f"\\u{ord(c):04x}" for c in value)
        return f'"{escaped}"'
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + " }"
    pairs = []
    for field in fields(value):
        item = getattr(value, field.name)
        suffix = next((s for s in _UNITS if field.name.endswith(s) and field.name not in _PLAIN_S), "")
        if suffix:
            say = _UNITS[suffix][1]
            item = [say(one) for one in item] if isinstance(item, tuple) else say(item)
        pairs.append(f"{_key(field.name)} = {_toml(item)}")
    return "{ " + ", ".join(pairs) + " }"
