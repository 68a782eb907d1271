"""What a workspace runs and finds around it, from what its holder asked for."""

import json
import os
from pathlib import Path

import pytest

from tenure.broker import workspace_setup
from tenure.broker.workspace_setup import IDLE_COMMAND, Setup, home_volume, jupyter_url, set_up
from tenure.errors import SpecError
from tenure.jobs import Command
from tenure.leases import Lease, LeaseState
from tenure.resources import Envelope
from tenure.runtimes.environments import Environment


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Have every environment be there already, with the packages that a test names."""
    found = {}

    def ensure(root, requirements, *, told):
        return Environment(path=tmp_path / "venv", packages=dict(found), built=False, build_s=1.0, size_bytes=1 << 20)

    monkeypatch.setattr(workspace_setup, "ensure_environment", ensure)
    return found


def made(tmp_path, setup=None, argv=(), tenant="alice") -> Command:
    return set_up(setup or Setup(), argv, home=tmp_path, tenant=tenant, grace_s=5.0)


def test_a_workspace_starts_in_its_tenants_volume_which_outlives_it(tmp_path):
    command = made(tmp_path)
    volume = Path(command.workdir)
    assert command.argv == IDLE_COMMAND
    assert command.env["HOME"] == command.workdir
    (volume / "kept").write_text("x")
    assert made(tmp_path).workdir == str(volume)
    assert (volume / "kept").exists()
    assert made(tmp_path, tenant="bob").workdir != str(volume)
    assert volume.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's files go over to somebody else")
def test_what_root_wrote_in_the_volume_can_be_written_in_a_container_too_and_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("")
    volume = home_volume(tmp_path, "alice")
    (volume / "deep").mkdir()
    (volume / "deep/file").write_text("x")
    (volume / "link").symlink_to(outside)
    home_volume(tmp_path, "alice", contained=True)
    assert {path.lstat().st_uid for path in (volume, *volume.rglob("*"))} == {65532}
    assert outside.stat().st_uid == 0


def test_a_tenant_cannot_name_a_folder_elsewhere(tmp_path):
    with pytest.raises(SpecError, match="tenant"):
        home_volume(tmp_path, "../alice")


def test_in_a_container_the_environment_is_mounted_read_only_and_goes_first(tmp_path, packages):
    command = made(tmp_path, Setup(requirements=Path("r.txt"), runtime="container"))
    venv = tmp_path / "venv"
    assert command.runtime == "container"
    assert command.mounts == {str(venv): f"{venv}:ro"}
    assert command.env["PATH"].startswith(f"{venv}/bin:")
    assert os.environ["PATH"] not in command.env["PATH"]
    assert command.env["PYTHONPATH"] == ""


def test_as_processes_the_environment_goes_before_the_holders_own_programs(tmp_path, packages):
    command = made(tmp_path, Setup(requirements=Path("r.txt")))
    assert (command.runtime, command.mounts) == ("process", {})
    assert command.env["PATH"] == f"{tmp_path}/venv/bin:{os.environ['PATH']}"


def test_jupyterlab_is_run_when_the_environment_has_it_and_nothing_else_was_asked_for(tmp_path, packages):
    packages["jupyterlab"] = "4.0"
    asked = Setup(requirements=Path("r.txt"))
    command = made(tmp_path, asked)
    assert "jupyterlab" in command.argv
    assert command.ports["jupyter"] > 0
    assert command.env["TENURE_JUPYTER_IP"] == "127.0.0.1"
    assert "token" not in json.dumps([command.argv, dict(command.env)]), "others of the machine could read it"
    inside = made(tmp_path, Setup(requirements=Path("r.txt"), runtime="container"))
    assert inside.env["TENURE_JUPYTER_IP"] == "0.0.0.0", "its port is published on this machine's loopback alone"
    assert made(tmp_path, asked, ("python", "x.py")).argv == ("python", "x.py")


def test_an_image_runs_in_a_container_and_has_its_own_packages(tmp_path):
    command = made(tmp_path, Setup(image="mine:1"))
    assert (command.runtime, command.image) == ("container", "mine:1")
    with pytest.raises(SpecError, match="name one of the two"):
        Setup(image="mine:1", requirements=Path("r.txt"))
    with pytest.raises(SpecError, match="container"):
        Setup(image="mine:1", runtime="process")


def test_the_url_is_that_which_jupyterlab_wrote_and_none_before(tmp_path, packages):
    packages["jupyterlab"] = "4.0"
    command = made(tmp_path, Setup(requirements=Path("r.txt")))
    lease = Lease(
        id="l-1",
        run_id="w-1",
        stage="workspace",
        envelope=Envelope(cpus=1, memory_bytes=1 << 20),
        command=command,
        state=LeaseState.ACTIVE,
        attempt=1,
        node="local",
    )
    assert jupyter_url(tmp_path, lease) == ""
    folder = tmp_path / "runs/w-1/workspace/workers/0/1/jupyter"
    folder.mkdir(parents=True)
    (folder / "jpserver-7.json").write_text('{"port": 81')
    assert jupyter_url(tmp_path, lease) == "", "half written"
    (folder / "jpserver-7.json").write_text(json.dumps({"port": 8123, "base_url": "/", "token": "abc"}))
    assert jupyter_url(tmp_path, lease) == "http://127.0.0.1:8123/lab?token=abc"
