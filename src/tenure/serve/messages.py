"""One inference request and its answer, decoded: what doors, data plane and clients hand each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tenure.serve.tensors import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """One decoded request."""

    model: str
    version: str = ""
    id: str = ""
    inputs: Mapping[str, Array]
    outputs: Sequence[str] = ()
    """Names asked for; none means all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferAnswer:
    """One answer, its outputs in the model's order."""

    model: str
    version: str
    id: str = ""
    outputs: Mapping[str, Array]
