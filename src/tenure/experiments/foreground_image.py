"""An image run in the foreground: `tenure image run` as a job under one lease, like `tenure serve MODEL`.

Not here: holding the lease until Ctrl-C (`stage_serve`), what it runs in each form (`image_command`).
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from tenure.errors import SpecError, Unavailable
from tenure.experiments.foreground import ForegroundSpec, envelope_of, reachable
from tenure.experiments.image_command import RUNTIMES, port_names
from tenure.forms import Form
from tenure.images.store import StoredImage
from tenure.jobfile import JobFile, format_job_file
from tenure.jobs import Job, ServerOptions
from tenure.nodes import Node

PREFERRED = (Form.ROOT, Form.OCI, Form.MICROVM)
"""Which form is run when none is named: the first of these that the image has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRun:
    """What to run, as what, under which lease."""

    image: StoredImage
    form: Form | None = None
    """None: the first of `PREFERRED` that the image has."""
    cpus: float = 0.0
    """0: what is free on the node."""
    memory_bytes: int = 0
    """0: half of what is free on the node."""
    time_s: float = 0.0
    """0: until it is interrupted."""
    http_port: int = 8000
    """Outside, of an image whose door is v2; 0 takes any free one."""
    grpc_port: int = 8001
    options: ServerOptions = field(default_factory=ServerOptions)

    @property
    def chosen(self) -> Form:
        """Return the form to run. Raises NotFound when the image has not got it."""
        form = self.form or next((form for form in PREFERRED if form in self.image.manifest.forms), Form.ROOT)
        self.image.form_path(form)
        return form

    @property
    def place(self) -> ForegroundSpec:
        """Return the same as what a served model asks for. Raises SpecError."""
        return ForegroundSpec(
            model=self.image.folder,
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            cpus=self.cpus,
            memory_bytes=self.memory_bytes,
            time_s=self.time_s,
            options=self.options,
        )


def image_job_file(asked: ImageRun, node: Node) -> tuple[str, str]:
    """Return the text of the job file that runs an image on this node, and a sentence on where its envelope comes from.

    Raises Refused when nothing of the node is free, SpecError when the node lacks the form's runtime.
    """
    manifest, form = asked.image.manifest, asked.chosen
    runtime = RUNTIMES[form]
    if runtime not in node.runtimes:
        raise SpecError(
            f'form "{form}" needs the runtime {runtime}, which node {node.name} has not: "tenure doctor" says why. '
            f"It has: {', '.join(node.runtimes)}; choose another form with --form"
        )
    envelope, why = envelope_of(asked.place, node)
    ports: Mapping[str, int] = port_names(manifest.ports, manifest.door)
    if manifest.door == "v2":
        outside = {"http": asked.http_port, "grpc": asked.grpc_port}
        ports = {name: outside[name] for name in ports}
    job = Job(
        kind="serve",
        name="serve",
        model=str(asked.image.folder),
        image=str(asked.image.folder),
        runtime=runtime,
        envelope=envelope,
        ports=ports,
        server=asked.options,
    )
    return format_job_file(JobFile(name=manifest.name, tenant="default", stages=(job,))), f"{why}; form {form}"


def served_names(address: str) -> tuple[str, ...]:
    """Return the names of the models that a v2 server offers. Raises Unavailable."""
    connection = http.client.HTTPConnection(reachable(address), timeout=10.0)
    try:
        connection.request("POST", "/v2/repository/index", b"{}", {"Content-Type": "application/json"})
        return tuple(sorted({str(entry["name"]) for entry in json.loads(connection.getresponse().read())}))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"the server at {address} does not say which models it has: {error!r}") from error
    finally:
        connection.close()
