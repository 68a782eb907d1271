"""What runs of an image showed is known the next time, and the form that is chosen follows from it."""

from types import SimpleNamespace

import pytest

from tenure.cli import image_builds
from tenure.cli.image_verbs import form_goal
from tenure.decide.forms import FormGoal
from tenure.errors import NotFound, SpecError, Unavailable, Unsupported
from tenure.experiments.foreground_image import ImageRun, chosen_form, image_job_file
from tenure.experiments.image_forms import facts, form_fingerprint, form_recommendation, keep_run, record_built
from tenure.forms import Form, FormRecord, ImageManifest
from tenure.images.store import ImageStore, write_manifest
from tenure.jobfile import parse_job_file
from tenure.jobs import Job
from tenure.nodes import Machine, Node
from tenure.protocols import Exit, ExitKind
from tenure.resources import Capacity, Envelope
from tenure.trials import Trial
from tenure.usage import Usage

MIB = 1 << 20
NODE = Node(
    name="local",
    capacity=Capacity(cpus=2.0, memory_bytes=4096 * MIB),
    machine=Machine(cpu_model="x", cores=2),
    runtimes=("process", "container"),
    bounds={"process": {"memory_bytes": "exact"}, "container": {"memory_bytes": "upper"}},
    confinement={"container": "an engine"},
)


@pytest.fixture
def image(tmp_path):
    """A stored image with all forms, its root's start and its container's floor measured when it was built."""
    folder = tmp_path / "images/digits" / ("a" * 12)
    folder.mkdir(parents=True)
    record = FormRecord(path="root", size_bytes=70 * MIB, sha256="0" * 64)
    forms = {
        Form.ROOT: FormRecord(path="root", size_bytes=70 * MIB, sha256="0" * 64, cold_start_s=0.5),
        Form.OCI: FormRecord(path="image.oci.tar", size_bytes=71 * MIB, sha256="0" * 64, memory_floor_bytes=64 * MIB),
        Form.MICROVM: record,
    }
    manifest = ImageManifest(
        name="digits", id="a" * 64, closure_hash="0" * 64, entry=("/x",), ports=(8000, 8001), door="v2", forms=forms
    )
    write_manifest(folder, manifest)
    return ImageStore(tmp_path).find("digits")


class Ledger:
    """Keeps trials by id, as the broker's does, or refuses them."""

    def __init__(self):
        self.trials, self.down = {}, False

    def record_trial(self, trial):
        if self.down:
            raise Unavailable("no broker")
        self.trials.setdefault(trial.id, trial)

    def lease(self, lease_id):
        envelope = Envelope(cpus=1.0, memory_bytes=256 * MIB)
        return SimpleNamespace(lease=SimpleNamespace(envelope=envelope, requested_at_s=100.0, starts_at_s=103.0))


@pytest.fixture
def context():
    ledger, heard, ids = Ledger(), [], iter(range(100))

    def trial(**fields):
        return Trial(id=f"t-{next(ids)}", run_id="r-1", machine=NODE.machine, **fields)

    return SimpleNamespace(
        client=ledger,
        node=NODE,
        trial=trial,
        display=SimpleNamespace(warn=heard.append),
        heard=heard,
        new_id=lambda kind: f"{kind}-1",
        run=SimpleNamespace(id="r-1"),
        clock=SimpleNamespace(utc_s=lambda: 5.0),
    )


def job(image, runtime="container"):
    return Job(
        kind="serve", name="serve", model=str(image.folder), image=str(image.folder), runtime=runtime, envelope=Envelope()
    )


def ended(kind=ExitKind.STOPPED, peak_mib=90):
    usage = Usage(at_s=1.0, peak_memory_bytes=peak_mib * MIB)
    return Exit(kind=kind, code=0, started_at_s=0.0, ended_at_s=1.0, usage=usage)


def test_what_a_builder_measured_is_recorded_once_however_often_the_image_runs(context, image):
    record_built(context, job(image), image.manifest)
    record_built(context, job(image), image.manifest)
    found = {trial.configuration["form"]: trial for trial in context.client.trials.values()}
    assert len(context.client.trials) == 3
    assert found["root"].source == "probe"
    assert found["root"].metrics["cold_start_s"].mean == 0.5
    assert found["oci"].metrics["memory_floor_bytes"].mean == 64 * MIB
    assert set(found["microvm"].metrics) == {"size_bytes"}
    assert found["root"].configuration == {"architecture": "microservice", "form": "root"}


def test_a_run_shows_how_long_it_took_from_its_grant_and_what_it_used(context, image):
    keep_run(context, job(image), "l-1", ready_s=4.0, ended=ended())
    (seen,) = (trial for trial in context.client.trials.values() if trial.source == "observed")
    assert seen.metrics["cold_start_s"].mean == pytest.approx(1.0), "three seconds it waited for room"
    assert seen.metrics["peak_memory_bytes"].mean == 90 * MIB
    assert seen.configuration["memory_bytes"] == 256 * MIB
    assert seen.bounds == {"memory_bytes": "upper"}
    assert seen.note == "an engine"
    assert seen.fingerprint == form_fingerprint(image.manifest, NODE.machine)


def test_a_program_that_never_listens_has_no_start_and_a_run_that_failed_shows_nothing(context, image):
    keep_run(context, job(image), "l-1", ready_s=0.0, ended=ended(ExitKind.COMPLETED))
    (seen,) = (trial for trial in context.client.trials.values() if trial.source == "observed")
    assert set(seen.metrics) == {"size_bytes", "peak_memory_bytes"}
    context.client.trials.clear()
    keep_run(context, job(image), "l-1", ready_s=1.0, ended=ended(ExitKind.OUT_OF_MEMORY))
    assert context.client.trials == {}


