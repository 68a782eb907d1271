"""Many clients at once, each with a connection of its own and one request of one image at a time, over HTTP or gRPC.

`python -m benchmarks.programs.many_clients JSON` with door, address, name, clients, seconds, seed, images (an .npy), answers
(an .npy), drain. Each client takes its turn's image again and again until the time is over; a request that is under way then
still ends when `drain` is true. Refused (429, RESOURCE_EXHAUSTED) requests are sent again after the time the server named,
drawn up to a fifth longer so that not all come back at once, as long as there is time. Prints one JSON object: answered, per_s
(from the first answer after a fifth of the time to the last in time), p50_s, p99_s (with all tries), refused,
refused_without_hint, hints_s (mean), lost (reasons by count: ended in neither answer nor refusal), wrong, unfinished (not ended
when the patience ran out).
Raw on purpose: bytes are made once, so that hundreds of clients cost the machine little.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.serving import v2_binary

PATIENCE_S = 90.0
NO_HINT_S = 0.05
Try = Callable[[], Awaitable[tuple[bytes | None, float | None]]]
"""One try of one request: (answer's tensor, None), or (None, seconds to wait; negative: refused without saying)."""


@dataclass(slots=True)
class Seen:
    """What all clients saw."""

    answered_at_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    hints_s: list[float] = field(default_factory=list)
    refused: int = 0
    without_hint: int = 0
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)


class Lost(Exception):
    """A request ended in neither an answer nor a refusal."""


