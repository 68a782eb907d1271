"""What a workspace runs and finds around it: environment, home volume, JupyterLab. The holder's side, before the lease.

A home volume is a folder per tenant, `homes/<tenant>` below the home of all state: where every workspace of that tenant
starts, and its HOME. It outlives leases, nodes and reboots, and nothing removes it but its owner.
Not here: building environments (`runtimes.environments`), the lease itself (`tenure.leasing`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenure.errors import SpecError
from tenure.jobs import Command, RuntimeName
from tenure.leases import Lease, LeaseState
from tenure.runs import RunFiles
from tenure.runtimes.environments import Environment, ensure_environment, sweep
from tenure.runtimes.images import USER_ID
from tenure.tenants import check_name

IDLE_COMMAND = ("sleep", "infinity")
"""What holds a workspace open when its holder names no command and there is no JupyterLab: `exec` brings the rest."""
PORT = "jupyter"
"""Name of JupyterLab's port among a command's."""
URL_MAX_S = 60.0
"""How long JupyterLab may take until it answers."""
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_JUPYTER = (
    'JUPYTER_RUNTIME_DIR="$TENURE_WORKER_DIR/jupyter" exec "$@" --no-browser --ServerApp.allow_root=True '
    '--ServerApp.ip="$TENURE_JUPYTER_IP" --ServerApp.port="$TENURE_JUPYTER_PORT"'
)
"""JupyterLab draws its token itself and writes it, for its owner alone, below the attempt's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the holder asked for."""

    requirements: Path | None = None
    image: str = ""
    runtime: RuntimeName | None = None
    """None: a container when an image is named, else processes."""

    def __post_init__(self) -> None:
        if self.image and self.requirements is not None:
            raise SpecError(
                f"an environment is made for this machine's Python, image {self.image!r} has its own: name one of the two, "
                "or install the packages in the image"
            )
        if self.image and self.runtime not in (None, "container"):
            raise SpecError(f"an image runs in a container; found runtime {self.runtime!r} beside image {self.image!r}")

    @property
    def runs_in(self) -> RuntimeName:
        """The runtime that the workspace is for."""
        return self.runtime or ("container" if self.image else "process")


def environments_root(home: Path, volume: Path | None = None) -> Path:
    """Return where environments lie: a home's own, or those of one tenant of a shared home, in its volume."""
    return home / "environments" if volume is None else volume / ".environments"


def home_volume(home: Path, tenant: str, *, contained: bool = False) -> Path:
    """Return a tenant's home volume, made when missing. Raises SpecError.

    contained: it must be writable in a container, where nobody is root: what root wrote there goes over to who runs inside.
    """
    place = home / "homes" / check_name("tenant", tenant)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    if contained and os.geteuid() == 0:
        # By descriptors and without following links: a workspace of the tenant may be writing there at the same time.
        for _, folders, files, here in os.fwalk(place):
            _hand_over(".", here)
            for name in (*folders, *files):
                _hand_over(name, here)
    return place


def _hand_over(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid == 0:
            os.chown(name, USER_ID, USER_ID, dir_fd=folder, follow_symlinks=False)


def set_up(
    setup: Setup,
    argv: Sequence[str],
    *,
    home: Path,
    tenant: str,
    live: Sequence[Lease] = (),
    grace_s: float,
    volume: Path | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Command:
    """Return the command of a workspace; its environment is built when it is not there yet.

    argv: what the holder wants run; empty: JupyterLab when the environment has it, else nothing but waiting. live: all live
    leases, whose environments stay. volume: in a shared home, the tenant's own. Raises what `ensure_environment`
    raises, SpecError.
    """
    contained = setup.runs_in == "container"
    root = environments_root(home, volume)
    volume = volume or home_volume(home, tenant, contained=contained)
    env = {"HOME": str(volume)}
    mounts: dict[str, str] = {}
    made: Environment | None = None
    if setup.requirements is not None:
        made = ensure_environment(root, setup.requirements, told=told)
        sweep(root, in_use={Path(lease.command.env.get("VIRTUAL_ENV", "")).name for lease in live}, now_s=time.time())
        told(_summary(made))
        path = _SYSTEM_PATH if contained else os.environ.get("PATH", os.defpath)
        # An empty PYTHONPATH is none: what Tenure itself was started with is not the workspace's.
        env |= {"VIRTUAL_ENV": str(made.path), "PATH": f"{made.path}/bin:{path}", "PYTHONPATH": ""}
        if contained:
            mounts[str(made.path)] = f"{made.path}:ro"
    ports: dict[str, int] = {}
    words = tuple(argv)
    if not words and made is not None and "jupyterlab" in made.packages:
        ports = {PORT: _free_port()}
        ip = "0.0.0.0" if contained else "127.0.0.1"  # published on this machine's loopback alone
        env |= {"TENURE_JUPYTER_IP": ip, "TENURE_JUPYTER_PORT": str(ports[PORT])}
        words = ("sh", "-c", _JUPYTER, "jupyter", str(made.python), "-m", "jupyterlab")
    return Command(
        argv=words or IDLE_COMMAND,
        env=env,
        workdir=str(volume),
        grace_s=grace_s,
        runtime=setup.runs_in,
        image=setup.image,
        mounts=mounts,
        ports=ports,
    )


def _summary(made: Environment) -> str:
    size = f"{len(made.packages)} packages, {made.size_bytes / (1 << 20):.1f} MiB"
    return f"{made.key} ready: {size}, " + (f"built in {made.build_s:.1f} s" if made.built else "already there")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def has_jupyter(lease: Lease) -> bool:
    """Whether JupyterLab is what a workspace runs."""
    return PORT in lease.command.ports


def jupyter_url(home: Path, lease: Lease) -> str:
    """Return where JupyterLab answers, its token included; empty while it does not."""
    if not has_jupyter(lease) or lease.state not in (LeaseState.ACTIVE, LeaseState.RESIZING):
        return ""
    worker_dir = RunFiles(home, lease.run_id).worker(lease.stage, lease.worker, lease.attempt)
    for note in sorted((worker_dir / "jupyter").glob("jpserver-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(note.read_text())
            return f"http://127.0.0.1:{int(said['port'])}{said['base_url']}lab?token={said['token']}"
    return ""
