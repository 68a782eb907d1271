"""Along which tree a round's shards are added: fixed by their number alone, so that the sum's bits do not depend on who adds.

A node is a range [lo, hi) of shards. The root is [0, S); a node of n > 1 shards splits at the largest power of two below n:
the tree of pairwise summation. A worker owns consecutive shards and publishes the sums of the largest nodes inside them,
about one file for each worker instead of one for each shard. Pure. Not here: files (`exchange`), arithmetic (`layout`).
"""

from __future__ import annotations

from collections.abc import Collection

Node = tuple[int, int]
"""Shards lo to hi - 1."""


def part(worker: int, workers: int, shards: int) -> Node:
    """Return the shards that a worker owns: consecutive, and as even as can be."""
    return shards * worker // workers, shards * (worker + 1) // workers


def owner(shard: int, workers: int, shards: int) -> int:
    """Return the worker whose part holds the shard."""
    return (workers * (shard + 1) - 1) // shards


def children(node: Node) -> tuple[Node, Node]:
    """Return the two halves of a node of at least two shards."""
    lo, hi = node
    middle = lo + (1 << (hi - lo - 1).bit_length() - 1)
    return (lo, middle), (middle, hi)


def largest(wanted: Node, shards: int) -> list[Node]:
    """Return the fewest nodes that make up a range, in order."""
    found: list[Node] = []
    open_ = [(0, shards)]
    while open_:
        node = open_.pop()
        if wanted[0] <= node[0] and node[1] <= wanted[1]:
            found.append(node)
        elif node[0] < wanted[1] and wanted[0] < node[1]:
            left, right = children(node)
            open_ += [right, left]
    return found


def cover(there: Collection[Node], shards: int) -> list[Node] | None:
    """Return the nodes of `there`, in order, that make up the root; the largest where they overlap. None: some are missing."""
    found: list[Node] = []
    open_ = [(0, shards)]
    while open_:
        node = open_.pop()
        if node in there:
            found.append(node)
        elif node[1] - node[0] == 1:
            return None
        else:
            left, right = children(node)
            open_ += [right, left]
    return found


def chain(there: Collection[Node], shards: int) -> list[Node] | None:
    """Return ranges of `there`, whatever they are, that follow each other from 0 to the last shard; the longest where they
    overlap. None: some are missing."""
    following: dict[int, Node] = {}
    for node in sorted(there, reverse=True):
        if node[0] not in following and (node[1] == shards or node[1] in following):
            following[node[0]] = node
    found: list[Node] = []
    at = 0
    while at < shards:
        if at not in following:
            return None
        found.append(following[at])
        at = following[at][1]
    return found


def missing(wanted: Node, there: Collection[Node]) -> list[int]:
    """Return the shards of a range that no node of `there` holds, in order."""
    held = {shard for lo, hi in there for shard in range(max(lo, wanted[0]), min(hi, wanted[1]))}
    return [shard for shard in range(*wanted) if shard not in held]


def runs(shards: list[int]) -> list[Node]:
    """Return the ranges of consecutive numbers in an ascending list."""
    found: list[Node] = []
    for shard in shards:
        if found and found[-1][1] == shard:
            found[-1] = (found[-1][0], shard + 1)
        else:
            found.append((shard, shard + 1))
    return found


def parent(node: Node, shards: int) -> Node:
    """Return the node that this one is a half of; the root is its own."""
    above = at = (0, shards)
    while at != node:
        left, right = children(at)
        above, at = at, left if node[1] <= left[1] else right
    return above
