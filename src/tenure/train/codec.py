"""Fewer bytes for a vector of floats: 8-bit blocks, or the largest values of each chunk; with error feedback.

A vector is cut into units of `unit_values` values, the last one filled up with zeros; each unit becomes `unit_bytes` bytes,
whatever is in it. So a slice of the vector that begins at a unit is a slice of the bytes, and decodes alone.

    int8          252 values  ->  float32 scale | 252 × int8                                    256 bytes   (3.9 × fewer)
    topk:<share>  4096 values ->  float32 scale | k × uint16 place | k × float16 value / scale  4 + 4 k bytes

k is share × 4096, rounded up. What a codec leaves out is not lost with `Feedback`: it is added to the next vector (Seide
et al. 2014; Karimireddy et al. 2019 show that then also top-k converges). NaN and infinity make their whole unit NaN where it
has values: they never disappear. Pure functions of NumPy arrays; the same bytes on every machine, except that which of
several equal magnitudes top-k keeps is NumPy's choice. Not here: files (`records`), and when to encode (`rounds`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tenure.jobs import parse_codec

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

CHUNK_VALUES = 4096
"""Values that top-k chooses from at once; their places fit 16 bits."""
_LEAST = np.float32(2.0**-119)
"""Units whose largest magnitude is smaller become zeros: their scale would be no normal float."""
_MAX_STEP = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
"""So that 127 steps stay finite."""
_UNITS_AT_ONCE = 256


class Codec(Protocol):
    """Turns vectors into fewer bytes and back."""

    @property
    def name(self) -> str:
        """As in a job file."""
        ...

    @property
    def unit_values(self) -> int:
        """Values that are encoded together."""
        ...

    @property
    def unit_bytes(self) -> int:
        """Bytes that they become."""
        ...

    def encode(self, values: Floats) -> Bytes:
        """Return the bytes of a vector of n values: shape (ceil(n / unit_values) × unit_bytes,)."""
        ...

    def decode(self, data: Bytes, n: int) -> Floats:
        """Return the first n values of some units. Raises ValueError when these are not the units of n values."""
        ...


@dataclass(frozen=True, slots=True)
class Int8:
    """Blocks of 252 values, each rounded to a whole number of steps, -127 to 127; zero stays zero.

    A step is the block's largest magnitude / 127; a decoded value is off by at most 0.5001 steps. A block whose largest
    magnitude is below 2^-119 becomes zeros.
    """

    name: str = "int8"
    unit_values: int = 252
    unit_bytes: int = 256

    def encode(self, values: Floats) -> Bytes:
        """See Codec."""
        return _encode(values, self, self._write)

    def _write(self, units: Floats, coded: Bytes) -> None:
        step = np.minimum(_largest(units) / np.float32(127), _MAX_STEP)
        coded[:, :4] = step[:, None].view(np.uint8)
        with np.errstate(invalid="ignore"):  # a NaN becomes any number of steps: its block's step is NaN
            steps = units / _divisor(step)
            coded[:, 4:] = np.rint(steps, out=steps).astype(np.int8).view(np.uint8)

    def decode(self, data: Bytes, n: int) -> Floats:
        """See Codec."""
        coded = _coded(data, n, self)
        step = np.ascontiguousarray(coded[:, :4]).view(np.float32)
        steps = coded[:, 4:].view(np.int8)
        return _first(steps * step, n)


@dataclass(frozen=True, slots=True)
class TopK:
    """The k values of largest magnitude of each chunk of 4096; the others become zero.

    A kept value is off by at most 0.0005 of itself plus 2^-25 of the chunk's largest magnitude; a chunk whose largest
    magnitude is below 2^-119 becomes zeros.
    """

    share: float
    """Part that is kept, above 0, at most 1."""
    unit_values: int = CHUNK_VALUES

    @property
    def name(self) -> str:
        """See Codec."""
        return f"topk:{self.share:g}"

    @property
    def kept(self) -> int:
        """Values kept of each chunk."""
        return math.ceil(self.share * self.unit_values)

    @property
    def unit_bytes(self) -> int:
        """See Codec."""
        return 4 + 4 * self.kept

    def encode(self, values: Floats) -> Bytes:
        """See Codec."""
        return _encode(values, self, self._write)

    def _write(self, units: Floats, coded: Bytes) -> None:
        k = self.kept
        places = np.sort(np.argpartition(np.abs(units), -k, axis=1)[:, -k:], axis=1)
        scale = _largest(units)
        with np.errstate(invalid="ignore"):  # NaN and infinity: their chunk's scale is NaN
            shares = (np.take_along_axis(units, places, axis=1) / _divisor(scale)).astype(np.float16)
        coded[:, :4] = scale[:, None].view(np.uint8)
        coded[:, 4 : 4 + 2 * k] = places.astype(np.uint16).view(np.uint8)
        coded[:, 4 + 2 * k :] = shares.view(np.uint8)

    def decode(self, data: Bytes, n: int) -> Floats:
        """See Codec."""
        coded, k = _coded(data, n, self), self.kept
        scale = np.ascontiguousarray(coded[:, :4]).view(np.float32)
        places = np.ascontiguousarray(coded[:, 4 : 4 + 2 * k]).view(np.uint16)
        shares = np.ascontiguousarray(coded[:, 4 + 2 * k :]).view(np.float16)
        units = np.zeros((len(coded), self.unit_values), dtype=np.float32)
        np.put_along_axis(units, places.astype(np.int64), shares.astype(np.float32) * scale, axis=1)
        return _first(units, n)


@dataclass(slots=True)
class Feedback:
    """What a codec left out so far of one sender's vectors, and goes into the next one."""

    codec: Codec
    residual: Floats = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """Same length as the vectors; empty: nothing was left out yet."""

    def encode(self, values: Floats) -> tuple[Bytes, Floats]:
        """Return the bytes to send for `values` plus the residual, and the residual that then remains.

        Changes nothing: set `residual` to the second once the bytes are published, and only if they are this sender's.
        Raises ValueError when the residual has another length.
        """
        if len(self.residual) and self.residual.shape != values.shape:
            raise ValueError(f"the residual has {len(self.residual)} values, the vector {len(values)}")
        wanted = values + self.residual if len(self.residual) else np.asarray(values, dtype=np.float32)
        data = self.codec.encode(wanted)
        with np.errstate(invalid="ignore"):  # infinity less infinity: the training ends for it
            return data, wanted - self.codec.decode(data, len(wanted))


