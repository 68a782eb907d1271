"""How the shards' gradients of a round become one sum that every worker has: through files, each slice added by one worker.

    nodes/<round>-<lo>-<hi>      a worker's shards, added along the fixed tree            (written once, read in slices)
    sums/<round>-<W>-<j>         slice j of W of the whole sum                            (written once, read whole)

A worker reads slice j of every node and all slices of the sum: about twice the gradient's bytes, however many workers there
are, and no step takes longer with more of them. ``central`` has one slice: one worker adds everything, as study 2 did.
The sums of a round are complete when there is a W of which all slices are there; sets of different W hold the same bits.
Not here: who waits and who claims (`handler`), what the sum is used for (`rounds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenure.errors import CorruptData
from tenure.train import tree
from tenure.train.adder import Adder, Part
from tenure.train.layout import Cut, Flats, Layout
from tenure.train.records import Arrays
from tenure.train.store import Store, node_name, sum_name


@dataclass(frozen=True, slots=True)
class Sum:
    """A round's gradient, added over all shards."""

    arrays: Arrays
    """Views of memory that the next round's sum is written to."""
    loss: float
    """Sum over the examples; NaN when one was not finite."""
    n: int
    """Examples."""
    finite: bool
    """Whether the loss and every number of the sum are."""
    shard_s: tuple[float, ...]
    """Seconds that each shard took, in order."""


