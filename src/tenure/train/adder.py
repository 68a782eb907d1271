"""Adds shards' gradients along the fixed tree (`tree`): what one worker has so far of a round, in whole nodes.

At most one node per level of the tree is held at a time. Not here: files (`exchange`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tenure.train import tree
from tenure.train.layout import Flats, Layout
from tenure.train.records import Arrays


@dataclass(slots=True)
class Part:
    """The sum over the shards of one node."""

    node: tree.Node
    flats: Flats
    loss: float
    """Sum over the examples."""
    n: int
    """Examples."""
    shard_s: tuple[float, ...] = ()
    """Seconds that each shard took, in order."""


class Adder:
    """Collects parts in the order of their shards and adds two as soon as they are the halves of a node."""

    def __init__(self, shards: int, *, in_order: bool = False) -> None:
        """in_order: add each part to what is there, along no tree."""
        self._shards = shards
        self._in_order = in_order
        self.parts: list[Part] = []
        """In order; no two of them are the halves of one node."""

    def push(self, part: Part) -> None:
        """Take the part that follows; its vectors are the adder's from then on."""
        self.parts.append(part)
        self._settle()

    def push_shard(self, shard: int, arrays: Arrays, layout: Layout, *, loss: float, n: int, shard_s: float) -> None:
        """Take one shard's gradient. Its arrays are read, never kept."""
        node = (shard, shard + 1)
        left = self.parts[-1] if self.parts else None
        if left is not None and left.node[1] == shard and self._halves(left.node, node):
            layout.add(left.flats, arrays)  # the common case, without a copy
            _join(left, node, loss, n, (shard_s,))
            self._settle()
        else:
            self.push(Part(node, layout.flatten(arrays), loss, n, (shard_s,)))

    def total(self) -> Part:
        """Return the sum of everything taken: a node when the parts make one up, else what is left added in order."""
        first, *rest = self.parts
        for part in rest:
            _add(first, part)
        self.parts = [first]
        return first

    def _settle(self) -> None:
        while len(self.parts) > 1 and self._halves(self.parts[-2].node, self.parts[-1].node):
            right = self.parts.pop()
            _add(self.parts[-1], right)

    def _halves(self, left: tree.Node, right: tree.Node) -> bool:
        if self._in_order:
            return True
        above = tree.parent(left, self._shards)
        return above[1] - above[0] > 1 and tree.children(above) == (left, right)


def _add(left: Part, right: Part) -> None:
    for dtype, values in left.flats.items():
        np.add(values, right.flats[dtype], out=values)
    _join(left, right.node, right.loss, right.n, right.shard_s)


def _join(left: Part, node: tree.Node, loss: float, n: int, shard_s: tuple[float, ...]) -> None:
    left.node = (left.node[0], node[1])
    left.loss += loss
    left.n += n
    left.shard_s += shard_s