def make_codec(name: str) -> Codec | None:
    """Return the codec that a job file names; None for "none". Raises SpecError for an unknown one."""
    kind, share = parse_codec(name)
    if kind == "none":
        return None
    return Int8() if kind == "int8" else TopK(share)


def units_of(codec: Codec, n: int) -> int:
    """Return how many units n values have."""
    return -(-n // codec.unit_values)


def _encode(values: Floats, codec: Codec, write: Callable[[Floats, Bytes], None]) -> Bytes:
    """Return the bytes of a vector, some units at a time: what is computed on the way then stays in the CPU's cache."""
    units = _units(values, codec.unit_values)
    coded = np.empty((len(units), codec.unit_bytes), dtype=np.uint8)
    for at in range(0, len(units), _UNITS_AT_ONCE):
        write(units[at : at + _UNITS_AT_ONCE], coded[at : at + _UNITS_AT_ONCE])
    return coded.reshape(-1)


def _units(values: Floats, unit: int) -> Floats:
    """Return the vector as rows of `unit` values, copied only to be filled up."""
    plain = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    if missing := -len(plain) % unit:
        plain = np.concatenate([plain, np.zeros(missing, dtype=np.float32)])
    return plain.reshape(-1, unit)


def _largest(units: Floats) -> Floats:
    """Return each row's largest magnitude: 0 where it is too small to be a scale, NaN where it is not finite."""
    largest = np.maximum(units.max(axis=1), -units.min(axis=1))
    largest[largest < _LEAST] = 0
    largest[~np.isfinite(largest)] = np.nan
    found: Floats = largest
    return found


def _divisor(scale: Floats) -> Floats:
    """Return the scale as a column that can be divided by: 1 in place of 0."""
    found: Floats = np.where(scale == 0, np.float32(1), scale)[:, None]
    return found


def _coded(data: Bytes, n: int, codec: Any) -> Bytes:
    if data.size != units_of(codec, n) * codec.unit_bytes:
        raise ValueError(
            f"{n} values have {units_of(codec, n) * codec.unit_bytes} bytes in codec {codec.name}; found {data.size}"
        )
    return data.reshape(-1, codec.unit_bytes)


def _first(units: NDArray[Any], n: int) -> Floats:
    found: Floats = units.reshape(-1)[:n]
    return found