@dataclass(slots=True)
class Exchange:
    """One process's hands on nodes and sums."""

    store: Store
    shards: int
    slices: int
    """Into how many the sum is cut: as many as workers, or 1 for the central combine."""
    layout: Layout | None = None
    _own: tuple[int, dict[tree.Node, Part]] = (-1, {})
    """Round, and the nodes of it that this process published: they are not read back."""
    _added: tuple[int, dict[tuple[int, int], tuple[Mapping[str, Any], Flats]]] = (-1, {})
    """Round, and the slices of its sum that this process added, by (slices, number)."""
    _buffer: Flats = field(default_factory=dict)
    _numbers: dict[int, list[int]] = field(default_factory=dict)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def settle_layout(self, arrays: Arrays) -> Layout:
        """Return the layout that all gradients have; the first one's is published. Raises SpecError when this one differs."""
        if self.layout is None:
            mine = Layout.of(arrays)
            self.store.publish_json("layout.json", mine.to_json(), durable=True)
            self.layout = mine
            published = self.store.read_json("layout.json")
            if published is not None and Layout.of_json(published).entries != mine.entries:
                self.layout = Layout.of_json(published)
        self.layout.check(arrays)
        return self.layout

    def knows_layout(self) -> bool:
        """Return whether the layout is known here or can be read. Raises CorruptData; the file is in quarantine then."""
        if self.layout is None and (data := self.store.read_json("layout.json")) is not None:
            self.layout = Layout.of_json(data)
        return self.layout is not None

    def publish(self, round_: int, part: Part) -> None:
        """Publish a node. That of the whole tree is the sum already: it is published as its only slice."""
        if part.node == (0, self.shards):
            self._publish_sum(round_, 0, 1, part)
            return
        # A NaN is no JSON number: unknown stands for it.
        meta = {"loss": part.loss if math.isfinite(part.loss) else None, "n": part.n, "shard_s": part.shard_s}
        if self._publish_node(round_, part, meta):
            kept = self._own[1] if self._own[0] == round_ else {}
            self._own = (round_, {**kept, part.node: part})

    def nodes_there(self, round_: int) -> set[tree.Node]:
        """Return the nodes of a round that are published."""
        return self.store.pairs("nodes", round_)

    def seconds(self, round_: int) -> list[float]:
        """Return what the shards in the round's nodes took. Raises CorruptData, FileNotFoundError."""
        found: list[float] = []
        for node in self.nodes_there(round_):
            name = node_name(round_, node)
            with self.store.quarantining(name):
                found += self.store.record(name).header.meta["shard_s"]
        return found

    def cover(self, round_: int) -> list[tree.Node] | None:
        """Return published nodes that make up all shards, in order; None when some are missing."""
        return tree.cover(self.nodes_there(round_), self.shards)

    def pieces(self, run: tree.Node) -> list[tree.Node]:
        """Return the nodes that a run of shards is published as."""
        return tree.largest(run, self.shards)

    def adder(self) -> Adder:
        """Return what adds shards, or nodes, in their order."""
        return Adder(self.shards)

    # --- sums ---------------------------------------------------------------------------------------------------------

    def complete(self, round_: int) -> int:
        """Return a number of slices of which all are there; 0 when the round's sum is not complete."""
        there = self.store.pairs("sums", round_)
        if not there:
            return 0
        for slices in {slices for slices, _ in there}:
            if all((slices, number) in there for number in self._wanted(slices)):
                return slices
        return 0

    def due(self, round_: int) -> list[int]:
        """Return the slices that are not there yet. Needs the layout: raises FileNotFoundError before the first gradient."""
        there = self.store.pairs("sums", round_)
        return [number for number in self._wanted(self.slices) if (self.slices, number) not in there]

    def add(self, round_: int, number: int, nodes: Sequence[tree.Node]) -> None:
        """Add one slice over the nodes, which make up the whole tree, and publish it.

        Raises CorruptData for a torn node, now in quarantine; FileNotFoundError for one that is gone.
        """
        cuts = self._slice(number, self.slices)
        own = self._own[1] if self._own[0] == round_ else {}
        adder = self.adder()
        for node in nodes:
            if (mine := own.get(node)) is not None:
                flats = {cut.dtype: mine.flats[cut.dtype][cut.first : cut.first + cut.count].copy() for cut in cuts}
                adder.push(Part(node, flats, mine.loss, mine.n, mine.shard_s))
            else:
                meta, flats = self._read(node_name(round_, node), cuts)
                adder.push(Part(node, flats, _number(meta["loss"]), meta["n"], tuple(meta["shard_s"])))
        self._publish_sum(round_, number, self.slices, adder.total())

    def gather(self, round_: int, slices: int) -> Sum:
        """Return the sum of a round that is complete.

        Raises CorruptData for a torn slice, now in quarantine; FileNotFoundError for one that is gone.
        """
        layout = self._layout()
        added = self._added[1] if self._added[0] == round_ else {}
        metas: list[Mapping[str, Any]] = []
        flats = added[(1, 0)][1] if (1, 0) in added and slices == 1 else self._memory(layout)
        for number in self._wanted(slices):
            cuts = self._slice(number, slices)
            if (mine := added.get((slices, number))) is not None:
                meta, values = mine
            else:
                whole = [Cut(cut.dtype, 0, cut.count) for cut in cuts]
                meta, values = self._read(sum_name(round_, slices, number), whole)
            metas.append(meta)
            for cut in cuts:
                if values[cut.dtype] is not flats[cut.dtype]:
                    flats[cut.dtype][cut.first : cut.first + cut.count] = values[cut.dtype]
        return Sum(
            layout.views(flats),
            _number(metas[0]["loss"]),
            metas[0]["n"],
            all(meta["finite"] for meta in metas),
            tuple(metas[0]["shard_s"]),
        )

    def describe(self, round_: int) -> Mapping[str, Any] | None:
        """Return loss, n and shard_s of a round from its sum alone, None when that is not complete, or nothing of it is sound.

        Torn slices go to quarantine; the others tell the same, without the shards' seconds.
        """
        for number in self._wanted(slices) if (slices := self.complete(round_)) else ():
            name = sum_name(round_, slices, number)
            try:
                with self.store.quarantining(name):
                    return self.store.record(name).header.meta
            except (CorruptData, FileNotFoundError):
                continue
        return None

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _publish_sum(self, round_: int, number: int, slices: int, part: Part) -> None:
        loss = part.loss if math.isfinite(part.loss) else None
        finite = loss is not None and all(np.isfinite(values).all() for values in part.flats.values())
        first = number == self._wanted(slices)[0]
        meta = {"loss": loss, "n": part.n, "finite": bool(finite), "shard_s": part.shard_s if first else ()}
        if self._publish_slice(round_, number, slices, part, meta):
            kept = self._added[1] if self._added[0] == round_ else {}
            self._added = (round_, {**kept, (slices, number): (meta, part.flats)})

    def _publish_node(self, round_: int, part: Part, meta: dict[str, Any]) -> bool:
        return self._write(node_name(round_, part.node), part.flats, meta)

    def _publish_slice(self, round_: int, number: int, slices: int, part: Part, meta: dict[str, Any]) -> bool:
        return self._write(sum_name(round_, slices, number), part.flats, meta)

    def _slice(self, number: int, slices: int) -> list[Cut]:
        return self._layout().slice(number, slices)

    def _write(self, name: str, flats: Flats, meta: Mapping[str, Any]) -> bool:
        block_bytes = self._layout().block_bytes
        return self.store.publish_arrays(name, flats, meta, block_bytes=block_bytes, align=block_bytes)

    def _read(self, name: str, cuts: Sequence[Cut]) -> tuple[Mapping[str, Any], Flats]:
        with self.store.quarantining(name):
            record = self.store.record(name)
            return record.header.meta, {cut.dtype: record.array(cut.dtype, cut.first, cut.count) for cut in cuts}

    def _wanted(self, slices: int) -> list[int]:
        """Return the slices that have any content: a short vector has fewer blocks than there are workers."""
        if slices not in self._numbers:
            self._numbers[slices] = [number for number in range(slices) if self._slice(number, slices)] or [0]
        return self._numbers[slices]

    def _layout(self) -> Layout:
        if not self.knows_layout():
            raise FileNotFoundError(f"{self.store.root / 'layout.json'}: no gradient was published yet")
        assert self.layout is not None
        return self.layout

    def _memory(self, layout: Layout) -> Flats:
        if not self._buffer:
            self._buffer.update(layout.empty())
        return self._buffer


def _number(loss: float | None) -> float:
    return math.nan if loss is None else loss
