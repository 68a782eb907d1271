import os

import pytest

from tenure.errors import Unsupported
from tenure.runtimes import confiner
from tenure.runtimes.confiner import find_confiner


@pytest.fixture
def unified(tmp_path, monkeypatch):
    """A folder with the files of a delegated v2 group: what is written can be read, nothing is enforced."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    (tmp_path / "cgroup.subtree_control").write_text("")
    (tmp_path / "cgroup.procs").write_text("")
    monkeypatch.setattr(confiner, "_own", lambda: {"": str(tmp_path)})
    return tmp_path


def test_a_v2_group_that_lacks_controllers_is_not_used(unified):
    (unified / "cgroup.controllers").write_text("cpu")
    found = find_confiner("auto")
    assert found.kind == "rlimit"
    assert "lacks memory (it has cpu)" in found.describe()
    with pytest.raises(Unsupported, match="lacks"):
        find_confiner("cgroup")


def test_a_user_with_a_manager_of_sessions_is_told_how_to_get_more(monkeypatch):
    def refused(_):
        raise PermissionError(13, "Permission denied", "/sys/fs/cgroup/user.slice/x/cgroup.procs")

    monkeypatch.setattr(confiner, "_find_v1", refused)
    monkeypatch.setattr(confiner, "_find_v2", refused)
    there = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: str(path).endswith("systemd/private") or there(path))
    assert "systemd-run --user --scope -p Delegate=yes tenure up" in find_confiner().describe()


def test_without_the_right_to_make_groups_the_reason_is_told_in_words(monkeypatch):
    def refused(_):
        raise PermissionError(13, "Permission denied", "/sys/fs/cgroup/cpu/x/tenure.probe.1")

    monkeypatch.setattr(confiner, "_find_v1", refused)
    monkeypatch.setattr(confiner, "_find_v2", refused)
    assert "(/sys/fs/cgroup/cpu/x: Permission denied; " in find_confiner().describe()
    assert "both advisory" in find_confiner().describe()
