"""What a lease's attempt is started with: its words, its environment, its folders, its bounds.

Not here: when it is started, and what follows (`attempts`); how its runtime starts it (`tenure.runtimes`).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from tenure.broker.secrets import Secrets
from tenure.broker.tenancy import Tenancy
from tenure.errors import Refused
from tenure.jobs import Command
from tenure.leases import Lease
from tenure.protocols import StartSpec
from tenure.runs import RunFiles

PASSED_ON = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
"""What a job gets of the broker's own environment."""
PERSONAL = ("HOME", "USER", "TMPDIR")
"""What is left out of it for a job of another user."""
PASSED_INTO = ("LANG", "LC_ALL", "TZ")
"""What a job in a container gets of it: it has folders of its own, and its runtime says where its programs are."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "BLIS_NUM_THREADS")


class StartSpecs:
    """Makes the spec of an attempt from its lease and what the broker has of its own."""

    def __init__(self, home: Path, *, tenancy: Tenancy, secrets: Secrets, environ: Mapping[str, str]) -> None:
        self._home, self._tenancy, self._secrets, self._environ = home, tenancy, secrets, environ

    def of(self, lease: Lease, *, deadline_boot_s: float, boot_id: str, event_file: str = "") -> StartSpec:
        """Return what starts a lease's attempt. event_file: the event it is invoked by.

        Raises Refused when a secret that its command names is nowhere to be had.
        """
        files = RunFiles(self._home, lease.run_id)
        worker_dir = files.worker(lease.stage, lease.worker, lease.attempt)
        user = self._tenancy.user_of(lease.tenant)
        return StartSpec(
            lease_id=lease.id,
            fence=lease.fence,
            attempt=lease.attempt,
            argv=_argv(lease.command),
            env=self._environment(lease, user, worker_dir, event_file),
            workdir=lease.command.workdir or str(worker_dir),
            worker_dir=str(worker_dir),
            log_path=str(files.logs(lease.stage) / f"{lease.worker}.{lease.attempt}.log"),
            envelope=lease.envelope,
            devices=lease.devices,
            deadline_boot_s=deadline_boot_s,
            boot_id=boot_id,
            grace_s=lease.command.grace_s,
            network=lease.command.network if lease.command.runtime == "process" else f"tenant:{lease.tenant}",
            ports=lease.command.ports,
            user=user,
            image=lease.command.image,
            mounts=lease.command.mounts,
            seccomp=lease.command.seccomp,
        )

    def _environment(self, lease: Lease, user: str, worker_dir: Path, event_file: str) -> dict[str, str]:
        passed_on: tuple[str, ...] = PASSED_ON if lease.command.runtime == "process" else PASSED_INTO
        if user:  # its runtime says where that user's own things are
            passed_on = tuple(name for name in passed_on if name not in PERSONAL)
        env = {name: self._environ[name] for name in passed_on if name in self._environ}
        # What a command starts in turn finds the interpreter's neighbours, whether or not its environment was activated.
        if lease.command.runtime == "process":
            env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
        env |= {name: str(max(1, math.floor(lease.envelope.cpus))) for name in THREAD_VARIABLES}
        env |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"} | dict(lease.command.env)
        env |= {
            "TENURE_RUN_DIR": str(RunFiles(self._home, lease.run_id).stage(lease.stage)),
            "TENURE_WORKER_DIR": str(worker_dir),
            "TENURE_LEASE_FILE": str(worker_dir / "lease.json"),
            "TENURE_LEASE_ID": lease.id,
            "TENURE_FENCE": str(lease.fence),
            "TENURE_ATTEMPT": str(lease.attempt),
            "TENURE_WORKER": str(lease.worker),
            "TENURE_STAGE": lease.stage,
            "TENURE_RUN_ID": lease.run_id,
        }
        if event_file:
            env["TENURE_EVENT_FILE"] = event_file
        secrets = self._secrets.of(lease) if user else self._environ
        for name in lease.command.secrets:
            if name not in secrets:
                where = "was in the memory of a broker that has ended" if user else "is not in the broker's environment"
                again = 'Stop it with "tenure down" and start it again from a shell that has the variable.'
                raise Refused(f"lease {lease.id}: the secret {name} {where}. {'Ask for the lease again.' if user else again}")
            env[name] = secrets[name]
        return env


def _argv(command: Command) -> tuple[str, ...]:
    """Return the words to start: "python" means the one Tenure runs under (some have no program of that name beside them)."""
    if command.argv[0] in ("python", "python3") and "PATH" not in command.env:
        return (sys.executable, *command.argv[1:])
    return command.argv
