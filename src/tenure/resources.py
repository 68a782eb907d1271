"""What can be leased, in which amounts: quantities, envelopes, capacities.

Sizes read ``512MiB`` and times ``15min``, and print the same way: ``parse(format(x)) == x`` for every legal x.
Not here: what a thing costs (`prices`), who holds it (`leases`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from tenure.errors import SpecError

Bound = Literal["exact", "upper", "advisory"]
"""How a runtime holds one bound: `exact`; `upper` (held, but coarser or later); `advisory` (watched, can be overrun)."""

GpuParts = Literal["", "mps", "polled", "declared"]
"""How a part of a device is held: by CUDA's Multi-Process Service; by looking at who holds how much; not at all."""

BYTE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DECIMAL_BYTE_UNITS = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DURATION_UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
MAX_BYTES = 1 << 60
MAX_DURATION_S = 10 * 365 * 86400.0


def parse_bytes(text: str | int) -> int:
    """Return a size in bytes from ``"512MiB"``, ``"1.5GiB"``, ``"2GB"`` or a bare whole number.

    Raises SpecError for anything else, for negative sizes, and above 1 EiB.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise SpecError(f"a size was expected, such as 512MiB; found {text!r}")
    if isinstance(text, int):
        value = float(text)
    else:
        match = _QUANTITY.fullmatch(text)
        units = BYTE_UNITS | _DECIMAL_BYTE_UNITS
        if match is None or (match[2] or "B") not in units:
            raise SpecError(f"a size was expected, such as 512MiB; found {text!r}; units: {', '.join(units)}")
        unit = units[match[2] or "B"]
        if match[1].isdigit():
            return _checked_bytes(int(match[1]) * unit, text)
        value = float(match[1]) * unit
    return _checked_bytes(int(text) if isinstance(text, int) else round(value), text)


def _checked_bytes(value: int, text: object) -> int:
    if not 0 <= value <= MAX_BYTES:
        raise SpecError(f"a size must lie between 0 and {format_bytes(MAX_BYTES)}; found {text!r}")
    return value


def format_bytes(size_bytes: int) -> str:
    """Return a size with the largest binary unit that divides it: exact, so that it parses back to the same number."""
    for unit, factor in reversed(BYTE_UNITS.items()):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def show_bytes(size_bytes: float) -> str:
    """Return a size rounded for people, e.g. ``93.2 MiB``. Does not parse back exactly."""
    for unit, factor in reversed(BYTE_UNITS.items()):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}" if factor > 1 else f"{size_bytes:.0f} B"
    return f"{size_bytes:.0f} B"


def parse_duration(text: str | float) -> float:
    """Return seconds from ``"15min"``, ``"250ms"``, ``"1.5h"``, or a bare number of seconds.

    Raises SpecError for anything else, for negative times, and above ten years.
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise SpecError(f"a time was expected, such as 15min; found {text!r}")
    if isinstance(text, str):
        match = _QUANTITY.fullmatch(text)
        if match is None or (match[2] or "s") not in DURATION_UNITS:
            raise SpecError(f"a time was expected, such as 15min; found {text!r}; units: {', '.join(DURATION_UNITS)}")
        value = float(match[1]) * DURATION_UNITS[match[2] or "s"]
    else:
        value = float(text)
    if not 0 <= value <= MAX_DURATION_S:  # also refuses NaN
        raise SpecError(f"a time must lie between 0 and 10 years; found {text!r}")
    return value


def format_duration(duration_s: float) -> str:
    """Return a time with the largest unit that gives a whole number and parses back to the same number."""
    for unit, factor in reversed(DURATION_UNITS.items()):
        count = duration_s / factor
        if duration_s and count == math.floor(count) and count * factor == duration_s:
            return f"{int(count)}{unit}"
    return f"{duration_s!r}s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """Bounds of one lease."""

    cpus: float = 1.0
    """CPU share in cores, > 0; may be a fraction."""
    memory_bytes: int = 256 << 20
    """Anonymous + shared + kernel memory of the whole process tree."""
    gpus: float = 0.0
    """Whole devices, or a fraction of one device (0 < gpus < 1)."""
    gpu_memory_bytes: int = 0
    """Device memory, per device."""
    disk_bytes: int = 1 << 30
    """What the job may write in its worker folder."""
    slot_s: float = 900.0
    """How long one invocation may live."""
    total_s: float = 3600.0
    """How long the lease may be renewed for, all slots together."""

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus", "slot_s", "total_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise SpecError(f"envelope.{name} must be a finite number >= 0; found {value!r}")
        for name in ("memory_bytes", "gpu_memory_bytes", "disk_bytes"):
            if not 0 <= getattr(self, name) <= MAX_BYTES:
                raise SpecError(f"envelope.{name} must lie between 0 and 1 EiB; found {getattr(self, name)!r}")
        if self.cpus <= 0:
            raise SpecError("envelope.cpus must be above 0; a lease without CPU cannot run anything")
        if self.memory_bytes < 1 << 20:
            raise SpecError(f"envelope.memory must be at least 1MiB; found {format_bytes(self.memory_bytes)}")
        if self.gpus > 1 and self.gpus != math.floor(self.gpus):
            raise SpecError(f"envelope.gpus above 1 must be whole devices; found {self.gpus!r}")
        if self.slot_s <= 0 or self.total_s < self.slot_s:
            raise SpecError(
                f"envelope.slot must be above 0 and at most envelope.total; found slot {format_duration(self.slot_s)}, "
                f"total {format_duration(self.total_s)}"
            )

    def describe(self) -> str:
        """Return one line for people, e.g. ``1 cpu, 256MiB, slot 15min of 1h``."""
        parts = [f"{self.cpus:g} cpu{'s' if self.cpus != 1 else ''}", show_bytes(self.memory_bytes)]
        if self.gpus:
            parts.append(f"{self.gpus:g} gpu")
        parts.append(f"slot {format_duration(round(self.slot_s, 3))} of {format_duration(round(self.total_s, 3))}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device of a node, or one instance of a device that its owner has divided (MIG)."""

    index: int
    """Among the node's devices; what CUDA counts may differ."""
    model: str = ""
    memory_bytes: int = 0
    uuid: str = ""
    """The driver's name of it, ``GPU-…`` or ``MIG-…``; empty for one that was only declared."""
    instance: bool = False
    """Whether it is an instance, which is leased whole."""
    parts: GpuParts = ""
    """How a part of it is held; empty where nobody has looked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceShare:
    """A lease's part of one device. Shares are tracked per device, never as a sum over devices."""

    index: int
    fraction: float
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a node can lease out."""

    cpus: float
    memory_bytes: int
    disk_bytes: int = 0
    gpus: tuple[Gpu, ...] = field(default=())

    def with_part(self, *, cpus: float | None = None, memory_bytes: int | None = None) -> Capacity:
        """Return a part of this capacity, for several agents on one machine; of what is not named, the same share.

        With 1 of 4 cpus comes a quarter of the memory, and the other way round. Raises SpecError past what there is.
        """
        if cpus is None:
            cpus = self.cpus if memory_bytes is None else self.cpus * memory_bytes / self.memory_bytes
        if memory_bytes is None:
            memory_bytes = int(self.memory_bytes * cpus / self.cpus)
        part = replace(self, cpus=cpus, memory_bytes=memory_bytes)
        if part.cpus > self.cpus or part.memory_bytes > self.memory_bytes:
            raise SpecError(
                f"a node cannot offer more than its machine has ({self.cpus:g} cpus, {format_bytes(self.memory_bytes)}); "
                f"asked {part.cpus:g} cpus, {format_bytes(part.memory_bytes)}"
            )
        return part
