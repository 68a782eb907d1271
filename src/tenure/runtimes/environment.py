"""What a job finds around it: its environment variables and its copy of the lease.

Not for: the variables of a stage (TENURE_RUN_DIR, TENURE_STAGE, …), which come with the spec.
"""

from __future__ import annotations

import math
import os
import pwd
import sys
import time
from collections.abc import Mapping
from typing import Any

from tenure.protocols import StartSpec
from tenure.resources import Bound

_PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "TMPDIR", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE"),
    *(
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "LD_LIBRARY_PATH",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "TENURE_HOME",
        "TENURE_DATA",
    ),
)
"""Of the agent's own environment; anything else a job needs is in its job file, or a secret named there."""
_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def threads_of(cpus: float) -> int:
    """Return the threads that a pool should have under a CPU share: whole cores, at least one."""
    return max(1, math.floor(cpus))


def job_environment(spec: StartSpec) -> dict[str, str]:
    """Return the whole environment of an attempt. The spec goes before defaults, the lease's own TENURE_* before the spec."""
    threads = str(threads_of(spec.envelope.cpus))
    base = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    base.setdefault("PATH", os.defpath)
    if spec.user:
        entry = pwd.getpwnam(spec.user)
        base.update(HOME=entry.pw_dir, USER=spec.user, LOGNAME=spec.user)
        if os.geteuid() != entry.pw_uid:
            base.pop("TMPDIR", None)  # the agent's own, which that user may not write
            base["SHELL"] = entry.pw_shell or "/bin/sh"
    base.update(dict.fromkeys(_POOLS, threads))
    base.update(OMP_WAIT_POLICY="PASSIVE", CUDA_VISIBLE_DEVICES=",".join(str(device.index) for device in spec.devices))
    base.update(spec.env)
    base.update(
        TENURE_WORKER_DIR=spec.worker_dir,
        TENURE_LEASE_FILE=f"{spec.worker_dir}/lease.json",
        TENURE_LEASE_ID=spec.lease_id,
        TENURE_FENCE=str(spec.fence),
        TENURE_ATTEMPT=str(spec.attempt),
        # Its process may have waited long before this order came, so that its own start time says nothing.
        TENURE_STARTED_BOOT_S=repr(time.clock_gettime(time.CLOCK_BOOTTIME)),
    )
    return base


def container_environment(spec: StartSpec) -> dict[str, str]:
    """Return the whole environment of an attempt in a container: nothing of the agent's own but what Tenure says."""
    found = job_environment(spec)
    if "CUDA_VISIBLE_DEVICES" not in spec.env:  # inside they are counted anew
        found["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(len(spec.devices))))
    own = {name for name in _PASSED_ON if name in found and name not in spec.env}
    kept = {name: value for name, value in found.items() if name not in own}
    path = os.pathsep.join([os.path.dirname(sys.executable), "/usr/local/bin:/usr/bin:/bin"]) if not spec.image else ""
    return ({"PATH": path} if path and "PATH" not in kept else {}) | {"HOME": spec.worker_dir} | kept


def lease_file(
    lease_id: str, kept: Mapping[str, Any], control: Mapping[str, Any], *, bounds: Mapping[str, Bound]
) -> dict[str, Any]:
    """Return the content of TENURE_LEASE_FILE. kept, control: as the runtime keeps them. bounds: how it holds each bound."""
    spec, gpu = kept["spec"], kept.get("gpu") or {}
    return {
        "lease_id": lease_id,
        "fence": control["fence"],
        "attempt": spec["attempt"],
        "envelope": control["envelope"],
        "deadline_boot_s": control["deadline_boot_s"],
        "boot_id": spec["boot_id"],
        "threads": threads_of(float(control["envelope"]["cpus"])),
        "bounds": {**bounds, **gpu.get("bounds", {})},
        "gpus": {"uuids": gpu.get("uuids", []), "held_by": gpu.get("means", "")},
    }
