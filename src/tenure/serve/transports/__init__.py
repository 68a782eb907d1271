"""How the client reaches a model: in this process, by HTTP (with shared memory where it can), by gRPC.

They meet at `Transport` and never import each other.

`open_transport` is the one place that loads them, so that a client holds only the library it uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from tenure.errors import SpecError, TenureError
from tenure.serve.tensors import Array, ModelMetadata

_MODULES = {
    "http": "tenure.serve.transports.http",
    "shm": "tenure.serve.transports.http",
    "grpc": "tenure.serve.transports.grpc",
}


@dataclass(frozen=True, slots=True)
class Stages:
    """Where one request's time went, seconds."""

    send_s: float
    """Until the request has left: encoding, copying into shared memory, writing to the socket as far as the kernel takes
    it at once, and in async calls the wait for a free connection. Over gRPC encoding only. 0 in-process."""
    recognise_s: float
    """Until the answer begins to come; in-process the call itself. Over gRPC the whole call, transfer included."""
    fetch_s: float
    """Reading the rest of the answer and decoding it. 0 in-process."""


class Transport(Protocol):
    """One way to one model. `infer` may be called from several threads, `infer_async` from one event loop at a time."""

    def metadata(self, name: str) -> ModelMetadata:
        """Return what the model takes and gives. Raises Unavailable, NotFound."""
        ...

    def ready(self) -> bool:
        """Return whether requests are welcome; False when nothing answers."""
        ...

    def infer(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[dict[str, Array], Stages]:
        """Run the model. Raises Unavailable, NotFound, InputRefused, TooLarge, Overloaded, ModelFailed."""
        ...

    def infer_each(
        self, name: str, many: Iterable[Mapping[str, Array]], outputs: Sequence[str], in_flight: int
    ) -> Generator[dict[str, Array] | TenureError, None, None]:
        """Run the model on one request after the other, at most `in_flight` of them sent and not yet answered; in their
        order, errors in their place. The next request is taken from `many` when there is room for it.
        """
        ...

    async def infer_async(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], Stages]:
        """See infer."""
        ...

    def close(self) -> None:
        """Close what is open, the event loop's connections as far as it still runs."""
        ...

    async def close_async(self) -> None:
        """Close everything; from the event loop that `infer_async` ran on."""
        ...


def open_transport(target: str, *, timeout_s: float, threads: int, instances: int = 1, shm: bool | None = None) -> Transport:
    """Return the transport for a target: ``http://``, ``shm://`` or ``grpc://host:port``, or the path of a model file.

    Raises SpecError for another scheme, a missing port, or shared memory where there is none; for files NotFound,
    MissingExtra.
    """
    scheme, found, address = target.partition("://")
    if not found:
        module = importlib.import_module("tenure.serve.transports.inprocess")
        return cast(Transport, module.InProcess(target, threads=threads, instances=instances))
    if scheme not in _MODULES:
        known = ", ".join(f"{each}://host:port" for each in _MODULES)
        raise SpecError(f"a target is a model file or one of {known}; found {target!r}")
    host, _, port = address.rstrip("/").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SpecError(f"{target!r} needs a host and a port, such as {scheme}://127.0.0.1:8000")
    opened = importlib.import_module(_MODULES[scheme])
    if scheme == "grpc":
        if shm:
            raise SpecError(f"shared memory goes with http:// or shm://, not with {target!r}")
        return cast(Transport, opened.open_transport(host, int(port), timeout_s))
    if scheme == "shm" and shm is False:
        raise SpecError(f"{target!r} asks for shared memory and shm=False refuses it: use http://")
    return cast(Transport, opened.open_transport(host, int(port), timeout_s, shm=True if scheme == "shm" else shm))
