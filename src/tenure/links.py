"""A declared link: the rate, delay and loss of the network between two parties, as a job asks for it.

It reads ``rate=1Gbit,delay=20ms,loss=0.1%`` and prints the same way: ``parse_link(link.describe()) == link``.
Not here: how it is made (`experiments.links`), what follows from it (`decide.links`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from tenure.errors import SpecError
from tenure.resources import format_duration, parse_duration

RATE_UNITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9}
MIN_RATE_BIT_S, MAX_RATE_BIT_S = 1e4, 1e12
MAX_DELAY_S = 10.0
LARGE_MTU, SMALL_MTU = 65_520, 1_500
"""Bytes of a packet: as large as IPv4 allows (less what keeps it a multiple of 16), and Ethernet's."""
MIN_MTU = 576
"""What every IPv4 host takes (RFC 791)."""

_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")
_LOSS = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%?)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredLink:
    """What a link does to packets. Each direction has its own rate, delay and loss; both are alike."""

    rate_bit_s: float = 0.0
    """Bits per second, the packets' headers included; 0: as fast as the machine."""
    delay_s: float = 0.0
    """One way, of each direction, beside what sending at `rate_bit_s` takes: a ping takes twice as long."""
    loss: float = 0.0
    """Probability that a packet is lost, each by itself; 0 to 0.5."""
    mtu: int = 0
    """Bytes of a packet, headers included; 0: `LARGE_MTU`, or with loss, which counts packets, `SMALL_MTU`."""

    def __post_init__(self) -> None:
        if self.rate_bit_s and not MIN_RATE_BIT_S <= self.rate_bit_s <= MAX_RATE_BIT_S:
            raise SpecError(f"link.rate must lie between 10kbit and 1000Gbit; found {format_rate(self.rate_bit_s)}")
        if not 0 <= self.delay_s <= MAX_DELAY_S:
            raise SpecError(f"link.delay must lie between 0 and 10s; found {self.delay_s!r} s")
        if not 0 <= self.loss <= 0.5:
            raise SpecError(f"link.loss must lie between 0 and 50%; found {self.loss!r}")
        if self.mtu and not MIN_MTU <= self.mtu <= LARGE_MTU:
            raise SpecError(f"link.mtu must lie between {MIN_MTU} and {LARGE_MTU} bytes; found {self.mtu!r}")

    @property
    def packet_bytes(self) -> int:
        """The MTU that holds."""
        return self.mtu or (SMALL_MTU if self.loss else LARGE_MTU)

    @property
    def shapes(self) -> bool:
        """Whether anything is slower or lost."""
        return bool(self.rate_bit_s or self.delay_s or self.loss)

    def describe(self) -> str:
        """Return it in the form that `parse_link` reads; empty when nothing is declared."""
        parts = {
            "rate": format_rate(self.rate_bit_s) if self.rate_bit_s else "",
            "delay": format_duration(self.delay_s) if self.delay_s else "",
            "loss": format_loss(self.loss) if self.loss else "",
            "mtu": str(self.mtu or ""),
        }
        return ",".join(f"{name}={value}" for name, value in parts.items() if value)

    def __str__(self) -> str:
        """Return it for tables, such as ``1Gbit 20ms 0.1%``."""
        return " ".join(part.partition("=")[2] if "mtu" not in part else part for part in self.describe().split(","))


def parse_link(text: str) -> DeclaredLink:
    """Return the link of ``rate=1Gbit,delay=20ms,loss=0.1%,mtu=1500``, each part optional. Raises SpecError."""
    known = {"rate": parse_rate, "delay": parse_duration, "loss": parse_loss, "mtu": _parse_mtu}
    names = dict(zip(known, (field.name for field in fields(DeclaredLink)), strict=True))
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or key not in known or names[key] in found:
            wrong = "is named twice" if key in known and equals else "was expected, each once"
            raise SpecError(f"a link is rate=, delay=, loss=, mtu=, such as rate=1Gbit,delay=20ms; {part!r} {wrong}")
        found[names[key]] = known[key](value)
    return DeclaredLink(**found)  # type: ignore[arg-type]


def parse_rate(text: str | float) -> float:
    """Return bits per second from ``1Gbit``, ``200Mbit`` (per second, decimal as networks count) or a bare number."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text)
    match = _RATE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2] not in RATE_UNITS:
        raise SpecError(f"a rate was expected, such as 1Gbit; found {text!r}; units: {', '.join(RATE_UNITS)} (per second)")
    return float(match[1]) * RATE_UNITS[match[2]]


def format_rate(rate_bit_s: float) -> str:
    """Return a rate with the largest unit that parses back to the same number."""
    for unit, factor in reversed(RATE_UNITS.items()):
        text = f"{rate_bit_s / factor:.12g}"
        if rate_bit_s >= factor and "e" not in text and float(text) * factor == rate_bit_s:
            return f"{text}{unit}"
    return f"{rate_bit_s!r}bit"


def parse_loss(text: str | float) -> float:
    """Return a probability from ``0.1%`` or ``0.001``."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text)
    match = _LOSS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise SpecError(f"a share of packets was expected, such as 0.1%; found {text!r}")
    return float(match[1]) / (100.0 if match[2] else 1.0)


def format_loss(loss: float) -> str:
    """Return a probability in percent, or bare where percent would not parse back to the same number."""
    text = f"{loss * 100:.12g}%"
    return text if "e" not in text and parse_loss(text) == loss else f"{loss:.17f}".rstrip("0")


def _parse_mtu(text: str) -> int:
    if not text.strip().isdigit():
        raise SpecError(f"link.mtu is a whole number of bytes, such as 1500; found {text!r}")
    return int(text)
