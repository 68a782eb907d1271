"""Which folders of this machine a container may see, without any engine."""

import os

import pytest

from tenure.errors import SpecError, Unsupported
from tenure.runtimes.container_checks import check_source, check_target
from tenure.runtimes.container_job import container_groups


@pytest.mark.parametrize(
    "path", ["/", "/etc", "/etc/ssl", "/var/lib", "/var/lib/docker/volumes", "/proc/self", "/dev/shm", "/run"]
)
def test_what_belongs_to_the_machine_or_its_engines_is_sealed(path):
    with pytest.raises(Unsupported, match="mounts"):
        check_source(path)


@pytest.mark.parametrize("path", ["/var/lib/tenure/homes/alice", "/home/alice/project", "/srv/data"])
def test_a_folder_of_somebodys_own_is_not(path):
    check_source(path)


def test_a_folder_that_holds_or_lies_in_a_sealed_one_is_sealed_and_links_are_followed(tmp_path):
    sealed = tmp_path / "home/nodes"
    sealed.mkdir(parents=True)
    (tmp_path / "link").symlink_to(sealed)
    for path in (sealed, sealed / "a", tmp_path, tmp_path / "link"):
        with pytest.raises(Unsupported, match="nodes"):
            check_source(str(path), sealed=(str(sealed),))
    check_source(str(tmp_path / "home/runs"), sealed=(str(sealed),))


def test_sockets_and_devices_are_not_mounted(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unsupported, match="neither a folder nor a file"):
        check_source(str(tmp_path / "pipe"))


@pytest.mark.parametrize("path", ["relative", "/with:colon", "/usr", "/proc/x", "/", "/tmp"])
def test_a_place_inside_is_one_of_its_own(path):
    with pytest.raises(SpecError, match="place inside"):
        check_target(path)


V1 = "".join(
    f"{number} 1 0:{number} / /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"
    for number, name in enumerate(("memory", "cpu", "pids", "cpuacct"), 20)
)
V2 = "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
ID = "0123456789abcdef" * 4


def test_a_containers_groups_are_those_named_after_it():
    alive = "".join(f"{n}:{name}:/docker/{ID}\n" for n, name in enumerate(("memory", "cpu", "pids", "cpuacct"), 2))
    found = container_groups(V1, alive, ID)
    assert found.kind == "v1"
    assert all(path.endswith(f"/docker/{ID}") for path in found.groups.values())
    assert container_groups(V2, f"0::/system.slice/docker-{ID}.scope\n", ID).kind == "v2"


@pytest.mark.parametrize("mountinfo", [V1, V2])
@pytest.mark.parametrize("place", ["/", "/user.slice/session-1.scope", "/docker/" + "f" * 64])
def test_a_process_that_has_just_ended_lies_in_the_root_and_nobody_elses_group_is_ever_taken_for_the_containers(
    mountinfo, place
):
    ended = "".join(f"{n}:{name}:{place}\n" for n, name in enumerate(("memory", "cpu", "pids", "cpuacct"), 2)) + f"0::{place}\n"
    found = container_groups(mountinfo, ended, ID)
    assert found.kind == "rlimit"
    assert found.members() == []
