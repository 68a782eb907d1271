"""An image as the command of a lease, whatever its form: the same ports and the same door outside.

    root     process runtime     the machine's network: it listens on the address that was asked for
    oci      container runtime   its own network: it listens on all of it, this machine's loopback leads there
    microvm  microvm runtime     as a container, by the virtual machine's own forwarding

Not for: holding the lease (`stage_serve`), building (`images.build`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tenure.errors import SpecError
from tenure.experiments.architectures import DRAIN_S, LEAVE_S, server_flags
from tenure.forms import Form
from tenure.images.store import read_image
from tenure.jobs import Command, Job, RuntimeName
from tenure.sockets import free_port

RUNTIMES: Mapping[Form, RuntimeName] = {Form.ROOT: "process", Form.OCI: "container", Form.MICROVM: "microvm"}
"""Form -> the runtime that runs it."""
DOORS = ("http", "grpc")
"""Names of an image's ports in order, where its door is v2."""


def form_of(runtime: RuntimeName) -> Form:
    """Return the form that a runtime runs."""
    return next(form for form, name in RUNTIMES.items() if name == runtime)


def port_names(ports: tuple[int, ...], door: str) -> dict[str, int]:
    """Return an image's ports by the names that endpoints have: http and grpc behind the door v2, else tcp-PORT."""
    return dict(zip(DOORS, ports, strict=False)) if door == "v2" else {f"tcp-{port}": port for port in ports}


def is_image(job: Job) -> bool:
    """Return whether a job runs an image of Tenure, instead of one that the engine has, or this machine's own files."""
    return job.image.startswith("/")


def image_command(job: Job) -> Command:
    """Return the command of a serve stage whose image is a folder. Raises NotFound, SpecError, CorruptData."""
    image = read_image(Path(job.image))
    image.form_path(form_of(job.runtime))
    manifest = image.manifest
    inside = port_names(manifest.ports, manifest.door)
    argv = manifest.entry
    if manifest.door == "v2":
        if unknown := set(job.ports) - set(inside):
            raise SpecError(f"stage {job.name}: the image has no port {sorted(unknown)[0]!r}; it has: {', '.join(inside)}")
        ports = {name: job.ports.get(name, 0) for name in inside}
        options = job.server
        if job.runtime != "process":  # outside that is this machine's loopback
            ports, options = {name: port or free_port() for name, port in ports.items()}, replace(options, host="0.0.0.0")
        argv = (*argv, *server_flags(ports, options))
    else:  # such a program listens where it wants to
        ports = inside
    return Command(
        argv=argv,
        env={**manifest.env, **job.env},
        secrets=job.secrets,
        ports=ports,
        grace_s=DRAIN_S + LEAVE_S,
        runtime=job.runtime,
        image=job.image,
        announces=manifest.door == "v2",
    )
