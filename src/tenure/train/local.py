"""Local steps: each worker trains alone for H steps, and only the difference that they make is exchanged (DiLoCo).

    inner   H times the program's own gradient and update, on the worker's shards of each step's batch
    node    (start - end) × examples, of each parameter; a parameter is what occurs in the gradient
    outer   mean = sum of nodes / examples of all;  m = momentum × m + mean;  parameters -= rate × (mean + momentum × m)

Every worker takes the same outer step from the same sum, so that all hold the same parameters after it. The outer momentum m is
part of the checkpoints; whatever else is in the weights (the inner optimizer's moments) belongs to the worker: it is not
exchanged, and begins as the program built it when it was lost. Step h of round r is step r × H + h of the whole training: it
has the examples that this step would have with an exchange after every step, and `update` is told this number.
Sources: Douillard et al. 2023 (arXiv 2311.08105), Nesterov step and its defaults; McMahan et al. 2017, weighting by examples.
Not here: files (`own_state`, `fast_exchange`), and waiting (`slot`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tenure.errors import SpecError
from tenure.train.adder import Part
from tenure.train.exchange import Sum
from tenure.train.layout import Layout
from tenure.train.pace import Pace
from tenure.train.records import Arrays
from tenure.train.rounds import Rounds
from tenure.train.tree import Node

OUTER = "tenure.outer/"
"""Begins the names of the outer momentum in a checkpoint."""


@dataclass(slots=True)
class LocalSteps:
    """One worker's inner training, step by step; it can be left between two steps and gone on with."""

    rounds: Rounds
    round: int = 0
    """The round that the rest of this state belongs to."""
    step: int = 0
    """Steps of it that are done."""
    inner: Arrays = field(default_factory=dict)
    """The worker's own arrays; while a round is under way its parameters too. Empty: as the program built them."""
    names: tuple[str, ...] = ()
    """Of the parameters, once a step told them."""
    loss: float = 0.0
    """Sum over the examples of the steps done."""
    n: int = 0
    """These examples."""
    took_s: float = 0.0
    """Seconds of the steps done."""
    pace: Pace = field(default_factory=Pace)
    """Of this process's steps."""

    def contribute(
        self, round_: int, node: Node, weights: Arrays, settle: Callable[[Arrays], Layout], stay: Callable[[float], None]
    ) -> Part:
        """Train on the shards of `node` for what is left of the round; return the difference it makes.

        settle: told the difference, gives its layout. stay: called before each step with the seconds it may take; what it
        raises leaves this object such that the next call goes on there.
        """
        if self.round != round_:
            self.begin(round_)
        start = without_outer(weights)
        steps = self.rounds.spec.local_steps
        while self.step < steps:
            stay(self.pace.next_s)
            self._step(round_ * steps + self.step, node, {**start, **self.inner})
        kinds = {name: start[name].dtype.type for name in self.names}  # of the weights, whatever the gradients have
        arrays = {name: np.asarray((start[name] - self.inner[name]) * kind(self.n), kind) for name, kind in kinds.items()}
        shards = node[1] - node[0]
        part = Part(node, settle(arrays).flatten(arrays), self.loss, self.n, (self.took_s / shards,) * shards)
        self.begin(round_ + 1, {name: values for name, values in self.inner.items() if name not in self.names})
        return part

    def begin(self, round_: int, inner: Arrays | None = None) -> None:
        """Stand before a round with these arrays of one's own; without any: as the program built them."""
        self.round, self.step, self.inner = round_, 0, inner or {}
        self.names, self.loss, self.n, self.took_s = (), 0.0, 0, 0.0

    def go_on(self, step: int, names: tuple[str, ...], loss: float, n: int, took_s: float) -> None:
        """Stand after so many steps of the round, with what they gave."""
        self.step, self.names, self.loss, self.n, self.took_s = step, names, loss, n, took_s

    def _step(self, step: int, node: Node, weights: Arrays) -> None:
        began = self.rounds.timer()
        total, loss, n = self._gradient(step, node, weights)
        for name in total:
            if name not in weights or not np.issubdtype(weights[name].dtype, np.floating):
                raise SpecError(
                    f"local_steps exchange weights of floats, those that occur in the gradient; {name!r} is "
                    f"{f'of dtype {weights[name].dtype}' if name in weights else 'not among the weights'}"
                )
        following = self.rounds.update(step, weights, Sum(total, loss, n, True, ()))
        self.inner, self.names = following, tuple(total)
        self.step += 1
        self.loss += loss
        self.n += n
        seconds = self.rounds.timer() - began
        self.took_s += seconds
        self.pace.note(seconds)

    def _gradient(self, step: int, node: Node, weights: Arrays) -> tuple[Arrays, float, int]:
        total, loss, n, _ = self.rounds.gradient(step, node[0], weights)
        for shard in range(node[0] + 1, node[1]):
            if shard == node[0] + 1:
                total = {name: np.array(values) for name, values in total.items()}  # the program may use its memory again
            more, more_loss, more_n, _ = self.rounds.gradient(step, shard, weights)
            for name, values in more.items():
                np.add(total[name], values, out=total[name])
            loss, n = loss + more_loss, n + more_n
        return total, loss, n


def outer_step(weights: Arrays, total: Sum, *, rate: float, momentum: float, averaged: frozenset[str] = frozenset()) -> Arrays:
    """Return the weights after the outer step, its momentum among them. averaged: what takes the mean as it is."""
    following = dict(weights)
    for name, summed in total.arrays.items():
        mean = summed / summed.dtype.type(total.n)
        if name in averaged:
            following[name] = np.asarray(weights[name] - mean)
            continue
        before = weights.get(OUTER + name)
        after = mean if before is None else momentum * before + mean
        following[name] = np.asarray(weights[name] - rate * (mean + momentum * after))
        following[OUTER + name] = np.asarray(after)
    return following


def differences_of(gradient: Arrays, weights: Arrays) -> Arrays:
    """Return arrays that look like the differences that are exchanged where the gradient has these names."""
    return {name: weights[name] for name in gradient}


def without_outer(weights: Arrays) -> Arrays:
    """Return the weights as the program knows them."""
    return {name: values for name, values in weights.items() if not name.startswith(OUTER)}


def checksum(weights: Arrays) -> int:
    """Return 32 bits that differ, but for chance, between two workers whose shared weights do."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(np.ascontiguousarray(weights[name]).reshape(-1).view(np.uint8).data, crc)
    return crc