class HttpClient:
    """One connection, opened again when the server closed it after saying so."""

    def __init__(self, address: str, request: bytes) -> None:
        self._host, _, port = address.rpartition(":")
        self._port, self._request = int(port), request
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> tuple[bytes | None, float | None]:
        """See Try."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        reader, writer = self._streams
        writer.write(self._request)  # an answer may come before all of it is on its way
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(fields["content-length"]))
        status = int(head[0].split()[1])
        if fields.get("connection", "").lower() == "close":
            writer.transport.abort()
            self._streams = None
        if status == 200:
            return body[int(fields.get("inference-header-content-length", 0)) :], None
        if status == 429:
            if "retry-after-ms" in fields:
                return None, float(fields["retry-after-ms"]) / 1000
            return None, float(fields.get("retry-after", -1))
        raise Lost(f"status {status}: {body[:120]!r}")

    async def close(self) -> None:
        """Cut the connection."""
        if self._streams is not None:
            self._streams[1].transport.abort()


class GrpcClient:
    """One channel with a connection of its own."""

    def __init__(self, address: str, request: bytes) -> None:
        import grpc

        self._grpc, self._request = grpc, request
        own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
        self._channel = grpc.aio.insecure_channel(address, options=own)
        self._infer = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    async def ask(self) -> tuple[bytes | None, float | None]:
        """See Try."""
        try:
            return raw_output(await self._infer(self._request, timeout=PATIENCE_S)), None
        except self._grpc.aio.AioRpcError as error:
            if error.code() is not self._grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise Lost(f"{error.code().name}: {(error.details() or '')[:120]}") from None
            told: dict[str, Any] = dict(error.trailing_metadata() or ())
            if "grpc-retry-pushback-ms" in told:
                return None, float(told["grpc-retry-pushback-ms"]) / 1000
            return None, float(told.get("retry-after-s", -1))

    async def close(self) -> None:
        """Cut the connection."""
        await self._channel.close()


def http_request(address: str, name: str, x: Any) -> bytes:
    """Return one HTTP request as it goes over the wire."""
    request = v2_binary(name, x)
    fields = {"Host": address, "Content-Length": len(request.body), **request.headers}
    head = "".join(f"{field}: {value}\r\n" for field, value in fields.items())
    return f"POST {request.path} HTTP/1.1\r\n{head}\r\n".encode() + request.body


def grpc_request(name: str, x: Any) -> bytes:
    """Return a ModelInferRequest: model_name = 1, inputs = 5 (name 1, datatype 2, shape 3), raw_input_contents = 7."""
    shape = b"".join(_varint(length) for length in x.shape)
    tensor = _field(1, b"x") + _field(2, b"FP32") + _field(3, shape)
    return _field(1, name.encode()) + _field(5, tensor) + _field(7, x.tobytes())


def raw_output(message: bytes) -> bytes:
    """Return the raw_output_contents (6) of a ModelInferResponse with one output."""
    place = 0
    while place < len(message):
        key, place = _read_varint(message, place)
        if key & 7 != 2:
            raise Lost(f"an answer with wire type {key & 7}")
        length, place = _read_varint(message, place)
        if key >> 3 == 6:
            return message[place : place + length]
        place += length
    raise Lost("an answer without raw output")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


async def live(client: HttpClient | GrpcClient, answer: Any, ends_at_s: float, rng: random.Random, seen: Seen) -> None:
    """Ask until the time is over; the last request ends with its answer, or with its next refusal."""
    while time.monotonic() < ends_at_s:
        begun_s = time.monotonic()
        while True:
            try:
                content, wait_s = await client.ask()
            except (Lost, OSError, EOFError, asyncio.IncompleteReadError) as error:
                seen.lost[f"{type(error).__name__}: {error}"[:160]] += 1
                await client.close()
                return
            if wait_s is None:
                break
            seen.refused += 1
            seen.without_hint += wait_s < 0
            seen.hints_s.append(max(wait_s, 0.0))
            if time.monotonic() >= ends_at_s:
                return
            await asyncio.sleep((wait_s if wait_s >= 0 else NO_HINT_S) * rng.uniform(1, 1.2))
        seen.answered_at_s.append(time.monotonic())
        seen.took_s.append(time.monotonic() - begun_s)
        found = np.frombuffer(content or b"", np.float32)
        seen.wrong += found.size != answer.size or not np.allclose(found, answer, rtol=1e-2, atol=1e-3)


async def run(told: dict[str, Any]) -> dict[str, Any]:
    """Let all clients live, and return what they saw."""
    images, answers = np.load(told["images"]), np.load(told["answers"])
    door, address, name = told["door"], told["address"], told["name"]
    bodies = [http_request(address, name, x[None]) if door == "http" else grpc_request(name, x[None]) for x in images]
    make = HttpClient if door == "http" else GrpcClient
    rng, seen = random.Random(told["seed"]), Seen()
    begun_s = time.monotonic()
    ends_at_s = begun_s + told["seconds"]
    clients = [make(address, bodies[number % len(bodies)]) for number in range(told["clients"])]
    tasks = [
        asyncio.create_task(live(client, answers[number % len(bodies)], ends_at_s, rng, seen))
        for number, client in enumerate(clients)
    ]
    patience_s = told["seconds"] + (PATIENCE_S if told["drain"] else 0)
    done, unfinished = await asyncio.wait(tasks, timeout=patience_s)
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*unfinished, return_exceptions=True)
    for task in done:
        task.result()
    await asyncio.gather(*(client.close() for client in clients))
    steady = sorted(at_s for at_s in seen.answered_at_s if begun_s + told["seconds"] / 5 <= at_s <= ends_at_s)
    # answers come a batch at a time: from the end of one to the end of another is a whole number of batches
    later = [at_s for at_s in steady if at_s > steady[0] + 0.02]
    took_s = np.asarray(seen.took_s or [0.0])
    return {
        "answered": len(seen.answered_at_s),
        "per_s": len(later) / (later[-1] - steady[0]) if later else 0.0,
        "p50_s": float(np.quantile(took_s, 0.5)),
        "p99_s": float(np.quantile(took_s, 0.99)),
        "refused": seen.refused,
        "refused_without_hint": seen.without_hint,
        "hints_s": sum(seen.hints_s) / len(seen.hints_s) if seen.hints_s else 0.0,
        "lost": dict(seen.lost),
        "wrong": seen.wrong,
        "unfinished": len(unfinished) if told["drain"] else 0,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.loads(sys.argv[1])))), flush=True)
