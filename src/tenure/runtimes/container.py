"""The container runtime: a lease's command in a container of Docker or Podman, through the engine's own API.

For: `protocols.Runtime` on one node with an engine. What it shares with other runtimes (files, orders, exits) is `shimmed`; the
shim (`container_shim`) holds deadline, disk and record, so that they hold while the engine or the agent is down.

Hardened without being asked: nobody is root inside, no capability, no new privileges, the engine's own seccomp profile, a
read-only root with /tmp in memory, a bounded number of processes, a network per tenant (`container_network`), and of this
machine's files only the attempt's and what a job names (`container_checks`). `Usage` counts as for processes, from the
container's groups; the engine's init is not counted as a process.
Not for: building images (`images`), users' own engines on other machines.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenure import codec
from tenure.errors import Refused, SpecError, TenureError, Unavailable, Unsupported
from tenure.protocols import Clock, RuntimeHandle, Session, StartSpec, Window
from tenure.resources import Bound, Envelope
from tenure.runtimes import procfs
from tenure.runtimes.acting import acting_as, actor_of
from tenure.runtimes.base_image import BaseImage
from tenure.runtimes.confine import CPU_PERIOD_US, Confinement
from tenure.runtimes.container_checks import check_container_spec, mounts_of, tenant_of, user_of
from tenure.runtimes.container_engine import Engine, EngineError, find_socket
from tenure.runtimes.container_exec import run_in_container
from tenure.runtimes.container_images import ensure_loaded
from tenure.runtimes.container_network import LABEL, TenantNetworks, close_machine
from tenure.runtimes.container_session import ContainerSession
from tenure.runtimes.environment import container_environment
from tenure.runtimes.forkserver import ForkServer
from tenure.runtimes.gpus import Gpus
from tenure.runtimes.images import USER_ID, own_folder, python_mounts
from tenure.runtimes.rooted import read_image
from tenure.runtimes.seccomp import for_container, profile_of, profile_path
from tenure.runtimes.shimmed import ShimmedRuntime, check_fence
from tenure.runtimes.state import LeaseFiles, read_json
from tenure.usage import Usage

_PING_S = 2.0
_TMPFS = "rw,nosuid,nodev,mode=1777"
_LOG_LIMITS = {"max-size": "32m", "max-file": "2"}
"""Of the engine's own copy of the output, from which the attendant fills the log."""


