"""Serving a ready model: engines, one data plane behind an HTTP and a gRPC door, the client, and the load generator.

Knows nothing of leases: it is started with files and ports, and handed what it needs. `Model` is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tenure.serve.client import Model as Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    if name == "Model":
        from tenure.serve.client import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
