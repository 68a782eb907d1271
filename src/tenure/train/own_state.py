"""What belongs to one worker alone and outlives its process: optimizer moments, a round under way, what codecs left out.

    local/0002-0004-<round of the next node>-<steps done>-<round of the next slice>     of worker 2 of 4; the newest is kept
    anew/00000012-0002.json                                                             it began round 12 without, and why

Saved when the worker leaves its slot. It fits one round only: a worker that died, or goes on among another number of
workers, finds none that does and begins anew. That costs speed of learning, never a wrong sum. Weighed and rejected:
saving with every checkpoint; it is three times as large as the weights, and fits no more when the run has gone on.
Not here: what it means (`local`, `fast_exchange`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tenure.errors import CorruptData
from tenure.train import tree
from tenure.train.adder import Part
from tenure.train.codec import make_codec
from tenure.train.events import Work
from tenure.train.exchange import Exchange
from tenure.train.fast_exchange import FastExchange
from tenure.train.local import LocalSteps, checksum
from tenure.train.records import Arrays
from tenure.train.rounds import Rounds
from tenure.train.store import Store

SAVE_BYTES_PER_S = 200e6
"""Assumed for the time that is kept to save it in."""
_PARTS = ("inner", "node", "slice")


@dataclass(slots=True)
class OwnState:
    """One worker's door to it."""

    store: Store
    worker: int
    workers: int
    exchange: FastExchange
    local: LocalSteps | None
    restored: bool = False
    """Whether this process looked for what was saved."""

    @property
    def stepped(self) -> bool:
        """Whether this process took a local step."""
        return self.local is not None and self.local.pace.longest_s > 0

    @property
    def save_s(self) -> float:
        """Seconds to keep for saving."""
        return sum(values.nbytes for values in self._arrays().values()) / SAVE_BYTES_PER_S

    def enter(self, round_: int, weights: Arrays, part: tree.Node) -> None:
        """Begin a round with these weights, whose shards `part` are this worker's; at first with what it saved."""
        self.exchange.begin(checksum(weights))
        if not self.restored:
            contributed = not tree.missing(part, self.exchange.nodes_there(round_))
            self.restore(round_, contributed=contributed, added=self.exchange.added_own(round_))

    def train(self, round_: int, node: tree.Node, weights: Arrays, stay: Callable[[float], None]) -> Part:
        """Return what the worker's local steps of a round give. stay: see `LocalSteps.contribute`."""
        assert self.local is not None, "only where there are local steps"
        if self.local.round != round_ and self.restored:
            self.note(round_, "this round had to be computed again")
        return self.local.contribute(round_, node, weights, self.exchange.settle_layout, stay)

    def went_apart(self) -> bool:
        """Return whether workers began the round with different weights; then nothing that this one remembers counts."""
        if self.exchange.bases_differ:
            self.exchange.forget_own()
        return self.exchange.bases_differ

    def leave(self, round_: int) -> None:
        """Save, unless this process did not come to anything yet."""
        if self.restored:
            self.save(round_)

    def save(self, round_: int) -> None:
        """Save what goes on in `round_`, the first whose sum is not complete; remove what was saved before."""
        node_round, slice_round = (max(round_, seen) for seen in (self.exchange.node_round, self.exchange.slice_round))
        meta: dict[str, Any] = {"node_round": node_round, "slice_round": slice_round, "step": 0}
        arrays, local = self._arrays(), self.local
        if local is not None and local.round == node_round:
            loss = local.loss if math.isfinite(local.loss) else None
            meta |= {"step": local.step, "names": local.names, "loss": loss, "n": local.n, "took_s": local.took_s}
        else:  # of a round that others finished: only what was left out still counts
            arrays = {name: values for name, values in arrays.items() if not name.startswith("inner/")}
        name = f"{self._prefix}{node_round:08d}-{meta['step']:06d}-{slice_round:08d}"
        self.store.publish_arrays(f"local/{name}", arrays, meta)
        for older in self._saved():
            if older < name:
                self.store.remove(f"local/{older}")

    def restore(self, round_: int, *, contributed: bool, added: bool) -> None:
        """Take over what was saved, as far as it fits; record it when something should have been there and did not.

        round_: the first whose sum is not complete. contributed, added: whether this worker's node, and slice, of it are there.
        """
        if self.worker == 0:
            for name in self.store.names("local"):
                if name.split("-")[1] != f"{self.workers:04d}":
                    self.store.remove(f"local/{name}")
        wanted = round_ + contributed, round_ + added
        found, why = self._newest(wanted[0])
        if found is not None:
            meta, parts = found
            self.exchange.node_residuals = parts["node"]
            if meta["slice_round"] == wanted[1]:
                self.exchange.slice_residuals = parts["slice"]
            if self.local is not None:
                self.local.begin(wanted[0], parts["inner"])
                if meta["step"]:
                    loss = math.nan if meta["loss"] is None else meta["loss"]
                    self.local.go_on(meta["step"], tuple(meta["names"]), loss, meta["n"], meta["took_s"])
        elif wanted[0] > 0:
            self.note(wanted[0], why)
        self.exchange.node_round, self.exchange.slice_round = wanted
        self.restored = True

    def note(self, round_: int, why: str) -> None:
        """Record that this worker began a round without what it had before."""
        data = {"round": round_, "worker": self.worker, "workers": self.workers, "why": why}
        self.store.publish_json(f"anew/{round_:08d}-{self.worker:04d}.json", data)

    def _newest(self, round_: int) -> tuple[tuple[Mapping[str, Any], dict[str, Arrays]] | None, str]:
        names = self._saved()
        if not names:
            return None, "nothing was saved by this worker among as many workers"
        try:
            header, arrays = self.store.read(f"local/{names[-1]}")
        except (CorruptData, FileNotFoundError) as error:
            return None, f"what was saved is torn or gone: {error}"
        if header.meta["node_round"] != round_:
            return None, f"what was saved belongs to round {header.meta['node_round']}; the process died after it"
        parts: dict[str, Arrays] = {part: {} for part in _PARTS}
        for name, values in arrays.items():
            part, _, key = name.partition("/")
            parts[part][key] = values
        return (header.meta, parts), ""

    @property
    def _prefix(self) -> str:
        return f"{self.worker:04d}-{self.workers:04d}-"

    def _saved(self) -> list[str]:
        return [name for name in self.store.names("local") if name.startswith(self._prefix)]

    def _arrays(self) -> Arrays:
        parts: dict[str, Mapping[str, Any]] = {
            "inner": self.local.inner if self.local is not None else {},
            "node": self.exchange.node_residuals,
            "slice": self.exchange.slice_residuals,
        }
        return {f"{part}/{name}": values for part, arrays in parts.items() for name, values in arrays.items()}


def open_exchange(store: Store, rounds: Rounds, event: Work, *, slices: int) -> tuple[Exchange, OwnState | None]:
    """Return the exchange that the spec asks for; and what the worker keeps for itself, None where that is nothing."""
    spec = rounds.spec
    if spec.same_result:
        return Exchange(store, spec.shards, slices), None
    own_slice = event.workerno if slices > 1 else 0
    exchange = FastExchange(store, spec.shards, slices, codec=make_codec(spec.codec), own_slice=own_slice)
    local = LocalSteps(rounds) if spec.local_steps else None
    keeps = local is not None or exchange.codec is not None
    return exchange, OwnState(store, event.workerno, event.workers, exchange, local) if keeps else None
