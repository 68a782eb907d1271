"""One slot of one worker: round after round through the store, until the result, the slot's end, or a newer generation.

    load a checkpoint, replay the sums since ──► own shards ──► nodes ──► own slice of the sum ──► all slices ──► update ──► …

A worker computes its own shards only. What one suffices for (a slice, the look at the held-out examples, the result) is done
at once by the worker whose turn it is, and by another through a claim when it was due for a claim period. Weighed and
rejected: letting a waiting worker compute a straggler's shards; it would hide a lost worker and blur costs. The one exception
is a round whose files are gone while the others are ahead: then nobody else will make it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tenure.errors import CorruptData, JobFailed, Unavailable
from tenure.train import tree
from tenure.train.adder import Part
from tenure.train.checkpoints import Checkpoints
from tenure.train.context import Context, Outcome
from tenure.train.events import Work
from tenure.train.exchange import Exchange, Sum
from tenure.train.local import differences_of, outer_step, without_outer
from tenure.train.own_state import OwnState, open_exchange
from tenure.train.pace import Leaving, Pace
from tenure.train.programs import averaged
from tenure.train.records import Arrays
from tenure.train.round_records import Figures, Finished, RoundRecords
from tenure.train.rounds import Rounds
from tenure.train.store import failure_name, read_result, round_name
from tenure.train.turns import Turns

SHORT_SLOTS = 3
"""Slots in a row in which a worker finished none of its own shards, after which one more is its last."""


class _Leave(Exception):
    """The slot is over, or the process was told to leave."""


class _Over(Exception):
    """The run needs this worker no more."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


