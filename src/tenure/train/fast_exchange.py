"""The exchange where the same result is not asked for: one node per worker, added in order, and made smaller by a codec.

    worker ── gradient or difference + what was left out of its last node ──► codec ──► nodes/<round>/<lo>-<hi>
    slice  ── sum of all nodes' slices + what was left out of its last sum ──► codec ──► sums/<round>/<W>-<j>

Both ways are made smaller, each with error feedback of its own (`codec.Feedback`), at the one who encodes. Everybody, the
writer included, goes on with what the files say, so that all have the same sum. Two who add one slice may write different
bytes: the first to publish has the effect, and only its residual moves on. A sum that was torn after some had applied it is
made again with other bits: nodes carry a checksum of the weights they begin at, and when these differ everybody goes
back to the checkpoint and the sums as they are now. Not here: the files of `exchange`, which this refines; saving the
residuals (`own_state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenure.errors import SpecError
from tenure.train import tree
from tenure.train.adder import Adder, Part
from tenure.train.codec import Codec, Feedback, Floats, units_of
from tenure.train.exchange import Exchange
from tenure.train.layout import BLOCKS, MIN_BLOCK_BYTES, Cut, Flats, Layout
from tenure.train.records import BLOCK_BYTES, Arrays
from tenure.train.store import node_name, sum_name

Residuals = dict[str, Floats]
"""Dtype of the flat vector -> what was left out of it."""


@dataclass(slots=True)
class FastExchange(Exchange):
    """One process's hands on nodes and sums."""

    codec: Codec | None = None
    own_slice: int = 0
    """The slice that falls to this worker: only of its own one it knows what was left out."""
    node_round: int = 0
    """The round into whose node `node_residuals` go."""
    node_residuals: Residuals = field(default_factory=dict)
    slice_residuals: Residuals = field(default_factory=dict)
    slice_round: int = 0
    """The round into whose sum `slice_residuals` go."""
    base: int = 0
    """What this worker's weights are before the round, in 32 bits; written with its nodes."""
    bases_differ: bool = False
    """Whether a node, or a sum of nodes, was seen whose worker had other weights."""

    # --- which nodes --------------------------------------------------------------------------------------------------

    def pieces(self, run: tree.Node) -> list[tree.Node]:
        """Return the nodes that a run of shards is published as: one."""
        return [run]

    def cover(self, round_: int) -> list[tree.Node] | None:
        """Return published nodes that make up all shards, in order; None when some are missing."""
        return tree.chain(self.nodes_there(round_), self.shards)

    def adder(self) -> Adder:
        """Return what adds shards, or nodes, in their order."""
        return Adder(self.shards, in_order=True)

    def added_own(self, round_: int) -> bool:
        """Return whether the slice that falls to this worker is published."""
        return (self.slices, self.own_slice) in self.store.pairs("sums", round_)

    def begin(self, base: int) -> None:
        """Stand before a round with weights of this checksum."""
        self.base, self.bases_differ = base, False

    def forget_own(self) -> None:
        """From here on read also what this process wrote itself: it may have been made again by another one."""
        self._own, self._added = (-1, {}), (-1, {})

    # --- with a codec -------------------------------------------------------------------------------------------------

    def settle_layout(self, arrays: Arrays) -> Layout:
        """See Exchange. Raises SpecError also for dtypes that the codec can't make smaller."""
        if self.codec is not None:
            for name, values in arrays.items():
                if not np.issubdtype(values.dtype, np.floating):
                    raise SpecError(f"codec {self.codec.name} takes gradients of floats; {name!r} has dtype {values.dtype}")
        return Exchange.settle_layout(self, arrays)

    def _publish_node(self, round_: int, part: Part, meta: dict[str, Any]) -> bool:
        self.node_round = round_ + 1
        meta["base"] = self.base
        if self.codec is None:
            return Exchange._publish_node(self, round_, part, meta)
        coded, left_out = self._encode(part.flats, self.node_residuals)
        created = self._write_coded(node_name(round_, part.node), coded, meta)
        if created:
            self.node_residuals = left_out
            part.flats = self._decode(coded)
        return created

    def _publish_slice(self, round_: int, number: int, slices: int, part: Part, meta: dict[str, Any]) -> bool:
        own = slices == self.slices and number == self.own_slice
        meta["same_base"] = not self.bases_differ
        if own:
            self.slice_round = round_ + 1
        if self.codec is None:
            return Exchange._publish_slice(self, round_, number, slices, part, meta)
        coded, left_out = self._encode(part.flats, self.slice_residuals if own else {})
        sizes = {dtype: len(values) for dtype, values in part.flats.items()}
        decoded = self._decode(coded, sizes)
        meta["finite"] = meta["finite"] and all(bool(np.isfinite(values).all()) for values in decoded.values())
        created = self._write_coded(sum_name(round_, slices, number), coded, meta)
        if created:
            part.flats = decoded
            if own:
                self.slice_residuals = left_out
        return created

    def _encode(self, flats: Flats, residuals: Residuals) -> tuple[Arrays, Residuals]:
        assert self.codec is not None
        coded: Arrays = {}
        left_out: Residuals = {}
        for dtype, values in flats.items():
            feedback = Feedback(self.codec, residuals.get(dtype, np.zeros(0, dtype=np.float32)))
            with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, and ends the training
                coded[dtype], left_out[dtype] = feedback.encode(values.astype(np.float32, copy=False))
        return coded, left_out

    def _decode(self, coded: Arrays, sizes: dict[str, int] | None = None) -> Flats:
        assert self.codec is not None
        sizes = sizes or self._layout().sizes
        return {
            dtype: self.codec.decode(data, sizes[dtype]).astype(np.dtype(dtype), copy=False) for dtype, data in coded.items()
        }

    def _write_coded(self, name: str, coded: Arrays, meta: dict[str, Any]) -> bool:
        size = sum(data.nbytes for data in coded.values())
        block_bytes = min(BLOCK_BYTES, max(MIN_BLOCK_BYTES, 1 << max(0, -(-size // BLOCKS) - 1).bit_length()))
        return self.store.publish_arrays(name, coded, meta, block_bytes=block_bytes)

    def _read(self, name: str, cuts: Sequence[Cut]) -> tuple[Any, Flats]:
        meta, flats = self._read_coded(self.codec, name, cuts) if self.codec else Exchange._read(self, name, cuts)
        if not meta.get("same_base", True) or meta.get("base", self.base) != self.base:
            self.bases_differ = True
        return meta, flats

    def _read_coded(self, codec: Codec, name: str, cuts: Sequence[Cut]) -> tuple[Any, Flats]:
        with self.store.quarantining(name):
            record = self.store.record(name)
            flats: Flats = {}
            for cut in cuts:
                first, count = cut.first // codec.unit_values, units_of(codec, cut.count)
                data = record.array(cut.dtype, first * codec.unit_bytes, count * codec.unit_bytes)
                flats[cut.dtype] = codec.decode(data, cut.count).astype(np.dtype(cut.dtype), copy=False)
            return record.header.meta, flats

    def _slice(self, number: int, slices: int) -> list[Cut]:
        """Return what belongs to a slice: whole units of the codec."""
        codec, layout = self.codec, self._layout()
        if codec is None:
            return layout.slice(number, slices)
        units = {dtype: units_of(codec, size) for dtype, size in layout.sizes.items()}
        every = sum(units.values())
        begin, end = every * number // slices, every * (number + 1) // slices
        cuts, before = [], 0
        for dtype, count in units.items():
            first = max(0, begin - before) * codec.unit_values
            stop = min(layout.sizes[dtype], (min(end, before + count) - before) * codec.unit_values)
            if first < stop:
                cuts.append(Cut(dtype, first, stop - first))
            before += count
        return cuts
