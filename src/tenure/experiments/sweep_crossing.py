"""What the link between the two nodes of an experiment did while one cell ran: how full it was, what its forwarder used."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tenure.experiments import links, netns


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossed:
    """What the link between the nodes did during a cell."""

    busy: float = 0.0
    """Share of its declared rate that the busier direction carried; 0 where none is declared."""
    forwarder_cpu_s: float = 0.0
    forwarder_memory_bytes: float = 0.0
    """0 without a forwarder."""
    invalid: tuple[str, ...] = ()
    """Why it was not as declared; empty: it was."""


class Crossing:
    """Counts what crosses the link during one cell after the other."""

    def __init__(self, joined: links.Joined) -> None:
        self._joined = joined
        shown = netns.run_ip("-o", "addr", "show", "to", joined.near)
        self._device = Path("/sys/class/net") / shown.split()[1].split("@")[0] / "statistics"
        self.begin()

    def begin(self) -> None:
        """Take the counters before a cell."""
        self._carried, self._bytes, self._at_s = self._joined.carried(), self._counted(), time.monotonic()

    def end(self) -> Crossed:
        """Return what crossed since `begin`."""
        span_s, after = time.monotonic() - self._at_s, self._counted()
        rate_bit_s = self._joined.declared.rate_bit_s
        most = max(now - then for now, then in zip(after, self._bytes, strict=True))
        carried = self._joined.carried()
        return Crossed(
            busy=min(1.0, most * 8 / (rate_bit_s * span_s)) if rate_bit_s else 0.0,
            forwarder_cpu_s=carried.cpu_s - self._carried.cpu_s if carried and self._carried else 0.0,
            forwarder_memory_bytes=float(carried.memory_bytes) if carried else 0.0,
            invalid=self._joined.judge(self._carried),
        )

    def _counted(self) -> tuple[int, int]:
        return int((self._device / "rx_bytes").read_text()), int((self._device / "tx_bytes").read_text())
