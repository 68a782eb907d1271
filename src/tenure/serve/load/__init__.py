"""Load for servers, of two kinds that share no column.

    open and closed loop against any server of the v2 protocol (`tenure bench load`): latency from the due time

        LoadPlan ──► Target ──► Loop over HttpWire or GrpcWire ──► Record ──► judge, summary ──► LoadReport
                     (payload)  (schedule, columns)                            search: runs until a rate is proven

    the applications of study 3 (`application`, `closed`), which check every answer: `python -m tenure.serve.load SPEC.json`

What belongs to `tenure bench load` is loaded on first use: SciPy comes with it, and an application's memory is measured.
"""

from importlib import import_module
from typing import Any

from tenure.serve.load.application import (
    MAX_LATENCIES,
    LoadCell,
    LoadResult,
    LoadSpec,
    load_command,
    read_load_result,
    read_load_spec,
    write_load_spec,
)

_HOMES = {
    "LoadPlan": "plan",
    "LoadReport": "report",
    "Outcome": "records",
    "Record": "records",
    "SearchReport": "search",
    "Shape": "payload",
    "Target": "runner",
    "measure": "report",
    "read_record": "columns",
    "read_report": "report",
}

__all__ = [  # noqa: PLE0604
    "MAX_LATENCIES",
    "LoadCell",
    "LoadResult",
    "LoadSpec",
    "load_command",
    "read_load_result",
    "read_load_spec",
    "write_load_spec",
    *sorted(_HOMES),
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
