"""How the client reaches a model: in this process, by HTTP, by gRPC. They meet at `Transport` and never import each other.

`open_transport` is the one place that loads them, so that a client holds only the library it uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from tenure.errors import SpecError
from tenure.serve.tensors import Array, ModelMetadata

_MODULES = {"http": "tenure.serve.transports.http", "grpc": "tenure.serve.transports.grpc"}


@dataclass(frozen=True, slots=True)
class Stages:
    """Where one request's time went, seconds."""

    send_s: float
    """Encoding and, over HTTP, writing. 0 in-process."""
    recognise_s: float
    """Waiting for the answer to begin; in-process the call itself. Over gRPC the whole call, transfer included."""
    fetch_s: float
    """Reading and decoding the answer. 0 in-process."""


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


def open_transport(target: str, *, timeout_s: float, threads: int) -> Transport:
    """Return the transport for a target: ``http://host:port``, ``grpc://host:port``, or the path of a model file.

    Raises SpecError for another scheme or a missing port; for files NotFound, MissingExtra.
    """
    scheme, found, address = target.partition("://")
    if not found:
        module = importlib.import_module("tenure.serve.transports.inprocess")
        return cast(Transport, module.InProcess(target, threads=threads))
    if scheme not in _MODULES:
        raise SpecError(f"a target is a model file, http://host:port or grpc://host:port; found {target!r}")
    host, _, port = address.rstrip("/").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SpecError(f"{target!r} needs a host and a port, such as {scheme}://127.0.0.1:8000")
    opened = importlib.import_module(_MODULES[scheme])
    return cast(Transport, opened.open_transport(host, int(port), timeout_s))