@dataclass(slots=True)
class Slot:
    """One slot of one worker."""

    event: Work
    context: Context
    rounds: Rounds
    check_inputs: Callable[[], None] = lambda: None
    """Raises JobFailed when the data is no longer what was planned with."""
    round: int = -1
    """Rounds finished; -1 before anything is loaded."""
    weights: Arrays = field(default_factory=dict)
    """After these rounds."""
    shards: Pace = field(default_factory=Pace)
    closings: Pace = field(default_factory=Pace)
    """What ends a round: adding, reading the sum, updating, records and checkpoints."""
    looks: Pace = field(default_factory=Pace)
    """At the held-out examples."""
    advanced: bool = False
    """Whether this worker published anything of a round, or the run finished one, in this slot."""
    leaving: Leaving = field(default_factory=Leaving)
    turns: Turns = field(init=False)
    records: RoundRecords = field(init=False)
    exchange: Exchange = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    own: OwnState | None = field(init=False)
    """Where bytes are to be few: what this worker alone keeps from round to round."""
    _figures: Figures = field(default_factory=Figures)
    _last: Finished | None = None
    """The round that gave `weights`."""

    def __post_init__(self) -> None:
        slices = 1 if self._central else self.event.workers
        self.turns = Turns(self.event, self.context)
        self.checkpoints = Checkpoints(self.context.store, timer=self.context.timer)
        self.exchange, self.own = open_exchange(self.context.store, self.rounds, self.event, slices=slices)
        self.records = RoundRecords(self.context, self.exchange)

    # --- roles --------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Work round by round."""
        self._record_start()
        try:
            while True:
                try:
                    self._look(0.0)
                    self._load()
                    self._settle()
                    self._round()
                except (CorruptData, FileNotFoundError):
                    # Torn (now in quarantine) or forgotten because the others are further: look again what there is.
                    self._look(0.0)
                    self.context.sleep(self.context.poll_s)
        except _Over as over:
            return over.outcome
        except _Leave:
            return self._hand_over()

    def begin(self) -> None:
        """Publish the weights before the first round."""
        if not self.context.store.checkpoints():
            self.checkpoints.begin(self.rounds.build())

    def combine(self, round_: int) -> Outcome:
        """Do what is missing of one round, whoever's it is, and go no further."""
        self._load()
        if self.round == round_:
            self._contribute(round_, (0, self.context.spec.shards))
            nodes = self.exchange.cover(round_)
            if nodes is not None and not self.exchange.complete(round_):
                for number in self.exchange.due(round_):
                    self.exchange.add(round_, number, nodes)
            self._load()
            self._settle()
        return Outcome("continue", self.round, "combined")

    # --- state --------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Go on from the newest weights that checkpoint and complete sums give."""
        kept = self.context.store.checkpoints()
        if self.round < 0 or (kept and kept[-1] > self.round):
            self.begin()
            found = self.checkpoints.newest()
            if found is None:
                raise CorruptData("no sound weights in the store")  # all were torn: they are built again
            rounds, self.weights, meta = found
            if rounds != self.round:
                self.round, self._figures = rounds, Figures()
                self._last = Finished(meta["loss"], meta["n"], tuple(meta["shard_s"])) if rounds else None
        self._mend_layout()
        while not self.records.undecided(self.round) and (slices := self.exchange.complete(self.round)):
            self._apply(self.exchange.gather(self.round, slices))
        self.shards.begin_with(self._last.shard_s if self._last else ())

    def _mend_layout(self) -> None:
        """Publish the gradients' layout again when there are gradients but it is gone: its file was torn."""
        store = self.context.store
        if not self.exchange.knows_layout() and (store.names("nodes") or store.names("sums")):
            arrays, *_ = self.rounds.gradient(self.round, self._part()[0], without_outer(self.weights))
            self.exchange.settle_layout(differences_of(arrays, self.weights) if self.context.spec.local_steps else arrays)

    def _apply(self, total: Sum) -> None:
        if not total.finite or not total.n:
            self._fail(total)
        spec = self.context.spec
        if spec.local_steps:
            rate, momentum, plain = spec.outer_rate, spec.outer_momentum, averaged(self.rounds.program)
            self.weights = outer_step(self.weights, total, rate=rate, momentum=momentum, averaged=plain)
        else:
            self.weights = self.rounds.update(self.round, self.weights, total)
        self.round += 1
        self._last = Finished(total.loss, total.n, total.shard_s)
        self.advanced = self.advanced or self.round > self.event.round

    def _fail(self, total: Sum) -> None:
        store, spec = self.context.store, self.context.spec
        loss = total.loss if total.n else "of no example"
        error = (
            f"training failed in round {self.round}: the loss is {loss} or a gradient is not finite. "
            f'The weights of round {self.round} are kept. Lower the learning rate of "{spec.program}", or look for '
            "NaN and infinity in its inputs."
        )
        if self._last is not None:
            self._checkpoint()
        store.publish_json(failure_name(self.event.generation), {"error": error, "round": self.round}, durable=True)
        raise JobFailed(error)

    # --- one round ----------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        context, round_ = self.context, self.round
        self._figures = figures = Figures(began=context.timer())
        if self.own is not None:
            self.own.enter(round_, self.weights, self._part())
        self._contribute(round_, self._to_make(round_))
        waiting, began = context.timer(), context.timer()
        slices, added_s = self._await_sum(round_)
        began = context.timer()
        total = self.exchange.gather(round_, slices)
        if self.own is not None and self.own.went_apart():
            self.round = -1  # the store says what the weights are
            return
        self._apply(total)
        figures.wait_s = began - waiting - added_s
        figures.combine_s = added_s + context.timer() - began
        self.closings.note(figures.combine_s)

    def _contribute(self, round_: int, wanted: tree.Node) -> None:
        """Publish the nodes of a range of shards that are not there, each as soon as it is whole."""
        exchange = self.exchange
        if not self.shards.longest_s and not self.context.spec.local_steps:
            # a slot that goes on in the middle of the first round
            self.shards.begin_with(exchange.seconds(round_))
        for run in tree.runs(tree.missing(wanted, exchange.nodes_there(round_))):
            for node in exchange.pieces(run):
                if self.own is not None and self.own.local is not None:
                    self._publish(round_, self._train_alone(self.own, round_, node))
                    continue
                adder = exchange.adder()
                try:
                    for shard in range(*node):
                        # After a slot that did nothing: else one slow step, never tried again, would end a run.
                        chance = self.event.idle and not self.advanced
                        self._stay(self.shards.shortest_s if chance else self.shards.next_s)
                        arrays, loss, n, shard_s = self.rounds.gradient(round_, shard, self.weights)
                        self.check_inputs()  # before anything that was computed from other data is published
                        layout = exchange.settle_layout(arrays)
                        adder.push_shard(shard, arrays, layout, loss=loss, n=n, shard_s=shard_s)
                        self.shards.note(shard_s)
                except _Leave:
                    for part in adder.parts:
                        self._publish(round_, part)
                    raise
                self._publish(round_, adder.total())

    def _train_alone(self, own: OwnState, round_: int, node: tree.Node) -> Part:
        """Return what this worker's local steps give; the next slot goes on after those that were done."""
        try:
            part = own.train(round_, node, self.weights, self._stay)
            self.check_inputs()
            return part
        finally:
            self.advanced = self.advanced or own.stepped

    def _await_sum(self, round_: int) -> tuple[int, float]:
        """Wait until the round's sum is complete, and add what falls to this worker.

        Returns the number of slices, and the seconds spent on adding.
        """
        context, exchange = self.context, self.exchange
        since, pause_s, added_s = context.monotonic(), 0.001, 0.0
        while not (slices := exchange.complete(round_)):
            self._look(self.closings.next_s)
            there = exchange.nodes_there(round_)
            nodes = exchange.cover(round_)
            began = context.timer()
            if nodes is not None and self._add(round_, nodes):
                added_s += context.timer() - began
                continue
            if nodes is None and tree.missing(wanted := self._to_make(round_), there):
                self._contribute(round_, wanted)  # one was torn and is in quarantine
            elif nodes is None and math.isinf(context.remaining_s()) and context.monotonic() - since > context.spec.wait_s:
                raise Unavailable(self._missing(f"{context.spec.wait_s:g} s"))
            context.sleep(pause_s)
            pause_s = min(pause_s * 1.3, context.poll_s)
        return slices, added_s

    def _add(self, round_: int, nodes: list[tree.Node]) -> bool:
        """Add the slices that are due and fall to this worker; return whether there were any."""
        did = False
        for number in self.exchange.due(round_):
            name = f"sum-{round_:08d}-{self.exchange.slices:04d}-{number:04d}"
            if self.turns.claim(name) if self._central else self.turns.falls_to_us(name, ours=number == self.event.workerno):
                self.exchange.add(round_, number, nodes)
                did = self.advanced = True
        return did

    # --- after a round ------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Do what a finished round asks for: its record, the look at the held-out examples, a checkpoint, the result."""
        if self.round == 0:
            return
        turn = (self.round - 1) % self.event.workers == self.event.workerno
        if self.records.looks_at(self.round):
            self._evaluate(turn=turn)
        elif turn and not self.context.store.exists(round_name(self.round)):
            self._record(None)
        if turn and self.checkpoints.due(self.round, self._round_s(), seldom=self.own is not None):
            self.records.fill(self.round)
            self._checkpoint()
        if turn:
            self.checkpoints.forget(self.round)

    def _evaluate(self, *, turn: bool) -> None:
        """Wait until the round is evaluated, by this worker if it falls to it; publish the result if training ends there."""
        context, name, pause_s = self.context, f"evaluate-{self.round:08d}", 0.001
        while (record := context.store.read_json(round_name(self.round))) is None or self.records.why_last(record):
            self._look(self.looks.next_s)
            if self.turns.falls_to_us(name, ours=turn):
                if record is None:
                    began = context.timer()
                    accuracy = self.rounds.evaluate(without_outer(self.weights))
                    self.looks.note(context.timer() - began)
                    self._record(accuracy, evaluate_s=context.timer() - began)
                else:
                    self._finish(record)
                continue
            context.sleep(pause_s)
            pause_s = min(pause_s * 1.3, context.poll_s)

    def _finish(self, record: dict[str, Any]) -> None:
        self.records.fill(self.round)
        meta = {
            "rounds": self.round,
            "accuracy": record["accuracy"],
            "loss": record["loss"],
            "why": self.records.why_last(record),
            "at_s": record["at_s"],
        }
        self.context.store.publish_arrays("result", without_outer(self.weights), meta, durable=True)

    def _record(self, accuracy: float | None, *, evaluate_s: float = 0.0) -> None:
        """Publish the newest round's record."""
        assert self._last is not None, "only rounds that are finished have a record"
        figures = replace(self._figures, evaluate_s=evaluate_s, round_s=self._round_s() if self._figures.began else 0.0)
        self.records.publish(self.round, self._last, accuracy, figures)

    def _checkpoint(self) -> None:
        seen = self._last
        assert seen is not None
        self.checkpoints.write(self.round, self.weights, {"loss": seen.loss, "n": seen.n, "shard_s": seen.shard_s})

    # --- small decisions ----------------------------------------------------------------------------------------------

    @property
    def _central(self) -> bool:
        return self.context.spec.exchange == "central"

    def _part(self) -> tree.Node:
        return tree.part(self.event.workerno, self.event.workers, self.context.spec.shards)

    def _to_make(self, round_: int) -> tree.Node:
        """Return the shards to compute of a round: our own, or all when others are ahead and will not make it again."""
        store = self.context.store
        ahead = max(store.newest_sum(), store.newest_node()) > round_
        return (0, self.context.spec.shards) if ahead else self._part()

    def _round_s(self) -> float:
        return self.context.timer() - self._figures.began

    def _look(self, step_s: float) -> None:
        """Raise _Over when the run is over for this worker, _Leave when no step of so many seconds fits into the slot."""
        ended = self._ended()
        if ended is not None:
            raise _Over(ended)
        self._stay(step_s)

    def _stay(self, step_s: float) -> None:
        """Raise _Leave when no step of so many seconds fits into the slot, or the process was told to leave."""
        leave_s = self.leaving.next_s
        if self.own is not None:
            leave_s += self.own.save_s
        if self.context.stopping() or self.context.remaining_s() < leave_s + step_s:
            raise _Leave

    def _ended(self) -> Outcome | None:
        store = self.context.store
        try:
            result = read_result(store.root, store.files)
        except CorruptData:
            store.quarantine("result")  # whoever has the last round's weights publishes it again
            result = None
        if result is not None:
            return Outcome("done", int(result.meta["rounds"]), str(result.meta["why"]))
        failure = store.read_json(failure_name(self.event.generation))
        if failure is not None:
            raise JobFailed(failure["error"])
        if store.latest_generation() > self.event.generation:
            return Outcome("continue", self.round, f"superseded by generation {store.latest_generation()}")
        return None

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _hand_over(self) -> Outcome:
        event, spec = self.event, self.context.spec
        idle = 0 if self.advanced else event.idle + 1
        short = idle > SHORT_SLOTS and bool(tree.missing(self._part(), self.exchange.nodes_there(max(0, self.round))))
        if short or idle > spec.max_idle_slots:
            error = self._missing(f"{idle} slots")
            if short:
                error = (
                    f"in {idle} slots worker {event.workerno} could not finish one of its own shards; "
                    "its slot is too short: raise it, or the CPU share"
                )
            raise JobFailed(f"training stands still in round {max(0, self.round)}: {error}")
        if self.own is not None:
            self.own.leave(self.round)
        following = Work(
            workerno=event.workerno,
            workers=event.workers,
            round=max(0, self.round),
            slot=event.slot + 1,
            generation=event.generation,
            idle=idle,
        )
        self.context.invoke(following.to_dict())
        return Outcome("continue", following.round, "told to leave" if self.context.stopping() else "slot nearly over")

    def _missing(self, waited: str) -> str:
        spec = self.context.spec
        missing = tree.missing((0, spec.shards), self.exchange.nodes_there(max(0, self.round)))
        late = sorted({tree.owner(shard, self.event.workers, spec.shards) for shard in missing})
        return (
            f"worker {self.event.workerno} waited {waited} in round {self.round} for shards {missing} of workers {late}, or "
            "for the combine. Look at those workers' logs; they may have ended or be out of memory."
        )

    def _publish(self, round_: int, part: Part) -> None:
        began = self.context.timer()
        self.exchange.publish(round_, part)
        self.leaving.files.note(self.context.timer() - began)
        self.advanced = True

    def _record_start(self) -> None:
        event, context = self.event, self.context
        startup_s, began = context.since_start_s(), context.timer()
        name = f"starts/{event.generation:04d}-{event.workerno:04d}-{event.slot:06d}.json"
        if not context.store.exists(name):
            context.store.publish_json(name, {"worker": event.workerno, "startup_s": startup_s})
        self.leaving = Leaving(startup_s)
        self.leaving.files.note(context.timer() - began)
