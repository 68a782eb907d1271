"""The runtimes of one node as one: a lease's orders go to the runtime that started it. The one place that loads them.

Not for: what a runtime does (`process`, `container`), which of them a job wants (its job file).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenure.errors import TenureError, Unsupported
from tenure.protocols import Clock, Exit, ExitKind, RuntimeHandle, Session, StartSpec, Window
from tenure.resources import Bound, Envelope
from tenure.runtimes.confiner import Confine
from tenure.runtimes.container import ContainerRuntime
from tenure.runtimes.gpus import Gpus
from tenure.runtimes.microvm import MicrovmRuntime
from tenure.runtimes.process import ProcessRuntime
from tenure.runtimes.shimmed import ShimmedRuntime
from tenure.usage import Usage

IMAGE_WAIT_S = 20.0
"""How long an order to start a container waits for the base image, within the time that the broker waits for its answer."""


class Runtimes:
    """All runtimes of a node. `state_dir` is private to it. Raises Unsupported when `confine` can't be had."""

    def __init__(
        self,
        state_dir: Path,
        *,
        confine: Confine = "auto",
        clock: Clock | None = None,
        gpus: Gpus | None = None,
        images_dir: Path | None = None,
    ) -> None:
        """images_dir: where images are found by name (`forms`)."""
        self._process = ProcessRuntime(state_dir, confine=confine, clock=clock, gpus=gpus)
        self._container = ContainerRuntime(
            state_dir / "containers",
            clock=clock,
            fork_server=self._process.fork_server,
            term_dir=state_dir,
            sealed=(str(state_dir.parent),),
            image_wait_s=IMAGE_WAIT_S,
            gpus=gpus,
        )
        self._microvm = MicrovmRuntime(
            state_dir / "microvms",
            images_dir=images_dir,
            confine=confine,
            clock=clock,
            fork_server=self._process.fork_server,
            term_dir=state_dir,
        )
        self._all: tuple[ShimmedRuntime, ...] = (self._process, self._container, self._microvm)

    def close(self) -> None:
        """End what serves starts. Attempts and their shims live on."""
        for runtime in reversed(self._all):
            runtime.close()

    def _of(self, lease_id: str) -> ShimmedRuntime:
        return next((runtime for runtime in self._all if runtime.has(lease_id)), self._process)

    # --- what there is ---

    def _there(self) -> list[ShimmedRuntime]:
        return [self._process, *(each for each in (self._container, self._microvm) if each.available())]

    def describe(self) -> tuple[tuple[str, ...], dict[str, Mapping[str, Bound]], dict[str, str]]:
        """Return the names of those that can be used now, how each holds bounds, and by what means."""
        there = self._there()
        names = tuple(runtime.name for runtime in there)
        return names, {each.name: each.bounds() for each in there}, {each.name: each.confinement() for each in there}

    def known(self) -> Sequence[str]:
        """Return the ids of all leases that any keeps something of, ended ones included."""
        return sorted({lease_id for runtime in self._all for lease_id in runtime.known()})

    def newest_fence(self, lease_id: str) -> int:
        """Return the newest fence seen for a lease. Raises NotFound."""
        return self._of(lease_id).newest_fence(lease_id)

    def prepare(self) -> None:
        """Have made, beside, what a first lease would wait for. Returns at once."""
        self._container.prepare()

    # --- leases: see `protocols.Runtime` ---

    def start(self, name: str, spec: StartSpec) -> RuntimeHandle:
        """Start an attempt in the runtime of this name. Raises Unsupported when there is none, and what that one raises."""
        for runtime in self._all:
            if runtime.name == name:
                return runtime.start(spec)
        raise Unsupported("runtime", f"this node has {', '.join(each.name for each in self._all)}; found {name!r}")

    def attach(self, lease_id: str) -> RuntimeHandle:
        """Return the handle of a lease's last attempt."""
        return self._of(lease_id).attach(lease_id)

    def usage(self, handle: RuntimeHandle) -> Usage:
        """Return the attempt's consumption so far."""
        return self._of(handle.lease_id).usage(handle)

    def samples(self, handles: Sequence[RuntimeHandle]) -> list[tuple[RuntimeHandle, Usage]]:
        """Return what attempts that run use, as their shims last wrote it down; those that cannot be read are left out."""
        found = []
        for handle in handles:
            with contextlib.suppress(TenureError, TypeError, OSError):
                runtime = self._of(handle.lease_id)
                found.append((handle, runtime.sample(handle) or runtime.usage(handle)))
        return found

    def pids(self, handle: RuntimeHandle) -> frozenset[int]:
        """Return the processes of an attempt, as this machine numbers them."""
        return self._of(handle.lease_id).pids(handle)

    def gpu(self, lease_id: str) -> Mapping[str, Any]:
        """Return what a lease's last attempt was given of the node's GPUs. Raises NotFound."""
        return self._of(lease_id).gpu(lease_id)

    def renew(self, handle: RuntimeHandle, *, deadline_boot_s: float, fence: int) -> None:
        """Move the deadline."""
        self._of(handle.lease_id).renew(handle, deadline_boot_s=deadline_boot_s, fence=fence)

    def resize(self, handle: RuntimeHandle, envelope: Envelope, *, fence: int) -> None:
        """Change bounds live."""
        self._of(handle.lease_id).resize(handle, envelope, fence=fence)

    def exec(self, handle: RuntimeHandle, argv: Sequence[str], *, timeout_s: float) -> tuple[int, bytes]:
        """Run a command inside the lease's bounds."""
        return self._of(handle.lease_id).exec(handle, argv, timeout_s=timeout_s)

    def session(self, handle: RuntimeHandle, argv: Sequence[str], *, window: Window | None) -> Session:
        """Begin a command inside the lease's bounds for somebody to talk to."""
        return self._of(handle.lease_id).session(handle, argv, window=window)

    def wait(self, handle: RuntimeHandle, timeout_s: float) -> Exit | None:
        """Return the exit record, or None when the attempt still runs after `timeout_s`."""
        return self._of(handle.lease_id).wait(handle, timeout_s)

    def stop(
        self, handle: RuntimeHandle, *, grace_s: float, fence: int, kind: ExitKind = ExitKind.STOPPED, why: str = ""
    ) -> None:
        """Ask the attempt to leave, and end it after the grace."""
        self._of(handle.lease_id).stop(handle, grace_s=grace_s, fence=fence, kind=kind, why=why)

    def forget(self, lease_id: str) -> None:
        """Remove what is kept of an ended lease."""
        for runtime in self._all:
            runtime.forget(lease_id)
