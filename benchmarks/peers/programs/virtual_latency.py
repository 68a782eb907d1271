"""A server that computes nothing and answers each request a seeded time later: the same for whoever sends to it.

`VirtualServer.answer_s` is told when the next request arrived, and says when its answer is due. No clock of its own, so it can
be asked in virtual time as well as by the programs beside it (`virtual_http`, `loadgen_server`).
"""

import numpy as np

KINDS = ("log_normal", "two_ways", "wandering", "queue", "frozen")
MORE = 64
"""Requests beyond those of the schedule that are known beforehand: a generator may add a few."""
FREEZE_EVERY_S = 0.8
FREEZE_AT_S = 0.4
FREEZE_S = 0.15


class VirtualServer:
    """One server. kind: of `KINDS`. rate_per_s: what will come, for `queue`. requests: how many at most, but `MORE`."""

    def __init__(self, kind, seed, requests, rate_per_s):
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        n = requests + MORE
        self._kind, self._next, self._free_s, self._first_s = kind, 0, 0.0, None
        normal = rng.normal(size=n)
        if kind == "two_ways":
            slow = rng.random(n) < 0.03
            self._delay_s = np.where(slow, 0.12, 0.03) * np.exp(0.2 * normal)
        elif kind == "wandering":
            chain = np.empty(n)
            last = normal[0]
            for place in range(n):
                last = 0.95 * last + np.sqrt(1 - 0.95**2) * normal[place]
                chain[place] = last
            self._delay_s = 0.04 * np.exp(0.4 * chain)
        elif kind == "queue":
            self._delay_s = rng.exponential(rng.uniform(0.6, 0.9) / rate_per_s, n)
        else:
            self._delay_s = 0.04 * np.exp(0.4 * normal)
        self._delay_s = self._delay_s.tolist()

    def answer_s(self, arrived_s):
        """Return when the request that arrived now is answered. Call it in order of arrival."""
        if self._first_s is None:
            self._first_s = arrived_s
        delay_s = self._delay_s[self._next]
        self._next += 1
        if self._kind == "queue":
            self._free_s = max(self._free_s, arrived_s) + delay_s
            return self._free_s + 0.04
        done_s = arrived_s + delay_s
        if self._kind == "frozen":
            phase_s = (done_s - self._first_s) % FREEZE_EVERY_S - FREEZE_AT_S
            if 0 <= phase_s < FREEZE_S:
                done_s += FREEZE_S - phase_s
        return done_s
