"""Runs a torch program on a CUDA device: pinned staging, one captured graph per batch size, half precision.

A captured graph replays a whole model with one launch, but for one size only. So sizes are powers of two; a batch goes
into the next larger one, and what comes out for the rows beyond it is dropped. Programs that cannot be captured (they
wait for a value of the device), and batches larger than the largest graph, run operator by operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tenure.serve.engines import Setting

MAX_ROWS = 64
"""Largest graph where nobody says how large a batch can be."""
Call = Callable[[Sequence[Any]], list[Any]]


def prepared(torch: Any, program: Any, setting: Setting) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """Return the program where it is to run, and what its calls are wrapped in.

    fp16: autocast chooses per operator; weights of two dimensions or more are halved once instead of in every call.
    """
    if setting.device == "cpu":
        return program, contextlib.nullcontext
    from torch.export.passes import move_to_device_pass

    program = move_to_device_pass(program, setting.device)
    if setting.precision != "fp16":
        return program, contextlib.nullcontext
    halve(torch, program.state_dict)
    return program, lambda: torch.autocast("cuda", dtype=torch.float16, cache_enabled=False)


def halve(torch: Any, state: dict[str, Any]) -> None:
    """Turn float32 weights of two dimensions or more into float16, in place; vectors (norms, biases) stay."""
    for name, tensor in state.items():
        if tensor.dtype == torch.float32 and tensor.dim() >= 2:
            half = tensor.detach().half()
            state[name] = torch.nn.Parameter(half, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else half


class Cuda:
    """What a runner needs of a device; a test has one of its own."""

    def __init__(self, torch: Any, device: str) -> None:
        self._torch, self._device = torch, torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._pool: Any = None

    def host(self, shape: Sequence[int], dtype: Any) -> Any:
        """Return memory of the host that the device reads and writes by itself."""
        return self._torch.empty(shape, dtype=dtype, pin_memory=True)

    def device(self, shape: Sequence[int], dtype: Any) -> Any:
        """Return zeroed memory of the device."""
        return self._torch.zeros(shape, dtype=dtype, device=self._device)

    def upload(self, tensor: Any) -> Any:
        """Return a copy on the device."""
        return tensor.to(self._device)

    def using(self) -> AbstractContextManager[Any]:
        """Order what follows on the runner's stream."""
        return self._torch.cuda.stream(self._stream)  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Wait for what was ordered."""
        self._stream.synchronize()

    def captured(self, run: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
        """Return a replay of `run`, and the tensors that it writes. Raises RuntimeError for what cannot be captured."""
        for _ in range(3):  # libraries choose their kernels in the first calls
            run()
        self.wait()
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            found = run()
        self._pool = graph.pool()
        return graph.replay, found


@dataclass(slots=True)
class _Size:
    """A captured batch size and its memory."""

    rows: int
    host_inputs: list[Any]
    inputs: list[Any]
    replay: Callable[[], None]
    outputs: list[Any]
    host_outputs: list[Any]


class GraphRunner:
    """Calls a program on a device. One call at a time."""

    def __init__(self, device: Cuda, call: Call) -> None:
        self._device, self._call = device, call
        self._sizes: list[_Size] = []

    def capture(self, inputs: Sequence[tuple[Sequence[int], Any]], max_rows: int) -> None:
        """Make graphs for 1, 2, 4 ... up to `max_rows` rows or more. inputs: shape past the rows, and type."""
        rows = 1 << (max_rows - 1).bit_length()
        try:
            while rows:  # the largest first: the others fit into its memory
                self._sizes.insert(0, self._captured(inputs, rows))
                rows //= 2
        except RuntimeError:
            self._sizes = []  # operator by operator, then

    def run(self, tensors: Sequence[Any]) -> list[Any]:
        """Return the outputs on the host, as tensors of their own."""
        rows = tensors[0].shape[0] if tensors[0].dim() else 0
        size = next((size for size in self._sizes if size.rows >= rows > 0), None)
        with self._device.using():
            if size is None:
                return [tensor.cpu() for tensor in self._call([self._device.upload(tensor) for tensor in tensors])]
            for tensor, host, place in zip(tensors, size.host_inputs, size.inputs, strict=True):
                host[:rows].copy_(tensor)
                place[:rows].copy_(host[:rows], non_blocking=True)
            size.replay()
            for host, found in zip(size.host_outputs, size.outputs, strict=True):
                host[:rows].copy_(found[:rows], non_blocking=True)
            self._device.wait()
            return [host[:rows].clone() for host in size.host_outputs]

    def _captured(self, inputs: Sequence[tuple[Sequence[int], Any]], rows: int) -> _Size:
        device = self._device
        host_inputs = [device.host((rows, *shape), dtype) for shape, dtype in inputs]
        with device.using():
            places = [device.device((rows, *shape), dtype) for shape, dtype in inputs]
            replay, outputs = device.captured(lambda: self._call(places))
        if any(not found.dim() or found.shape[0] != rows for found in outputs):
            raise RuntimeError("an output has not one row for each row")
        return _Size(rows, host_inputs, places, replay, outputs, [device.host(found.shape, found.dtype) for found in outputs])