def test_a_broker_that_takes_no_trial_costs_the_run_nothing_and_is_told(context, image):
    context.client.down = True
    keep_run(context, job(image), "l-1", ready_s=1.0, ended=ended())
    assert "is not kept: no broker" in context.heard[0]


def test_what_runs_showed_goes_before_what_the_builder_measured(context, image):
    for ready_s in (4.0, 5.0, 9.0):
        keep_run(context, job(image, "process"), "l-1", ready_s=ready_s, ended=ended())
    trials = tuple(context.client.trials.values())
    known = {each.form: each for each in facts(image.manifest, NODE, trials)}

    def root_start(node, trials):
        return next(each.cold_start_s for each in facts(image.manifest, node, trials) if each.form is Form.ROOT)

    root, oci, microvm = (known[form] for form in Form)
    assert (root.cold_start_s, root.peak_memory_bytes) == (2.0, 90 * MIB)
    assert (oci.cold_start_s, oci.memory_bytes) == (None, 64 * MIB)
    assert root.cannot == oci.cannot == ""
    assert "has not the runtime microvm" in microvm.cannot
    assert root_start(NODE, ()) == 0.5
    elsewhere = Node(name="other", capacity=NODE.capacity, machine=Machine(cpu_model="y"), runtimes=NODE.runtimes)
    assert root_start(elsewhere, trials) == 0.5, "another machine's runs say nothing of this one"


def test_the_form_is_chosen_by_the_goal_in_the_memory_of_the_lease_and_the_job_runs_it(image):
    asked = ImageRun(image=image, goal=FormGoal(cold_start_s=2.0), cpus=1.0, memory_bytes=256 * MIB)
    text, why = image_job_file(asked, NODE, chosen_form(asked, NODE))
    assert parse_job_file(text).stages[0].runtime == "process"
    assert "form root may meet cold_start<2s, memory<256.0 MiB" in why
    assert "not sure: its memory was never measured here" in why
    assert "not microvm: node local has not the runtime microvm" in why
    apart = ImageRun(image=image, goal=FormGoal(isolation="container"), cpus=1.0, memory_bytes=256 * MIB)
    assert parse_job_file(image_job_file(apart, NODE, chosen_form(apart, NODE))[0]).stages[0].runtime == "container"
    plain = ImageRun(image=image, cpus=1.0, memory_bytes=256 * MIB)
    assert image_job_file(plain, NODE)[1].endswith("form root"), "without a goal as ever"


def test_a_choice_is_kept_with_the_start_that_is_expected_once_two_runs_have_shown_one(context, image):
    asked = ImageRun(image=image, goal=FormGoal(), cpus=1.0, memory_bytes=256 * MIB)
    choice = chosen_form(asked, NODE)
    first = form_recommendation(context, job(image), choice, goal="least cost", trials=())
    assert (first.chosen.configuration, first.chosen.predictions) == ({"form": "oci"}, {})
    assert "not root: its memory was never measured here" in first.why
    for ready_s in (4.0, 5.0, 9.0):
        keep_run(context, job(image), "l-1", ready_s=ready_s, ended=ended())
    trials = tuple(context.client.trials.values())
    made = form_recommendation(context, job(image), chosen_form(asked, NODE, trials), goal="least cost", trials=trials)
    expected = made.chosen.predictions["cold_start_s"]
    assert (expected.low, expected.value, expected.high, expected.level) == (1.0, 2.0, 6.0, 0.5)
    assert set(made.trials) == set(context.client.trials)


def test_no_form_that_meets_the_goal_is_an_end_with_every_reason(image):
    asked = ImageRun(image=image, goal=FormGoal(cold_start_s=0.1, isolation="microvm"), memory_bytes=256 * MIB)
    with pytest.raises(SpecError, match=r"no form meets cold_start<0.1s.*not root: .*not oci: .*not microvm: .*--form root"):
        chosen_form(asked, NODE)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("oci", "cold_start<2s", ""), "--goal is for --form auto"),
        (("", "", "container"), "--isolation is for --form auto"),
        (("auto", "p99<2s", ""), "reads like cold_start<2s"),
        (("auto", "", "jail"), "--isolation takes process, container, microvm; found 'jail'"),
    ],
)
def test_a_goal_that_cannot_be_is_refused_with_what_can(given, words):
    with pytest.raises(SpecError, match=words):
        form_goal(*given)
    assert form_goal("auto", "", "container") == FormGoal(isolation="container")
    assert form_goal("oci", "", "") is None


def test_of_a_model_the_forms_worth_choosing_from_are_built_and_what_cannot_be_made_is_told_first(tmp_path, monkeypatch):
    built, makeable = [], [True]

    def check(home):
        if not makeable[0]:
            raise NotFound("no kernel")

    def build(model, store, *, forms, told):
        built.append(tuple(forms))
        return SimpleNamespace(built=SimpleNamespace(image="new"))

    monkeypatch.setattr(image_builds, "_check_microvm", check)
    monkeypatch.setattr(image_builds, "build_serving", build)

    def ready(isolation):
        return image_builds.ready_for_choice(tmp_path / "x.onnx", ImageStore(tmp_path), isolation=isolation)

    assert ready("process") == "new"
    ready("container")
    ready("microvm")
    makeable[0] = False
    ready("container")
    with pytest.raises((NotFound, Unsupported), match="no kernel"):
        ready("microvm")
    assert built == [(Form.ROOT, Form.OCI), (Form.OCI, Form.MICROVM), (Form.MICROVM,), (Form.OCI,)]
