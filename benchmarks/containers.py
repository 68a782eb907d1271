"""What the benchmarks of containers share: an engine of their own, a runtime on it, start specs. Not a benchmark."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import docker_engine

from benchmarks.harness import Skip
from tenure.protocols import Exit, RuntimeHandle, StartSpec, SystemClock
from tenure.resources import Envelope
from tenure.runtimes.container import ContainerRuntime

CLOCK = SystemClock()
MIB = 1 << 20
TENANT = "alice"


class World:
    """A fresh engine and a container runtime on it."""

    def __init__(self, engine: docker_engine.Engine, runtime: ContainerRuntime, folder: Path) -> None:
        self.engine, self.runtime, self.folder = engine, runtime, folder
        self._number = 0

    def spec(
        self, *argv: str, tenant: str = TENANT, lease: str = "", envelope: Envelope | None = None, **more: Any
    ) -> StartSpec:
        """Return the spec of one more lease."""
        self._number += 1
        lease = lease or f"lease-{self._number}"
        worker = self.folder / "workers" / lease
        return StartSpec(
            lease_id=lease,
            fence=1,
            attempt=1,
            argv=argv,
            workdir=str(worker),
            worker_dir=str(worker),
            log_path=str(self.folder / "logs" / f"{lease}.log"),
            envelope=envelope or Envelope(cpus=1.0, memory_bytes=256 * MIB, disk_bytes=256 * MIB),
            deadline_boot_s=CLOCK.boot_s() + 600,
            boot_id=CLOCK.boot_id(),
            network=f"tenant:{tenant}",
            **more,
        )

    def start(self, *argv: str, **more: Any) -> RuntimeHandle:
        """Start one more lease."""
        return self.runtime.start(self.spec(*argv, **more))

    def end(self, handle: RuntimeHandle, *, stop: bool = True) -> Exit:
        """End a lease, or wait for its own end, and forget it."""
        if stop:
            self.runtime.stop(handle, grace_s=0, fence=1)
        ended = self.runtime.wait(handle, 60)
        assert ended is not None, f"{handle.lease_id} did not end"
        self.runtime.forget(handle.lease_id)
        return ended

    def container(self, handle: RuntimeHandle) -> dict[str, Any]:
        """Return what the engine says of a lease's container."""
        return self.engine.inspect(self.name(handle.lease_id))

    def name(self, lease: str) -> str:
        """Return the name of a lease's container."""
        (found,) = [each for each in self.engine.containers() if each["Labels"].get("tenure.lease") == lease]
        return str(found["Names"][0]).lstrip("/")


@contextlib.contextmanager
def _can_run(engine: docker_engine.Engine) -> Iterator[None]:
    if why := docker_engine.why_no_container(engine):
        raise Skip(why)
    yield


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Give a world until the end. Raises Skip where no engine can be started."""
    if why := docker_engine.why_absent():
        raise Skip(why)
    try:
        with docker_engine.running() as engine, _can_run(engine), tempfile.TemporaryDirectory(prefix="tenure-bench-") as folder:
            runtime = ContainerRuntime(Path(folder) / "state", socket=str(engine.socket))
            try:
                yield World(engine, runtime, Path(folder))
                for handle in runtime.list():
                    runtime.stop(handle, grace_s=0, fence=1)
                    runtime.wait(handle, 30)
            finally:
                runtime.close()
    except docker_engine.CannotStart as error:
        raise Skip(f"a Docker Engine does not start here: {error}") from error
