"""A model in this process: the study's "simple" architecture. One call at a time; async calls wait in one thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tenure.serve.engines import load_engine
from tenure.serve.tensors import Array, ModelMetadata, check_inputs, check_outputs
from tenure.serve.transports import Stages


class InProcess:
    """See Transport."""

    def __init__(self, path: str, *, threads: int) -> None:
        self._path = Path(path)
        self._engine = load_engine(self._path, threads=threads)
        self._one_call = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    def metadata(self, name: str) -> ModelMetadata:
        """See Transport."""
        engine = self._engine
        return ModelMetadata(
            name=name or self._path.stem,
            versions=("1",),
            platform=engine.platform,
            inputs=engine.inputs,
            outputs=engine.outputs,
        )

    def ready(self) -> bool:
        """See Transport."""
        return True

    def infer(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        check_inputs(inputs, self._engine.inputs)
        check_outputs(outputs, self._engine.outputs)
        with self._one_call:
            started_at_s = time.perf_counter()
            found = self._engine.infer(inputs, outputs)
            return found, Stages(0.0, time.perf_counter() - started_at_s, 0.0)

    async def infer_async(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.infer, name, inputs, outputs)

    def close(self) -> None:
        """See Transport."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._engine.close()

    async def close_async(self) -> None:
        """See Transport."""
        self.close()
