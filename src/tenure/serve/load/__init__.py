"""Load for servers: the applications of study 3 (`application`, `closed`), which check every answer.

`python -m tenure.serve.load SPEC.json` runs one application.
"""

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

__all__ = [
    "MAX_LATENCIES",
    "LoadCell",
    "LoadResult",
    "LoadSpec",
    "load_command",
    "read_load_result",
    "read_load_spec",
    "write_load_spec",
]