class ContainerRuntime(ShimmedRuntime):
    """See `protocols.Runtime`. One per node: `state_dir` is private to it. An engine that is not there is asked for again."""

    name = "container"

    def __init__(
        self,
        state_dir: Path | str,
        *,
        clock: Clock | None = None,
        fork_server: ForkServer | None = None,
        term_dir: Path | str | None = None,
        socket: str = "",
        engine_runtime: str = "",
        sealed: Sequence[str] = (),
        base_image: BaseImage | None = None,
        image_wait_s: float = 300.0,
        gpus: Gpus | None = None,
    ) -> None:
        """socket: of the engine; empty: found. engine_runtime: what the engine runs containers with, e.g. ``runsc``.

        sealed: folders of this machine of which no container may see anything, besides those that none ever does.
        image_wait_s: how long a start waits for the base image; it then is Unavailable, and may be ordered again.
        """
        super().__init__(state_dir, clock=clock, fork_server=fork_server, term_dir=term_dir, gpus=gpus)
        self._owner = hashlib.sha256(str(self._state_dir).encode()).hexdigest()[:8]
        self._socket, self._engine_runtime = socket, engine_runtime
        self._sealed = (*sealed, str(self._state_dir))
        self._networks_lock = threading.Lock()
        self._base_image, self._image_wait_s = base_image or BaseImage(), image_wait_s
        self._networks: TenantNetworks | None = None
        with contextlib.suppress(TenureError):
            self._sweep(self._engine())

    # --- the engine ---

    def available(self) -> bool:
        """Return whether an engine answers."""
        try:
            self._engine().call("GET", "/_ping", timeout_s=_PING_S)
        except TenureError:
            return False
        return True

    def _engine(self) -> Engine:
        path = self._socket or find_socket()
        if not path:
            raise Unsupported("runtime", "no container engine has a socket here", "Start Docker or Podman, or use process.")
        return Engine(path)

    def _sweep(self, engine: Engine) -> None:
        """Remove containers of ours whose lease nobody knows any more."""
        for container in (
            engine.call("GET", "/containers/json", all=True, filters=f'{{"label":["{LABEL}={self._owner}"]}}') or []
        ):
            if container["Labels"].get("tenure.lease") not in self.known():
                with contextlib.suppress(EngineError):
                    engine.call("DELETE", f"/containers/{container['Id']}", force=True, v=True)

    def _container(self, lease_id: str, attempt: int) -> str:
        return f"tenure-{self._owner}-{lease_id}-{attempt}"

    def bounds(self) -> Mapping[str, Bound]:
        """Return how each envelope field is held here."""
        return {
            "cpus": "exact",
            "memory_bytes": "exact",
            "gpus": "advisory",
            "gpu_memory_bytes": "advisory",
            "disk_bytes": "upper",
            "slot_s": "exact",
            "total_s": "exact",
        }

    def confinement(self) -> str:
        """Return one sentence on the means."""
        try:
            engine = self._engine()
            info = engine.call("GET", "/info")
            with contextlib.suppress(EngineError):
                podman = "podman" in str(engine.call("GET", "/version").get("Components", "")).lower()
        except TenureError as error:
            return f"no container engine: {error}"
        kind = "Podman" if podman else "Docker"
        seccomp = "seccomp" if any("seccomp" in option for option in info.get("SecurityOptions") or []) else "no seccomp"
        closed = "this machine's services closed to it" if close_machine() else "this machine's services NOT closed to it"
        runtime = f", run by {self._engine_runtime}" if self._engine_runtime else ""
        return (
            f"{kind} {info.get('ServerVersion', '?')}{runtime}: memory, cpu, pids by cgroup v{info.get('CgroupVersion', '1')}; "
            f"not root, no capabilities, {seccomp}, read-only root; a network per tenant, {closed}; disk by polling"
        )

    # --- start ---

    def _check(self, spec: StartSpec) -> None:
        user_of(spec)
        with acting_as(actor_of(spec.user)):  # what it may not reach itself is not there for it
            check_container_spec(spec, self._boot_id, sealed=self._sealed)
        engine = self._engine()
        self._sealed_socket(engine, spec)
        if self._profile(spec) and not any(
            "seccomp" in option for option in engine.call("GET", "/info").get("SecurityOptions") or []
        ):
            raise Unsupported("seccomp", "the engine's kernel filters no system calls", "Leave it empty.")
        if self._gpus.grant(spec.devices, runtime=self.name).uuids and not _device_driver(engine):
            raise Unsupported(
                "devices",
                "the engine has neither NVIDIA's runtime nor a CDI description of its devices: a container would see none",
                "Install the NVIDIA Container Toolkit, or use the process runtime.",
            )

    def _sealed_socket(self, engine: Engine, spec: StartSpec) -> None:
        """Refuse to show the engine's socket: whoever has it has the machine."""
        socket = os.path.realpath(engine.path)
        for source in (spec.worker_dir, spec.workdir, *spec.mounts):
            real = os.path.realpath(source).rstrip("/")
            if socket == real or socket.startswith(f"{real}/"):
                raise Unsupported(
                    "mounts", f"{source} would show a container the engine's socket", "Mount a folder of your own."
                )

    def _plan(self, files: LeaseFiles, spec: StartSpec) -> dict[str, Any]:
        engine = self._engine()
        uid, gid = user_of(spec) or ((USER_ID, USER_ID) if os.geteuid() == 0 else (os.geteuid(), os.getegid()))
        gpu = self._gpus.grant(spec.devices, runtime=self.name)
        tenant = tenant_of(spec)
        network = self._tenant_networks(engine).ensure(tenant) if tenant else "none"
        body = self._body(spec, image=self._image(engine, spec), network=network, user=f"{uid}:{gid}")
        if gpu.uuids:
            body["HostConfig"]["DeviceRequests"] = [_device_request(_device_driver(engine), gpu.uuids)]
        return {
            "spec": codec.to_builtins(spec),
            "env": ({} if spec.image else _own_packages()) | container_environment(spec) | dict(gpu.environment),
            "gpu": gpu.to_plan(),
            "folder": str(files.root),
            "term_file": str(self._term_file),
            "confinement": Confinement("rlimit").to_plan(),
            "uid": uid if os.geteuid() == 0 else None,
            "gid": gid if os.geteuid() == 0 else None,
            "netns": "",
            "profile": profile_path(spec),
            "container": {
                "socket": engine.path,
                "name": self._container(spec.lease_id, spec.attempt),
                "body": body,
                "named": [os.path.realpath(source) for source in (spec.worker_dir, spec.workdir, *spec.mounts)],
            },
        }

    def _tenant_networks(self, engine: Engine) -> TenantNetworks:
        with self._networks_lock:
            if self._networks is None:
                self._networks = TenantNetworks(engine, self._owner)
            return self._networks

    def _base(self, engine: Engine) -> str:
        return self._base_image.name(engine.path, wait_s=self._image_wait_s)

    def prepare(self) -> None:
        """Have the base image made, where there is an engine, before a container wants it. Returns at once."""
        with contextlib.suppress(TenureError):
            self._base_image.begin(self._engine().path)

    def _image(self, engine: Engine, spec: StartSpec) -> str:
        """Return what the engine calls the spec's image: one of Tenure, loaded first; one that it has; the base image."""
        return ensure_loaded(engine, spec.image) if os.path.isabs(spec.image) else spec.image or self._base(engine)

    def forget_base_image(self) -> None:
        """Have the next start look for the base image again, and make it where somebody has removed it."""
        self._base_image.forget()

    def _body(self, spec: StartSpec, *, image: str, network: str, user: str) -> dict[str, Any]:
        """Return what the engine is asked to make (Docker Engine API 1.40, ContainerCreate), the environment apart."""
        memory_bytes = spec.envelope.memory_bytes
        half = memory_bytes // 2
        ports = {f"{port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}] for port in spec.ports.values() if port}
        host: dict[str, Any] = {
            "Init": True,
            "AutoRemove": False,
            "NetworkMode": network,
            "PortBindings": ports,
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges", *self._profile(spec)],
            "Privileged": False,
            "IpcMode": "private",
            "Tmpfs": {
                "/tmp": f"rw,nosuid,nodev,exec,size={half},mode=1777",
                "/run": "rw,nosuid,nodev,noexec,size=1m,mode=1777",
            },
            "ShmSize": max(half, 1 << 20),
            "Mounts": mounts_of(spec, {} if spec.image else python_mounts()),
            "LogConfig": {"Type": "json-file", "Config": _LOG_LIMITS},
            "RestartPolicy": {"Name": "no"},
            "PidsLimit": max(1, spec.pids_max) + 1,
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
            **limits(spec.envelope),
        }
        if self._engine_runtime:
            host["Runtime"] = self._engine_runtime
        return {
            "Image": image,
            "Entrypoint": list(spec.argv),
            "Cmd": [],
            "User": user,
            "WorkingDir": read_image(spec.image)["workdir"] if os.path.isabs(spec.image) else spec.workdir,
            "Hostname": spec.lease_id[:63].strip(".-_").replace("_", "-").replace(".", "-") or "lease",
            "Labels": {LABEL: self._owner, "tenure.lease": spec.lease_id, "tenure.attempt": str(spec.attempt)},
            "ExposedPorts": {name: {} for name in ports},
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": host,
        }

    def _profile(self, spec: StartSpec) -> list[str]:
        """Return the spec's profile of system calls as the engine takes it; nothing: the engine's own holds."""
        text = profile_of(spec)
        return [f"seccomp={for_container(text, whose=f'lease {spec.lease_id}')}"] if text else []

    def _start_error(self, spec: StartSpec, report: Mapping[str, Any]) -> TenureError:
        if report.get("step") != "image":
            return super()._start_error(spec, report)
        if not spec.image:
            self.forget_base_image()
            return Unavailable(f"lease {spec.lease_id}: the base image is gone from the engine; try again")
        return SpecError(
            f"lease {spec.lease_id}: the engine has no image {spec.image!r} ({report['error']}); "
            "load or build it there first: Tenure asks no registry"
        )

    # --- consumption ---

    def usage(self, handle: RuntimeHandle) -> Usage:
        """Return the attempt's consumption so far; for an ended one its last counters. Raises NotFound."""
        ended = self._ended(handle)
        if ended is not None:
            return ended.usage or Usage(at_s=ended.ended_at_s)
        files, _ = self._last(handle.lease_id)
        note, sample = read_json(files.root / "container.json") or {}, read_json(files.usage) or {}
        groups = Confinement.from_plan(note["groups"]) if note else Confinement("rlimit")
        tree = procfs.tree_use(pid for pid in groups.members() if pid != note.get("pid"))
        memory = groups.memory_bytes(0) if groups.enforced else 0
        return Usage(
            at_s=self._clock.utc_s(),
            cpu_s=max(groups.cpu_s(0) if groups.enforced else 0.0, float(sample.get("cpu_s", 0.0))),
            memory_bytes=memory,
            peak_memory_bytes=max(memory, int(sample.get("peak_memory_bytes", 0))),
            read_bytes=tree.read_bytes,
            write_bytes=tree.write_bytes,
            processes=tree.processes,
        )

    def pids(self, handle: RuntimeHandle) -> frozenset[int]:
        """Return the container's processes; none of one that has ended. Raises NotFound."""
        files, _ = self._last(handle.lease_id)
        note = read_json(files.root / "container.json") or {}
        return frozenset(Confinement.from_plan(note["groups"]).members() if note else ())

    # --- orders ---

    def resize(self, handle: RuntimeHandle, envelope: Envelope, *, fence: int) -> None:
        """Change CPU, memory and disk bounds live.

        Raises StaleFence, Conflict when the attempt has ended, Refused when it uses more memory than the new bound.
        """
        with self._lock(handle.lease_id):
            files, last = self._running(handle)
            check_fence(handle.lease_id, read_json(files.control), fence)
            note = read_json(files.root / "container.json") or {}
            groups = Confinement.from_plan(note["groups"]) if note else Confinement("rlimit")
            groups.check_use(envelope.memory_bytes, handle.pid)
            if groups.kind == "v2":
                with contextlib.suppress(OSError):  # an agent that may not write there leaves it to the engine
                    groups.make_fit(envelope.memory_bytes)
            engine = Engine(last["container"]["socket"])
            try:
                engine.call("POST", f"/containers/{last['container']['name']}/update", limits(envelope))
            except EngineError as error:
                raise Refused(f"resize to {envelope.describe()} refused by the engine: {error}; ask for more memory") from error
            self._order(handle, fence, envelope=codec.to_builtins(envelope))

    def exec(self, handle: RuntimeHandle, argv: Sequence[str], *, timeout_s: float) -> tuple[int, bytes]:
        """Run a command inside the lease's bounds; return exit code and output (its first MiB).

        Raises Conflict when the attempt has ended, Unavailable when the command did not end within `timeout_s`.
        """
        _, last = self._running(handle)
        asked = last["container"]
        return run_in_container(Engine(asked["socket"]), asked["name"], argv, handle, timeout_s=timeout_s)

    def session(self, handle: RuntimeHandle, argv: Sequence[str], *, window: Window | None) -> Session:
        """See `protocols.Runtime`."""
        _, last = self._running(handle)
        asked = last["container"]
        return ContainerSession(Engine(asked["socket"]), asked["name"], argv, handle, window=window)

    # --- end ---

    def _end_leftovers(self, last: Mapping[str, Any]) -> int:
        lease_id, asked = str(last["spec"]["lease_id"]), last["container"]
        note = read_json(LeaseFiles(self._state_dir, lease_id).root / "container.json")
        left = 0
        if note and last["boot_id"] == self._boot_id and procfs.is_alive(int(note["pid"]), int(note["start_ticks"])):
            with contextlib.suppress(TenureError):
                Engine(asked["socket"]).call("POST", f"/containers/{asked['name']}/kill", signal="SIGKILL")
            left = Confinement.from_plan(note["groups"]).kill_members()
        return left

    def _remove(self, last: Mapping[str, Any]) -> None:
        with contextlib.suppress(TenureError):
            asked = last["container"]
            Engine(asked["socket"]).call("DELETE", f"/containers/{asked['name']}", force=True, v=True)


def _device_driver(engine: Engine) -> str:
    """Return by which of its ways an engine gives containers NVIDIA's devices: ``nvidia``, ``cdi``, or empty for none."""
    info = engine.call("GET", "/info")
    if "nvidia" in (info.get("Runtimes") or {}):
        return "nvidia"
    found = info.get("DiscoveredDevices") or []  # Docker since 28.2
    return "cdi" if any(str(each.get("ID", "")).startswith("nvidia.com/gpu=") for each in found) else ""


def _device_request(driver: str, uuids: Sequence[str]) -> dict[str, Any]:
    if driver == "cdi":
        return {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={uuid}" for uuid in uuids]}
    return {"Driver": "nvidia", "DeviceIDs": list(uuids), "Capabilities": [["gpu"]]}


def _own_packages() -> dict[str, str]:
    return {"PYTHONPATH": own} if (own := own_folder()) else {}


def limits(envelope: Envelope) -> dict[str, int]:
    """Return an envelope's bounds in the engine's words: the same at the start and for a resize."""
    return {
        "Memory": envelope.memory_bytes,
        "MemorySwap": envelope.memory_bytes,  # together with swap: none
        "CpuPeriod": CPU_PERIOD_US,
        "CpuQuota": max(1000, round(envelope.cpus * CPU_PERIOD_US)),
    }
