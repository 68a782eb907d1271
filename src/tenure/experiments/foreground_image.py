"""An image run in the foreground: `tenure image run` as a job under one lease, like `tenure serve MODEL`.

Not here: holding the lease until Ctrl-C (`stage_serve`), what it runs in each form (`image_command`).
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tenure.decide.forms import FormChoice, FormGoal, choose_form
from tenure.errors import SpecError, Unavailable
from tenure.experiments.foreground import ForegroundSpec, envelope_of, reachable
from tenure.experiments.image_command import RUNTIMES, port_names
from tenure.experiments.image_forms import facts
from tenure.forms import Form
from tenure.images.store import StoredImage
from tenure.jobfile import JobFile, format_job_file
from tenure.jobs import Job, ServerOptions
from tenure.nodes import Node
from tenure.trials import Trial

PREFERRED = (Form.ROOT, Form.OCI, Form.MICROVM)
"""Which form is run when none is named: the first of these that the image has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRun:
    """What to run, as what, under which lease."""

    image: StoredImage
    form: Form | None = None
    """None: by `goal`, or without one the first of `PREFERRED` that the image has."""
    goal: FormGoal | None = None
    """What the form must meet, of an image whose form is to be chosen."""
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


def bounded_goal(asked: ImageRun, node: Node) -> FormGoal:
    """Return the goal with the memory of the lease as a bound. Raises Refused."""
    goal, held = asked.goal or FormGoal(), envelope_of(asked.place, node)[0].memory_bytes
    return replace(goal, memory_bytes=min(goal.memory_bytes or held, held))


def chosen_form(asked: ImageRun, node: Node, trials: Sequence[Trial] = ()) -> FormChoice:
    """Return the form that meets the goal at the least cost on this node, in the memory of its lease; and why no other.

    trials: known ones of the image (`image_forms.form_fingerprint`). Raises SpecError when none meets the goal, with why.
    """
    choice = choose_form(facts(asked.image.manifest, node, trials), bounded_goal(asked, node))
    if choice.form is None:
        raise SpecError(
            f'{choice.describe()}. Ask for less, or build another form: "tenure image build … --form root,oci,microvm"'
        )
    return choice


def image_job_file(asked: ImageRun, node: Node, choice: FormChoice | None = None) -> tuple[str, str]:
    """Return the text of the job file that runs an image on this node, and a sentence on its envelope and its form.

    choice: of `chosen_form`, where the form is to be chosen. Raises Refused when nothing of the node is free, SpecError when
    the node lacks the form's runtime.
    """
    manifest = asked.image.manifest
    form = choice.form if choice is not None and choice.form is not None else asked.chosen
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
    form_words = f"form {form}" if choice is None else f"form {choice.describe()}"
    return format_job_file(JobFile(name=manifest.name, tenant="default", stages=(job,))), f"{why}; {form_words}"


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
