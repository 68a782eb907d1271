"""Everything the HTTP door answers besides inference: health, metadata, statistics, repository, regions, metrics.

Source: Open Inference Protocol v2 and its public extensions (statistics, model repository, model configuration, system and
CUDA shared memory). Not here: inference (`http_connection`), what a plane does (`plane`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tenure import __version__
from tenure.errors import NotFound, SpecError
from tenure.serve import codec_http
from tenure.serve.faults import InputRefused
from tenure.serve.http1 import JSON
from tenure.serve.plane import SERVER_NAME, Durations, ModelStatistics, Plane

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class WrongMethod(SpecError):
    """Another method is needed. `allow` names it."""

    def __init__(self, allow: str) -> None:
        super().__init__(f"this address takes {allow} only")
        self.allow = allow


@dataclass(frozen=True, slots=True)
class Reply:
    """Status and body of an answer."""

    body: bytes = b""
    status: int = 200
    content_type: str = JSON
    extra: tuple[str, ...] = ()
    """Further header lines."""


class _Register(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


class _Index(msgspec.Struct):
    ready: bool = False


class _Load(msgspec.Struct):
    parameters: dict[str, Any] = {}


def infer_target(path: Sequence[str]) -> tuple[str, str] | None:
    """Return model and version of a path that asks for inference; None of any other."""
    if len(path) >= 4 and path[:2] == ("v2", "models") and path[-1] == "infer":
        if len(path) == 4:
            return path[2], ""
        if len(path) == 6 and path[3] == "versions":
            return path[2], path[4]
    return None


def reply(plane: Plane, method: str, path: Sequence[str], body: bytes) -> Reply | Awaitable[Reply]:
    """Return the answer to a request that is no inference; some have to be waited for.

    Raises NotFound, WrongMethod, InputRefused, and what the plane raises.
    """
    found: Reply | Awaitable[Reply] | None = None
    match list(path):
        case ["v2", "models", "stats"]:
            found = _statistics(plane, "", "")
        case ["v2", "models", name, "versions", version, *rest]:
            found = _model(plane, name, version, rest)
        case ["v2", "models", name, *rest]:
            found = _model(plane, name, "", rest)
        case ["v2", "repository", *rest]:
            _only(method, "POST")
            return _repository(plane, rest, body)
        case ["v2", ("systemsharedmemory" | "cudasharedmemory") as kind, *rest]:
            system, region = kind == "systemsharedmemory", ""
            if len(rest) == 3 and rest[0] == "region":
                region, rest = rest[1], rest[2:]
            if rest in (["register"], ["unregister"]):
                _only(method, "POST")
                return _change_regions(plane, region, rest[0], body) if system else _change_cuda(rest[0])
            if rest == ["status"]:
                found = _regions(plane, region) if system else Reply(b"[]")
        case ["v2"]:
            found = _json({"name": SERVER_NAME, "version": __version__, "extensions": plane.extensions})
        case ["v2", "health", "live"]:
            found = Reply(b'{"live":true}')
        case ["v2", "health", "ready"]:
            found = Reply(b'{"ready":true}') if plane.ready else Reply(b'{"ready":false}', 503)
        case ["metrics"]:
            from tenure.serve.metrics import render  # not needed to start serving

            found = Reply(render(plane), content_type=METRICS_TYPE)
    if found is None:
        raise NotFound(f"there is nothing at {'/' + '/'.join(path)[:200]!r}; this server speaks /v2 and /metrics")
    _only(method, "GET", "HEAD")
    return found


def _model(plane: Plane, name: str, version: str, rest: list[str]) -> Reply | None:
    match rest:
        case []:
            return Reply(codec_http.encode_metadata(plane.metadata(name, version)))
        case ["ready"]:
            ready = plane.model_ready(name, version)
            return _json({"name": name, "ready": ready}, 200 if ready else 503)
        case ["config"]:
            return _json(plane.config(name, version))
        case ["stats"]:
            return _statistics(plane, name, version)
        case ["infer"]:
            raise WrongMethod("POST")
    return None


def _repository(plane: Plane, rest: list[str], body: bytes) -> Reply | Awaitable[Reply]:
    match rest:
        case ["index"]:
            entries = plane.index(ready_only=_read(body, _Index).ready)
            return _json([{"name": e.name, "version": e.version, "state": e.state, "reason": e.reason} for e in entries])
        case ["models", name, "load"]:
            given = _read(body, _Load).parameters
            if given:
                raise InputRefused(
                    f"a model is loaded as the repository holds it; not taken: {', '.join(map(str, given))[:200]}"
                )
            return _done(plane.load(name))
        case ["models", name, "unload"]:
            return _done(plane.unload(name))
    raise NotFound(f"there is nothing at '/v2/repository/{'/'.join(rest)[:200]}'")


async def _done(work: Awaitable[None]) -> Reply:
    await work
    return Reply()


def _regions(plane: Plane, name: str) -> Reply:
    found = plane.regions(name)
    return _json([{"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.nbytes} for r in found])


def _change_regions(plane: Plane, name: str, verb: str, body: bytes) -> Reply:
    if verb == "unregister":
        plane.unregister_region(name)
        return Reply()
    if not name:
        raise InputRefused("a region is registered by name: POST /v2/systemsharedmemory/region/NAME/register")
    asked = _read(body, _Register)
    plane.register_region(name, asked.key, asked.offset, asked.byte_size)
    return Reply()


def _change_cuda(verb: str) -> Reply:
    if verb == "register":
        raise InputRefused("CUDA shared memory is not offered here; use system shared memory")
    return Reply()


def _statistics(plane: Plane, name: str, version: str) -> Reply:
    found = plane.statistics(name, version)
    return _json({"model_stats": [_described(key, each) for key, each in found.items()]})


def _described(key: tuple[str, str], found: ModelStatistics) -> dict[str, Any]:
    none = _spent(Durations())
    return {
        "name": key[0],
        "version": key[1],
        "last_inference": round(found.last_inference_at_s * 1e3),
        "inference_count": found.inference_count,
        "execution_count": found.execution_count,
        "inference_stats": {
            "success": _spent(found.success),
            "fail": _spent(found.fail),
            "queue": _spent(found.queue),
            "compute_input": _spent(found.compute_input),
            "compute_infer": _spent(found.compute_infer),
            "compute_output": _spent(found.compute_output),
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _spent(spent[0]),
                "compute_infer": _spent(spent[1]),
                "compute_output": _spent(spent[2]),
            }
            for rows, spent in sorted(found.batches.items())
        ],
    }


def _spent(found: Durations) -> Mapping[str, int]:
    return {"count": found.count, "ns": round(found.total_s * 1e9)}


def _only(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise WrongMethod(", ".join(allowed))


def _json(content: Any, status: int = 200) -> Reply:
    return Reply(msgspec.json.encode(content), status)


def _read(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputRefused(f"the body is not what this address takes: {error}") from error
