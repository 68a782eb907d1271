"""Lines of a trace become what a program did: files seen, made and missed, programs started, machines reached."""

import pytest

from tenure.closures import Why
from tenure.images.strace import parse
from tenure.images.trace_read import Sighting, TraceReader, Watched

INET = '{{sa_family=AF_INET, sin_port=htons({}), sin_addr=inet_addr("{}")}}'
INET6 = (
    "{{sa_family=AF_INET6, sin6_port=htons({}), sin6_flowinfo=htonl(0), "
    'inet_pton(AF_INET6, "{}", &sin6_addr), sin6_scope_id=0}}'
)


def read(*lines, root="", workdir="/srv"):
    watched = Watched()
    reader = TraceReader(watched, workdir, root)
    for record in parse(lines):
        reader.take(record)
    return watched


def seen(watched, why=None):
    return {sighting.path for sighting in watched.sightings if why in (None, sighting.why)}


START = '10 execve("/usr/bin/python3", ["python3", "main.py"], 0x7ffe /* 3 vars */) = 0'


def test_opened_looked_at_and_executed_are_told_apart():
    watched = read(
        START,
        '10 openat(AT_FDCWD</srv>, "a", O_RDONLY|O_CLOEXEC) = 3</srv/a>',
        '10 newfstatat(AT_FDCWD</srv>, "b", {st_mode=S_IFREG|0644, st_size=1, ...}, 0) = 0',
        '10 readlink("/usr/bin", 0x7ffd, 4095) = -1 EINVAL (Invalid argument)',
        '10 access("/gone", R_OK) = -1 ENOENT (No such file or directory)',
        '10 openat(AT_FDCWD</srv>, "/secret", O_RDONLY) = -1 EACCES (Permission denied)',
    )
    assert seen(watched, Why.OPENED) == {"/srv/a"}
    assert seen(watched, Why.STATTED) == {"/srv/b", "/usr/bin"}
    assert seen(watched, Why.EXECUTED) == {"/usr/bin/python3"}
    assert watched.absent == {"/gone": "python3 main.py"}
    assert watched.sightings[Sighting("/srv/a", Why.OPENED, True)] == "python3 main.py"


def test_relative_paths_follow_the_folder_a_process_is_in():
    watched = read(
        START,
        '10 chdir("sub") = 0',
        '10 stat("a", {st_mode=S_IFREG|0644, st_size=1, ...}) = 0',
        "10 fchdir(5</other>) = 0",
        '10 stat("../b", {st_mode=S_IFREG|0644, st_size=1, ...}) = 0',
        '10 openat(4</data>, "c", O_RDONLY) = 6</data/c>',
    )
    assert {"/srv/sub/a", "/other/../b", "/data/c"} <= seen(watched)


@pytest.mark.parametrize(
    ("flags", "place"), [("CLONE_VM|CLONE_FS|CLONE_THREAD", "/moved/a"), ("CLONE_CHILD_SETTID|SIGCHLD", "/srv/a")]
)
def test_a_thread_moves_with_its_process_and_a_child_does_not(flags, place):
    watched = read(
        START,
        f"10 clone(child_stack=NULL, flags={flags}, child_tidptr=0x7f) = 11",
        '10 chdir("/moved") = 0',
        '11 stat("a", {st_mode=S_IFREG|0644, st_size=1, ...}) = 0',
    )
    assert place in seen(watched)


def test_what_the_program_makes_is_not_what_it_needs():
    watched = read(
        START,
        '10 openat(AT_FDCWD</srv>, "log", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0666) = 3</srv/log>',
        '10 stat("log", {st_mode=S_IFREG|0644, st_size=0, ...}) = 0',
        '10 mkdir("out", 0777) = 0',
        '10 openat(AT_FDCWD</srv>, "out/x", O_RDWR|O_CREAT|O_EXCL, 0600) = 3</srv/out/x>',
        '10 rename("out/x", "final") = 0',
        '10 openat(AT_FDCWD</srv>, "db", O_RDWR|O_CREAT, 0644) = 4</srv/db>',
    )
    assert {path for path in seen(watched) if watched.was_made(path)} == {"/srv/log"}
    assert watched.was_made("/srv/out/x/deeper")
    assert watched.was_made("/srv/final")
    assert "/srv/db" in seen(watched, Why.OPENED)
    assert not watched.was_made("/srv/db")
    assert set(watched.changed) == {"/srv/log", "/srv/out", "/srv/out/x", "/srv/final", "/srv/db"}


def test_a_file_that_was_there_before_it_was_written_over_is_needed():
    watched = read(
        START,
        '10 openat(AT_FDCWD</srv>, "state", O_RDONLY) = 3</srv/state>',
        '10 openat(AT_FDCWD</srv>, "state", O_WRONLY|O_CREAT|O_TRUNC, 0666) = 3</srv/state>',
    )
    assert not watched.was_made("/srv/state")


def test_programs_it_starts_are_named_and_the_program_itself_is_not():
    watched = read(
        START,
        "10 vfork() = 12",
        '12 execve("/nowhere/sh", ["sh"], 0x7f) = -1 ENOENT (No such file or directory)',
        '12 execve("/bin/sh", ["sh", "-c", "ls"], 0x7f) = 0',
        '12 openat(AT_FDCWD</srv>, "/etc/profile", O_RDONLY) = 3</etc/profile>',
    )
    assert set(watched.started) == {"/bin/sh"}
    assert watched.sightings[Sighting("/etc/profile", Why.OPENED, True)].startswith("sh")


def test_machines_it_reaches_are_named_and_this_one_is_not():
    watched = read(
        START,
        f"10 connect(3<TCP:[1]>, {INET.format(443, '93.184.216.34')}, 16) = -1 EINPROGRESS (Operation now in progress)",
        f"10 connect(3, {INET.format(80, '127.0.0.1')}, 16) = 0",
        f"10 connect(3, {INET.format(53, '10.0.0.2')}, 16) = -1 ECONNREFUSED (Connection refused)",
        f"10 connect(3, {INET6.format(443, '2606::1')}, 28) = 0",
        '10 connect(3, {sa_family=AF_UNIX, sun_path="/run/x"}, 110) = 0',
    )
    assert set(watched.connected) == {"93.184.216.34:443", "2606::1:443"}


def test_of_a_life_in_a_root_of_its_own_only_what_happens_inside_counts():
    watched = read(
        '10 execve("/usr/sbin/chroot", ["chroot", "/img", "python3"], 0x7f) = 0',
        '10 openat(AT_FDCWD</srv>, "/etc/outside", O_RDONLY) = 3</etc/outside>',
        '10 chroot("/img") = 0',
        '10 chdir("/") = 0',
        '10 execve("/usr/bin/python3", ["python3"], 0x7f) = 0',
        '10 openat(AT_FDCWD</img/srv>, "a", O_RDONLY) = 3</img/srv/a>',
        '10 openat(AT_FDCWD</img/srv>, "/usr/lib/x.py", O_RDONLY) = -1 ENOENT (No such file or directory)',
        "10 clone(child_stack=NULL, flags=SIGCHLD) = 11",
        '11 openat(7</img/data>, "b", O_RDONLY) = -1 ENOENT (No such file or directory)',
        root="/img",
    )
    assert seen(watched) == {"/usr/bin/python3", "/srv/a", "/"}
    assert set(watched.absent) == {"/usr/lib/x.py", "/data/b"}
