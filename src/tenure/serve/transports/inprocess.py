"""A model in this process: the study's "simple" architecture. As many calls at once as instances; the others wait."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tenure.errors import SpecError, TenureError
from tenure.serve.engines import Engine, load_engine
from tenure.serve.tensors import Array, ModelMetadata, check_inputs, check_outputs
from tenure.serve.transports import Stages


class InProcess:
    """See Transport."""

    def __init__(self, path: str, *, threads: int, instances: int = 1) -> None:
        if instances < 1:
            raise SpecError(f"a model needs at least one instance; found instances = {instances}")
        self._path = Path(path)
        self._engines = [load_engine(self._path, threads=threads) for _ in range(instances)]
        self._idle: queue.SimpleQueue[Engine] = queue.SimpleQueue()
        for engine in self._engines:
            self._idle.put(engine)
        self._threads: ThreadPoolExecutor | None = None

    def metadata(self, name: str) -> ModelMetadata:
        """See Transport."""
        engine = self._engines[0]
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
        check_inputs(inputs, self._engines[0].inputs)
        check_outputs(outputs, self._engines[0].outputs)
        engine = self._idle.get()
        try:
            started_at_s = time.perf_counter()
            found = engine.infer(inputs, outputs)
            return found, Stages(0.0, time.perf_counter() - started_at_s, 0.0)
        finally:
            self._idle.put(engine)

    def infer_each(
        self, name: str, many: Iterable[Mapping[str, Array]], outputs: Sequence[str], in_flight: int
    ) -> Generator[dict[str, Array] | TenureError, None, None]:
        """See Transport. One after the other: nothing is gained by more in one process."""
        for inputs in many:
            try:
                found: dict[str, Array] | TenureError = self.infer(name, inputs, outputs)[0]
            except TenureError as error:
                found = error
            yield found

    async def infer_async(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(len(self._engines), thread_name_prefix="model")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.infer, name, inputs, outputs)

    def close(self) -> None:
        """See Transport."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)
        for engine in self._engines:
            engine.close()

    async def close_async(self) -> None:
        """See Transport."""
        self.close()
