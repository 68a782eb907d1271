"""Which folders of this machine a container may see, without any engine."""

import os

import pytest

from tenure.errors import SpecError, Unsupported
from tenure.runtimes.container_checks import check_source, check_target


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
