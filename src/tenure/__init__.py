"""Tenure: leases on exactly the resources that machine-learning jobs need.

The verbs are those of the command line, with the same meaning::

    import tenure
    outcome = tenure.run("examples/digits.toml")
    tenure.list_leases(run=outcome.run.id)

Importing the package loads nothing but this file (PEP 562): a training worker pays only for what it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_VERBS = (
    *(
        "bench_load",
        "bench_serve",
        "dataset",
        "doctor",
        "down",
        "execute",
        "follow",
        "gc",
        "lease",
        "logs",
        "release",
        "renew",
        "report",
        "resize",
        "run",
    ),
    *("top", "up"),
)
_LISTS = ("events", "leases", "nodes", "runs", "trials")
_HOMES = {
    **{name: ("tenure.verbs", name) for name in _VERBS},
    # These verbs share their word with a module of nouns, which an import would put in their place: so `list_leases`.
    **{f"list_{name}": ("tenure.verbs", name) for name in _LISTS},
    "recommend_for": ("tenure.verbs", "recommend"),
    "TenureError": ("tenure.errors", "TenureError"),
    "Model": ("tenure.serve.client", "Model"),
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tenure' has no attribute {name!r}; it has: {', '.join(__all__)}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
