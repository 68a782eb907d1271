"""Our own server as a program to analyse: how it is started, and the exercise that drives a served model through its door.

The exercise is what a served model must live through: few and many rows, both doors, JSON and binary, compressed or not, what
is refused, what no model answers, many at once, several instances, either signal at the end.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import signal
import sys
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenure.errors import NotFound, TenureError, Unavailable

if TYPE_CHECKING:
    from tenure.images.closure import Program
    from tenure.images.trace import Running
    from tenure.serve.client import Model

ROWS = (1, 2, 5, 16, 64)
"""Rows of the requests of the exercise."""
AT_ONCE = 4
_READY_MAX_S = 120.0
_TIMEOUT_S = 120.0
_QUESTIONS = (
    *("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{}", "/v2/models/{}/ready", "/v2/models/{}/versions/1"),
    *("/v2/models/{}/config", "/v2/models/{}/stats", "/v2/models/stats", "/metrics", "/v2/models/none", "/none"),
    *("/v2/systemsharedmemory/status", "/v2/systemsharedmemory/region/none/status"),
)


def serving_program(
    model: Path,
    *,
    host: str = "0.0.0.0",
    http_port: int = 8000,
    grpc_port: int = 8001,
    options: Sequence[str] = (),
    python: str = "",
    further: Sequence[Sequence[str]] = (),
) -> Program:
    """Return our server with a model as a program to analyse: started as an image will start it, driven on free ports.

    options: further ones of ``python -m tenure.serve``. python: which runs it; empty: this one. further: options of lives
    beside the two that every analysis has. Raises NotFound.
    """
    from tenure.images.closure import Program
    from tenure.images.trace import Drive, Life

    if not model.exists():
        raise NotFound(f"there is no model at {model}")
    path = model.absolute()
    base = (python or sys.executable, "-m", "tenure.serve", "--model", str(path), *options)
    usual = (*base, "--http-port", "0", "--grpc-port", "0")
    crowded = (*usual, "--instances", "2", "--threads", "2", "--max-delay-ms", "1", "--no-warmup")
    whole = Drive(call=_whole, description="all doors, batches, refusals, questions, many at once")
    brief = Drive(call=_brief, description="two instances, batching by delay")
    more = tuple(Life(argv=(*usual, *words), drives=(brief,)) for words in further)
    return Program(
        argv=(*base, "--host", host, "--http-port", str(http_port), "--grpc-port", str(grpc_port)),
        workdir="/",
        add=(str(path),),
        lives=(Life(argv=usual, drives=(whole,)), Life(argv=crowded, drives=(brief,), stop_signal=signal.SIGINT), *more),
        own_sources=False,  # a server loads what it was told to load: every engine is imported by name, and one is used
    )


def _whole(running: Running) -> None:
    """Drive a server through all that it can be asked. Raises TenureError when the model gives no answer."""
    endpoints = _endpoints(running)
    door = _Door(endpoints["http"])
    for scheme in ("http", "grpc"):
        _through_client(f"{scheme}://{endpoints[scheme]}", door.names())
    for name in door.names():
        door.infer_as_json(name)
        for body, headers in _refusals(door.metadata(name)):
            door.ask("POST", f"/v2/models/{name}/infer", body, headers)
        for question in _QUESTIONS:
            door.ask("GET", question.format(name))
        door.ask("HEAD", f"/v2/models/{name}")
        door.ask("OPTIONS", f"/v2/models/{name}/infer")
        door.ask("POST", f"/v2/models/{name}/versions/999/infer", b"{}")


def _brief(running: Running) -> None:
    address = _endpoints(running)["http"]
    _through_client(f"http://{address}", _Door(address).names())


def _endpoints(running: Running) -> Mapping[str, str]:
    """Return where the server says it listens, without schemes. Raises Unavailable."""
    import time

    ends_at_s = time.monotonic() + _READY_MAX_S
    while time.monotonic() < ends_at_s:
        for line in running.output.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                if found := json.loads(line).get("listening"):
                    return {kind: str(address).rpartition("/")[2] for kind, address in found.items()}
        time.sleep(0.1)
    raise Unavailable(f"the server said on no line where it listens, within {_READY_MAX_S:g} s")


def _through_client(url: str, names: Sequence[str]) -> None:
    from tenure.serve.client import Model

    for name in names:
        with Model(url, name, timeout_s=_TIMEOUT_S) as model:
            model.wait_ready(_READY_MAX_S)
            batches = _batches(model)
            for batch in batches:
                model.predict(batch)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(model.predict, batches * 2))
            for wrong in ({"none": batches[0][next(iter(batches[0]))]}, {}):
                with contextlib.suppress(TenureError):
                    model.predict(wrong)
        with contextlib.suppress(TenureError), Model(url, "none", timeout_s=_TIMEOUT_S) as unknown:
            unknown.predict(batches[0])


def _batches(model: Model) -> list[dict[str, Any]]:
    metadata = model.metadata()
    return [{meta.name: _array(meta.datatype, meta.shape, rows) for meta in metadata.inputs} for rows in ROWS]


def _array(datatype: str, shape: Sequence[int], rows: int) -> Any:
    import numpy as np

    from tenure.serve.tensors import DTYPES

    full = [rows if at == 0 and length == -1 else max(1, length) for at, length in enumerate(shape)]
    if datatype == "BYTES":
        return np.full(full, b"text", dtype=object)
    return np.ones(full, dtype=DTYPES[datatype])


class _Door:
    """The HTTP door, asked without the client: also what a client would never send."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        """Return the body of whatever is answered; nothing when the connection is closed instead."""
        connection = http.client.HTTPConnection(self.address, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, body, dict(headers or {}))
            return connection.getresponse().read()
        except (http.client.HTTPException, OSError):
            return b""
        finally:
            connection.close()

    def names(self) -> list[str]:
        """Return the models that are served. Raises Unavailable."""
        try:
            return [entry["name"] for entry in json.loads(self.ask("POST", "/v2/repository/index"))]
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"http://{self.address} does not list its models") from error

    def metadata(self, name: str) -> Any:
        """Return what a model takes and gives."""
        return json.loads(self.ask("GET", f"/v2/models/{name}"))

    def infer_as_json(self, name: str) -> None:
        """Ask for answers in JSON, plain and compressed; all outputs and each alone."""
        metadata = self.metadata(name)
        for rows in ROWS[:3]:
            body = json.dumps({"id": "é", "inputs": _inputs(metadata, rows)}).encode()
            path = f"/v2/models/{name}/infer"
            self.ask("POST", path, body)
            self.ask("POST", path, gzip.compress(body), {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"})
            self.ask("POST", path, zlib.compress(body), {"Content-Encoding": "deflate", "Accept-Encoding": "deflate"})
            for output in metadata.get("outputs", []):
                one = {
                    "inputs": _inputs(metadata, rows),
                    "outputs": [{"name": output["name"], "parameters": {"binary_data": True}}],
                }
                self.ask("POST", path, json.dumps(one).encode())


def _inputs(metadata: Any, rows: int, **changed: Any) -> list[dict[str, Any]]:
    found = []
    for meta in metadata.get("inputs", []):
        array = _array(meta["datatype"], meta["shape"], rows)
        data = ["text"] * array.size if meta["datatype"] == "BYTES" else array.reshape(-1).tolist()
        found.append({"name": meta["name"], "datatype": meta["datatype"], "shape": list(array.shape), "data": data, **changed})
    return found


def _refusals(metadata: Any) -> list[tuple[bytes, Mapping[str, str]]]:
    """Return bodies, with headers, that must be refused, one way each."""
    wrong: list[dict[str, Any]] = [
        {"shape": [1, 12345]}, {"shape": [-1]}, {"shape": [1 << 40, 1 << 40]}, {"datatype": "FP7"}, {"datatype": "BYTES"},
        {"name": "none"}, {"data": ["x"]}, {"data": []}, {"data": None}, {"shape": "x"},
        {"parameters": {"shared_memory_region": "none", "shared_memory_byte_size": 4}},
        {"parameters": {"binary_data_size": 1 << 40}},
    ]  # fmt: skip
    bodies = [json.dumps({"inputs": _inputs(metadata, 1, **change)}).encode() for change in wrong]
    good = _inputs(metadata, 1)
    bodies += [json.dumps({"inputs": good * 2}).encode(), json.dumps({"inputs": good, "outputs": [{"name": "none"}]}).encode()]
    bodies += [b"", b"{", b"\xff\xfe", b"[]", b"{}", b"[" * 5000, json.dumps({"inputs": good}).encode()[:-9]]
    found: list[tuple[bytes, Mapping[str, str]]] = [(body, {}) for body in bodies]
    found += [(b"not compressed", {"Content-Encoding": "gzip"}), (b"{}", {"Content-Encoding": "br"})]
    found += [(b"{}", {"Inference-Header-Content-Length": length}) for length in ("99", "x", "-1")]
    return found
