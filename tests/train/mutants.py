"""Protocols with one protection taken out: the explorer must notice each of them. Benchmarks use them as controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tenure.train import tree
from tenure.train.adder import Adder
from tenure.train.exchange import Exchange
from tenure.train.store import Store, node_name
from tenure.train.turns import Turns


@contextmanager
def count_equals_workers() -> Iterator[None]:
    """Whoever counts all gradients adds them, and writes the sum over what is there (study 2)."""
    publish = Store._publish

    def overwrite(self: Store, name: str, pieces: list[Any], *, durable: bool) -> bool:
        if not name.startswith("sums/"):
            return publish(self, name, pieces, durable=durable)
        self._check_fence()
        self.files.replace(self.root / name, b"".join(pieces))
        return True

    with mock.patch.object(Store, "_publish", overwrite), mock.patch.object(Turns, "falls_to_us", return_value=True):
        yield


@contextmanager
def no_fence() -> Iterator[None]:
    """Nobody looks whether a newer grant of the same worker is at work."""
    with mock.patch.object(Store, "_check_fence"):
        yield


@contextmanager
def arrival_order() -> Iterator[None]:
    """Gradients are added as they came."""
    add = Exchange.add

    def add_as_they_came(self: Exchange, round_: int, number: int, nodes: Sequence[tree.Node]) -> None:
        disk = self.store.files.disk  # type: ignore[attr-defined]
        came = {f"nodes/{name}": place for place, name in enumerate(disk.folders[f"{self.store.root}/nodes"])}
        add(self, round_, number, sorted(nodes, key=lambda node: came.get(node_name(round_, node), 0)))

    with mock.patch.object(Exchange, "add", add_as_they_came), mock.patch.object(Adder, "_halves", return_value=False):
        yield


@contextmanager
def counted_twice() -> Iterator[None]:
    """A worker makes its part whoever has made it, and all nodes are added."""
    cover, missing = tree.cover, tree.missing

    def everything(there: set[tree.Node], shards: int) -> list[tree.Node] | None:
        return cover(there, shards) and sorted(there)

    def own(wanted: tree.Node, there: set[tree.Node]) -> list[int]:
        return missing(wanted, [node for node in there if wanted[0] <= node[0] and node[1] <= wanted[1]])

    with mock.patch.object(tree, "cover", everything), mock.patch.object(tree, "missing", own):
        yield


MUTANTS: dict[str, Callable[[], Any]] = {
    "count == W": count_equals_workers,
    "no fence": no_fence,
    "arrival order": arrival_order,
    "counted twice": counted_twice,
}
