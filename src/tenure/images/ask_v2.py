"""Questions to any server of the Open Inference Protocol v2, whose answers are compared byte by byte.

What each model takes is asked first; then rows of seeded numbers, one and several, in JSON; what is wrong is asked too, as the
code that says no has to be in an image as well. Standard library only. Not for: load, or other people's clients (`serve`).
"""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from tenure.errors import Unavailable

_ROWS = (1, 3, 8)
_TIMEOUT_S = 60.0
_MAX_ELEMENTS = 1 << 20


def ask_v2(port: int) -> bytes:
    """Return what a server answers, all of it in one. Raises Unavailable when it cannot be asked, OSError."""
    told: list[bytes] = []
    for model in _models(port):
        metadata = _call(port, "GET", f"/v2/models/{model}")[1]
        told.append(metadata)
        found = json.loads(metadata)
        for rows in _ROWS:
            status, answer = _call(port, "POST", f"/v2/models/{model}/infer", _request(found["inputs"], rows))
            told.append(b"%d %s" % (status, answer))
        for body in (b"{", b'{"inputs": []}', _request(found["inputs"], 1, wrong=True)):
            status, answer = _call(port, "POST", f"/v2/models/{model}/infer", body)
            told.append(b"%d %s" % (status, answer))
    told.append(b"%d %s" % _call(port, "GET", "/v2/models/no-such-model"))
    return b"\n".join(told)


def wait_ready_v2(port: int, timeout_s: float = 60.0) -> None:
    """Return once every model is ready. Raises Unavailable."""
    import time

    end_s = time.monotonic() + timeout_s
    while True:
        try:
            if _call(port, "GET", "/v2/health/ready")[0] == 200:
                return
        except OSError:
            pass
        if time.monotonic() > end_s:
            raise Unavailable(f"the server on port {port} is not ready within {timeout_s:g} s")
        time.sleep(0.01)


def _models(port: int) -> Sequence[str]:
    wait_ready_v2(port)
    status, answer = _call(port, "POST", "/v2/repository/index", b"{}")
    if status != 200:
        raise Unavailable(f"the server on port {port} does not say which models it has: {status} {answer[:200]!r}")
    return sorted({str(entry["name"]) for entry in json.loads(answer)})


def _request(inputs: Sequence[Mapping[str, Any]], rows: int, *, wrong: bool = False) -> bytes:
    """Return a request of seeded numbers; lengths that may be any are `rows` first, 1 after."""
    rng = random.Random(rows)
    tensors = []
    for entry in inputs:
        shape = [length if length >= 0 else (rows if place == 0 else 1) for place, length in enumerate(entry["shape"])]
        count = 1
        for length in shape:
            count *= length
        data = [_value(rng, str(entry["datatype"])) for _ in range(min(count, _MAX_ELEMENTS))]
        shown = [*shape[:-1], shape[-1] + 1] if wrong and shape else shape
        tensors.append({"name": entry["name"], "shape": shown, "datatype": entry["datatype"], "data": data})
    return json.dumps({"id": f"rows-{rows}", "inputs": tensors}).encode()


def _value(rng: random.Random, datatype: str) -> Any:
    if datatype == "BYTES":
        return f"text {rng.randrange(10)}"
    if datatype == "BOOL":
        return rng.random() < 0.5
    return round(rng.random(), 4) if datatype.startswith(("FP", "BF")) else rng.randrange(10)


def _call(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise Unavailable(f"the server on port {port} gave no answer to {method} {path}: {error!r}") from error
    finally:
        connection.close()
