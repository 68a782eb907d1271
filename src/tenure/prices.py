"""What a held resource costs: price vectors, and the table of them with sources and dates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tenure.resources import Envelope

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceVector:
    """Prices of one offer. Cost = envelope x held time x this vector."""

    name: str
    cpu_usd_per_hour: float = 0.0
    memory_usd_per_gib_hour: float = 0.0
    gpu_usd_per_hour: float = 0.0
    start_usd: float = 0.0
    """Per start of an invocation (function services bill requests)."""
    source: str = ""
    date: str = ""

    def cost_usd(self, envelope: Envelope, held_s: float, *, starts: int = 0) -> float:
        """Return what holding one envelope for `held_s` seconds costs, in USD."""
        per_hour = (
            envelope.cpus * self.cpu_usd_per_hour
            + envelope.memory_bytes / GIB * self.memory_usd_per_gib_hour
            + envelope.gpus * self.gpu_usd_per_hour
        )
        return per_hour * held_s / 3600.0 + starts * self.start_usd


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine type that a cloud rents out whole."""

    name: str
    cpus: float
    memory_bytes: int
    gpus: int
    gpu_model: str
    usd_per_hour: float
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """All offers known. `default` prices owned machines; the user's own file goes first."""

    vectors: Mapping[str, PriceVector]
    machines: Mapping[str, Machine]
    default: str

    @property
    def owned(self) -> PriceVector:
        """The vector for the machines at hand."""
        return self.vectors[self.default]
