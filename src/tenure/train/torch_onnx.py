"""Writes what a torch module computes as ONNX, with a batch of any size. Needs neither a network nor onnxscript.

Uses the exporter that records the steps of one call (`dynamo=False`): the other one wants packages that Tenure does not.
Not here: loading weights, and the check of labels (`export`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from tenure.errors import SpecError

OPSET = 17


class _Answering(nn.Module):  # type: ignore[misc]
    """Calls a function, as a module that owns the parts which the function uses."""

    def __init__(self, parts: Sequence[nn.Module], answers: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.parts, self._answers = nn.ModuleList(parts), answers

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (labels,) or (labels, probabilities)."""
        return self._answers(x)


def write_onnx(
    parts: Sequence[nn.Module],
    answers: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    example: NDArray[Any],
    path: Path,
    reference: str,
) -> None:
    """Write input ``x`` float32, shaped as `example` but for N; outputs ``label`` [N] and ``probabilities`` [N, classes].

    answers: x to (labels,) or (labels, probabilities), by calling `parts`, which are in evaluation mode. Raises SpecError
    when torch can't write the steps as ONNX.
    """
    whole = _Answering(parts, answers).eval()
    given = torch.tensor(example, dtype=torch.float32)
    with torch.no_grad():
        names = ["label", "probabilities"][: len(whole(given))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter chosen is the older one, and says so
            torch.onnx.export(
                whole,
                (given,),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["x"],
                output_names=names,
                dynamic_axes={name: {0: "N"} for name in ("x", *names)},
            )
    except Exception as error:  # whatever a step of the user's model makes the exporter raise
        raise SpecError(f'program "{reference}" can\'t be written as ONNX: {error}') from error
