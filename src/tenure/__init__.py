"""Tenure: leases on exactly the resources that machine-learning jobs need.

The verbs are those of the command line, with the same meaning::

    import tenure
    outcome = tenure.run("examples/digits.toml")
    tenure.leases()

Importing the package loads nothing but this file (PEP 562): a training worker pays only for what it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("doctor", "events", "leases", "recommend", "release", "report", "run", "runs", "trials"), "tenure.verbs"),
    "TenureError": "tenure.errors",
    "Model": "tenure.serve.client",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tenure' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
