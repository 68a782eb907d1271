"""How a model wants to be served, from its folder: `model.toml`, and Triton's `config.pbtxt` for what both know.

    max_batch_rows = 16        # model.toml: every key is a field of ModelOptions; times have a unit
    max_delay = "2ms"
    instances = 2

A repository written for Triton is served unchanged: fields without a counterpart here are named in a note and ignored,
unless answers would be wrong without them (ensembles, sequences, a backend that is no engine here); those are refused.
Where both files are, `model.toml` has the last word.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tenure.errors import SpecError
from tenure.resources import parse_duration
from tenure.serve.engines import ENGINES
from tenure.serve.plane import ModelOptions

MAX_PRIORITY_LEVELS = 32
_MAX_FILE_BYTES = 1 << 20
_BACKENDS = frozenset({"", "onnxruntime", "onnxruntime_onnx"})
_THREADS = "intra_op_thread_count"
_KEYS = {field.name.removesuffix("_s"): field for field in fields(ModelOptions)}
_LOG = logging.getLogger(__name__)


def read_options(
    folder: Path, default: ModelOptions | None = None, *, note: Callable[[str], None] = _LOG.warning
) -> ModelOptions:
    """Return the options of the model in `folder`; what its files do not say is as in `default`.

    note: is told what a config.pbtxt says that is ignored here.
    Raises SpecError: not readable, keys unknown, values out of range, a Triton model of a kind that is not served here.
    """
    options = default or ModelOptions()
    pbtxt, toml = folder / "config.pbtxt", folder / "model.toml"
    if pbtxt.is_file():
        options = _checked(replace(options, **_from_pbtxt(pbtxt, note)), pbtxt)
    if toml.is_file():
        options = _checked(replace(options, **_from_toml(toml)), toml)
    return options


def _from_toml(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{file} is not TOML: {error}") from error
    found: dict[str, Any] = {}
    for key, value in content.items():
        field = _KEYS.get(key)
        if field is None:
            raise SpecError(f'{file}: unknown key "{key}"; known are {", ".join(_KEYS)}')
        if field.name.endswith("_s"):
            found[field.name] = _in(file, key, parse_duration, value)
        elif type(value) is not type(field.default):
            raise SpecError(f"{file}: {key} takes {_kind(field.default)}; found {value!r}")
        else:
            found[field.name] = value
    return found


def _from_pbtxt(file: Path, note: Callable[[str], None]) -> dict[str, Any]:
    from google.protobuf import text_format  # with the message classes: only where such a file is

    from tenure.serve.v2 import ModelConfigResponse

    config = ModelConfigResponse().config
    try:
        text_format.Parse(_text(file), config)
    except text_format.ParseError as error:
        raise SpecError(f"{file} is not a Triton model configuration: {error}") from error
    _refuse_what_is_not_served(file, config)
    found: dict[str, Any] = {"max_batch_rows": config.max_batch_size or 1}
    batching = config.dynamic_batching
    policy = batching.default_queue_policy
    for name, value in (
        ("max_delay_s", batching.max_queue_delay_microseconds / 1e6),
        ("priority_levels", batching.priority_levels),
        ("max_queue", policy.max_queue_size),
        ("queue_timeout_s", policy.default_timeout_microseconds / 1e6),
        ("instances", sum(group.count or 1 for group in config.instance_group)),
        ("threads", _in(file, _THREADS, int, config.parameters[_THREADS].string_value or 0)),
    ):
        if value:
            found[name] = value
    if config.model_warmup:
        found["warmup"] = True
    ignored = _ignored(config)
    if ignored:
        note(f"{file}: ignored here: {', '.join(ignored)}")
    return found


def _refuse_what_is_not_served(file: Path, config: Any) -> None:
    backend = config.backend or config.platform
    if config.HasField("ensemble_scheduling") or config.platform == "ensemble":
        raise SpecError(f"{file}: ensembles are not served. Call the models one after the other, or merge them into one file")
    if config.HasField("sequence_batching"):
        raise SpecError(f"{file}: sequence batching is not served: calls keep no state here")
    if config.model_transaction_policy.decoupled:
        raise SpecError(f"{file}: decoupled models are not served: a request has one answer here")
    if backend not in _BACKENDS:
        raise SpecError(
            f'{file}: there is no engine for "{backend}"; files served are model{", model".join(ENGINES)}. Export the model '
            "to one of these, and leave backend and platform out"
        )
    name = config.default_model_filename
    if name and not (Path(name).stem == "model" and Path(name).suffix in ENGINES):
        raise SpecError(
            f'{file}: default_model_filename is "{name}"; a model file is named model{", model".join(ENGINES)} here'
        )


def _ignored(config: Any) -> list[str]:
    batching = config.dynamic_batching
    names = {
        "preferred_batch_size (a batch is what waits)": batching.preferred_batch_size,
        "default_priority_level (the middle one)": batching.default_priority_level,
        "priority_queue_policy": batching.priority_queue_policy,
        "timeout_action: DELAY": batching.default_queue_policy.timeout_action,
        "KIND_GPU (see device in model.toml)": any(group.kind == group.KIND_GPU for group in config.instance_group),
        "response_cache": config.response_cache.enable,
        "version_policy (all versions are served)": config.HasField("version_policy")
        and not config.version_policy.HasField("all"),
        "optimization": config.HasField("optimization"),
    }
    return [name for name, value in names.items() if value]


def _checked(options: ModelOptions, file: Path) -> ModelOptions:
    for name in ("max_batch_rows", "instances", "threads", "priority_levels"):
        if getattr(options, name) < 0:
            raise SpecError(f"{file}: {name} must be 0 or more; found {getattr(options, name)}")
    if options.max_queue < 1 or options.timeout_s <= 0:
        raise SpecError(
            f"{file}: max_queue must be at least 1 and timeout above 0; found {options.max_queue}, {options.timeout_s}"
        )
    if options.priority_levels > MAX_PRIORITY_LEVELS:
        raise SpecError(
            f"{file}: at most {MAX_PRIORITY_LEVELS} priority levels are kept apart; found {options.priority_levels}"
        )
    return options


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise SpecError(f"{file} has {file.stat().st_size} bytes; options have at most {_MAX_FILE_BYTES}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} cannot be read: {error}") from error


def _in(file: Path, key: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except (SpecError, ValueError) as error:
        raise SpecError(f"{file}: {key}: {error}") from error


def _kind(default: Any) -> str:
    kinds: Mapping[type, str] = {bool: "true or false", int: "a whole number", str: "a text"}
    return kinds[type(default)]
