"""Data files that ship with Tenure, and what reads them: the price table. Not for what a user's run produces."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from tenure.errors import SpecError
from tenure.prices import Machine, PriceTable, PriceVector
from tenure.resources import parse_bytes

SHIPPED = "prices.toml"
_TOP_KEYS = ("default", "vectors", "machines")
_VECTOR_KEYS = tuple(field.name for field in fields(PriceVector) if field.name != "name")
_VECTOR_TEXTS = ("source", "date")
_MACHINE_KEYS = ("cpus", "memory", "gpus", "gpu_model", "usd_per_hour", "source", "date")
_MACHINE_NEEDS = ("cpus", "memory", "usd_per_hour")
_MACHINE_TEXTS = ("gpu_model", "source", "date")


def price_table(user_file: Path | None = None) -> PriceTable:
    """Return the prices that ship with Tenure, with those of `user_file` (same format) in front.

    An entry of the user's replaces the entry of the same name; its `default` replaces ours.
    A file that does not exist adds nothing.
    Raises SpecError, naming file and key, for unreadable files, unknown keys, and prices that are not numbers >= 0.
    """
    shipped = resources.files(__name__).joinpath(SHIPPED).read_text()
    vectors, machines, default = _parse(shipped, SHIPPED)
    name = SHIPPED
    if user_file is not None and user_file.exists():
        name = str(user_file)
        own_vectors, own_machines, own_default = _parse(_text(user_file), name)
        vectors, machines, default = vectors | own_vectors, machines | own_machines, own_default or default
    if default not in vectors:
        raise SpecError(f"{name}: default names no price vector; found {default!r}; allowed: {', '.join(sorted(vectors))}")
    return PriceTable(vectors=vectors, machines=machines, default=default)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: the price file can't be read: {error}. Mend or remove it.") from error


def _parse(text: str, source: str) -> tuple[dict[str, PriceVector], dict[str, Machine], str]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{source}: not valid TOML: {error}") from error
    _only(document, _TOP_KEYS, source, "")
    default = document.get("default", "")
    if not isinstance(default, str):
        raise SpecError(f"{source}: default must be the name of a vector; found {default!r}")
    vectors = {name: _vector(name, entry, source) for name, entry in _section(document, "vectors", source).items()}
    machines = {name: _machine(name, entry, source) for name, entry in _section(document, "machines", source).items()}
    return vectors, machines, default


def _section(document: Mapping[str, Any], key: str, source: str) -> Mapping[str, Mapping[str, Any]]:
    section = document.get(key, {})
    if not isinstance(section, dict):
        raise SpecError(f"{source}: {key} must be tables such as [{key}.mine]; found {section!r}")
    for name, entry in section.items():
        if not isinstance(entry, dict):
            raise SpecError(f"{source}: {key}.{name} must be a table [{key}.{name}]; found {entry!r}")
    return section


def _vector(name: str, entry: Mapping[str, Any], source: str) -> PriceVector:
    place = f"vectors.{name}"
    _only(entry, _VECTOR_KEYS, source, place)
    return PriceVector(name=name, **{key: _value(entry, key, _VECTOR_TEXTS, source, place) for key in entry})


def _machine(name: str, entry: Mapping[str, Any], source: str) -> Machine:
    place = f"machines.{name}"
    _only(entry, _MACHINE_KEYS, source, place)
    missing = [key for key in _MACHINE_NEEDS if key not in entry]
    if missing:
        raise SpecError(f"{source}: {place} lacks {', '.join(missing)}; allowed: {', '.join(_MACHINE_KEYS)}")
    values = {key: _value(entry, key, _MACHINE_TEXTS, source, place) for key in entry if key not in ("memory", "gpus")}
    try:
        memory_bytes = parse_bytes(entry["memory"])
    except SpecError as error:
        raise SpecError(f"{source}: {place}.memory: {error}") from error
    gpus = entry.get("gpus", 0)
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 0:
        raise SpecError(f"{source}: {place}.gpus must be a whole number >= 0; found {gpus!r}")
    texts = dict.fromkeys(_MACHINE_TEXTS, "")
    return Machine(name=name, memory_bytes=memory_bytes, gpus=gpus, **(texts | values))


def _only(entry: Mapping[str, Any], allowed: tuple[str, ...], source: str, place: str) -> None:
    for key in entry:
        if key not in allowed:
            where = f"{place}.{key}" if place else key
            raise SpecError(f"{source}: unknown key {where}; allowed: {', '.join(allowed)}")


def _value(entry: Mapping[str, Any], key: str, texts: tuple[str, ...], source: str, place: str) -> Any:
    value = entry[key]
    if key in texts:
        if isinstance(value, str):
            return value
        raise SpecError(f"{source}: {place}.{key} must be text in quotes; found {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise SpecError(f"{source}: {place}.{key} must be a number >= 0 (USD, or cores); found {value!r}")
    return float(value)
