"""The nodes of a replay, from a file: a CSV or TOML of our own, or openb's node list. Not here: the present fleet."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenure.errors import SpecError
from tenure.experiments.replay_tables import Row, columns_of, read_text, refuse_unknown, rows_of
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, Gpu

COLUMNS = ("name", "cpus", "memory_bytes", "gpus", "gpu_model", "gpu_memory_bytes", "disk_bytes", "count")
"""Of our own table; `name`, `cpus` and `memory_bytes` are needed. count: so many alike, named name-0, name-1 ..."""
OPENB = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
MAX_NODES = 200_000
MAX_GPUS = 1_024
"""Of one node."""


def load_nodes(path: Path) -> tuple[Node, ...]:
    """Return the nodes that a file lists, in its order. Raises NotFound, and SpecError with line and column."""
    text = read_text(path)
    if path.suffix == ".toml":
        nodes = _of_toml(text, path)
    elif set(OPENB) <= set(columns_of(text, path)):
        nodes = [_of_openb(row) for row in rows_of(text, path)]
    else:
        refuse_unknown(columns_of(text, path), COLUMNS, path)
        nodes = [node for row in rows_of(text, path) for node in _of_row(row)]
    if not nodes:
        raise SpecError(f"{path} lists no node; at least one is needed")
    if len(nodes) > MAX_NODES:
        raise SpecError(f"{path} lists {len(nodes):,} nodes; at most {MAX_NODES:,} can be replayed on")
    seen: set[str] = set()
    for node in nodes:
        if node.name in seen:
            raise SpecError(f"{path} lists node {node.name!r} twice; names must differ")
        seen.add(node.name)
    return tuple(nodes)


def _of_toml(text: str, path: Path) -> list[Node]:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: {error}") from error
    tables = found.get("nodes")
    if set(found) != {"nodes"} or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SpecError(f"{path}: tables [[nodes]] with the keys {', '.join(COLUMNS)} were expected, and nothing else")
    starts = [number for number, line in enumerate(text.splitlines(), start=1) if re.match(r"\s*\[\[\s*nodes\s*\]\]", line)]
    nodes: list[Node] = []
    for number, table in enumerate(tables):
        line = starts[number] if len(starts) == len(tables) else 0
        nodes += _of_row(_row(table, path, line))
    return nodes


def _row(table: Mapping[str, Any], path: Path, line: int) -> Row:
    row = Row(str(path), line, {key: str(value) for key, value in table.items()})
    for key, value in table.items():
        if key not in COLUMNS:
            raise row.error(key, f"is not known; known: {', '.join(COLUMNS)}")
        if isinstance(value, (bool, list, dict)):
            raise row.error(key, f"a number or a text was expected; found {value!r}")
    return row


def _of_row(row: Row) -> Sequence[Node]:
    gpus = row.whole("gpus", 0)
    if gpus > MAX_GPUS:
        raise row.error("gpus", f"a node has at most {MAX_GPUS} GPUs; found {gpus}")
    model, memory_bytes = row.text("gpu_model", "") or "", row.size("gpu_memory_bytes", 0)
    capacity = Capacity(
        cpus=row.number("cpus", above=True),
        memory_bytes=row.size("memory_bytes"),
        disk_bytes=row.size("disk_bytes", 0),
        gpus=tuple(Gpu(index=i, model=model, memory_bytes=memory_bytes) for i in range(gpus)),
    )
    count, name = row.whole("count", 1, low=1), row.text("name")
    if count > MAX_NODES:
        raise row.error("count", f"at most {MAX_NODES:,} nodes can be replayed on; found {count:,}")
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(count)]
    return [_node(one, capacity) for one in names]


def _of_openb(row: Row) -> Node:
    gpus = tuple(Gpu(index=i, model=row.text("model", "")) for i in range(row.whole("gpu")))
    cpus = row.number("cpu_milli", above=True) / 1000
    return _node(row.text("sn"), Capacity(cpus=cpus, memory_bytes=row.whole("memory_mib") << 20, gpus=gpus))


def _node(name: str, capacity: Capacity) -> Node:
    return Node(name=name, capacity=capacity, machine=Machine(cpu_model="of the node file"))
