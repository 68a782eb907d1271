"""System calls of a trace, the profile made of them, and what each form makes of them."""

from __future__ import annotations

import json

import pytest

from tenure.closures import SystemCall
from tenure.data.system_calls import numbers
from tenure.errors import Unsupported
from tenure.images.compatibility import Effect, Verdict, Weight, report, reports, table
from tenure.images.seccomp import ALWAYS, allowed, profile, profile_json
from tenure.images.strace import parse
from tenure.images.system_calls import FALLBACKS, makes_processes, merged, system_calls

CLONE3 = (
    "1 clone3({flags=CLONE_VM|CLONE_FS|CLONE_THREAD, exit_signal=0, stack=0x7f, stack_size=0x7ff} => {parent_tid=[2]}, 88) = 2"
)
FORK = "1 clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|CLONE_CHILD_SETTID|SIGCHLD, child_tidptr=0x7f) = 3"


def call(name: str, *flags: str, count: int = 1) -> SystemCall:
    return SystemCall(name=name, count=count, flags=tuple(sorted(flags)))


def test_calls_are_counted_and_their_flags_collected() -> None:
    lines = [
        "1 mmap(NULL, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f00",
        "1 mmap(NULL, 8192, PROT_EXEC, MAP_PRIVATE, 3</a>, 0) = -1 EINVAL (Invalid argument)",
        '1 openat(AT_FDCWD</>, "/O_TRUNC", O_RDONLY) = -1 ENOENT (No such file or directory)',
        "1 fcntl(3</a>, F_GETFD) = 0",
        "1 io_uring_setup(256, {flags=0x10000 /* IORING_SETUP_??? */, sq_entries=256}) = 4",
        "2 +++ exited with 0 +++",
    ]
    assert system_calls(parse(lines)) == (
        call("fcntl", "F_GETFD"),
        call("io_uring_setup", "0x10000"),
        call("mmap", "MAP_ANONYMOUS", "MAP_PRIVATE", "PROT_EXEC", "PROT_READ", count=2),
        call("openat", "O_RDONLY"),
    )


def test_traces_of_several_exercises_add_up() -> None:
    assert merged([[call("futex", "FUTEX_WAIT", count=2)], [call("futex", "FUTEX_WAKE"), call("read")]]) == (
        call("futex", "FUTEX_WAIT", "FUTEX_WAKE", count=3),
        call("read"),
    )


def test_a_thread_is_told_from_a_process() -> None:
    assert not makes_processes(system_calls(parse([CLONE3])))
    assert makes_processes(system_calls(parse([CLONE3, FORK])))
    assert makes_processes([call("vfork")])


# --- the profile ---


def test_the_profile_lets_through_what_was_seen_and_what_everybody_needs() -> None:
    assert allowed([call("uname"), call("read")]) == tuple(sorted({"uname", *ALWAYS}))


def test_of_calls_of_the_same_power_one_that_was_seen_lets_through_the_other() -> None:
    assert {"epoll_wait", "epoll_pwait"} <= set(allowed([call("epoll_pwait")]))


def test_calls_that_are_tried_and_not_needed_are_refused_and_what_is_called_instead_is_let_through() -> None:
    names = allowed([call(name) for name in FALLBACKS])
    assert not set(names) & set(FALLBACKS)
    assert {"clone", "getdents64", "epoll_ctl"} <= set(names)
    refused = [rule for rule in profile([], machine="x86_64")["syscalls"] if rule["action"] == "SCMP_ACT_ERRNO"]
    assert [rule["errnoRet"] for rule in refused] == [38]
    assert {*FALLBACKS, "statx", "pidfd_open"} <= set(refused[0]["names"])
    assert "statx" not in next(r for r in profile([call("statx")], machine="x86_64")["syscalls"] if "errnoRet" in r)["names"]


def test_a_program_that_makes_threads_only_may_make_no_process() -> None:
    def clone(*lines: str) -> dict[str, object]:
        (rule,) = [r for r in profile(system_calls(parse(lines)), machine="x86_64")["syscalls"] if r["names"] == ["clone"]]
        return rule["args"][0]

    assert clone(CLONE3)["value"] == 0x7E020000 | 0x10000
    assert clone(CLONE3)["valueTwo"] == 0x10000
    assert (clone(CLONE3, FORK)["value"], clone(CLONE3, FORK)["valueTwo"]) == (0x7E020000, 0)


def test_sockets_are_of_the_families_seen_and_of_both_internets_for_one() -> None:
    made = profile([call("socket", "AF_INET", "SOCK_STREAM"), call("socketpair", "AF_UNIX")], machine="x86_64")
    held = [(r["names"][0], r["args"][0]["value"]) for r in made["syscalls"] if "args" in r]
    assert held == [("socket", 2), ("socket", 10), ("socketpair", 1)]


def test_an_argument_that_is_not_understood_is_not_held() -> None:
    made = profile([call("prctl", "PR_SET_NAME", "PR_SOMETHING_NEW")], machine="x86_64")
    assert "prctl" in made["syscalls"][0]["names"]
    assert not any("args" in rule for rule in made["syscalls"])


def test_the_same_calls_make_the_same_text() -> None:
    calls = [call("read"), call("socket", "AF_UNIX")]
    assert profile_json(calls, machine="x86_64") == profile_json(reversed(calls), machine="x86_64")
    assert json.loads(profile_json(calls, machine="aarch64"))["architectures"] == ["SCMP_ARCH_AARCH64"]


# --- forms ---


def test_a_program_of_one_process_runs_in_nanos_and_one_that_forks_does_not() -> None:
    once = system_calls(parse([CLONE3, '1 execve("/bin/a", ["a"], 0x7f /* 3 vars */) = 0']))
    calls = merged([once, once])  # watched twice
    assert report(calls, table("nanos")).verdict is Verdict.RUNS
    forking = report([*calls, call("vfork")], table("nanos"))
    assert forking.verdict is Verdict.CANNOT
    assert {finding.call for finding in forking.reasons} == {"execve", "vfork"}


def test_flags_are_judged_beside_names() -> None:
    calls = [call("futex", "FUTEX_WAIT_PRIVATE", "FUTEX_LOCK_PI_PRIVATE"), call("socket", "AF_PACKET")]
    for name in ("nanos", "unikraft"):
        found = report(calls, table(name)).reasons
        assert [(f.call, f.flag, f.effect) for f in found] == [
            ("futex", "FUTEX_LOCK_PI_PRIVATE", Effect.REFUSED),
            ("socket", "AF_PACKET", Effect.REFUSED),
        ]


def test_what_a_kernel_only_says_it_does_changes_the_program() -> None:
    seen = report([call("flock", "LOCK_EX"), call("chown")], table("nanos"))
    assert seen.verdict is Verdict.CHANGED
    assert [(f.call, f.weight) for f in seen.findings] == [("flock", Weight.CHANGES), ("chown", Weight.HARMLESS)]


def test_a_missing_call_that_has_a_way_around_harms_nothing() -> None:
    assert report([call("rseq"), call("mbind")], table("unikraft")).verdict is Verdict.RUNS


def test_every_form_has_a_report_and_only_a_container_minds_rights() -> None:
    by_form = {each.form: each for each in reports([call("mount"), call("read")])}
    assert list(by_form) == ["root", "oci", "microvm", "nanos", "unikraft"]
    assert [by_form[form].verdict for form in ("root", "oci", "microvm")] == [Verdict.RUNS, Verdict.CANNOT, Verdict.RUNS]
    assert "b9c3671d9b95" in by_form["nanos"].source


@pytest.mark.parametrize("name", ["nanos", "unikraft"])
def test_the_tables_name_only_calls_of_linux_and_none_twice(name: str) -> None:
    kernel = table(name)
    known = set(numbers("x86_64"))
    assert kernel.answered | kernel.ignored | set(kernel.optional) | set(kernel.loader) | set(kernel.flags) <= known
    assert not kernel.answered & kernel.ignored
    assert kernel.harmless <= kernel.ignored
    assert set(kernel.flags) <= kernel.answered | kernel.ignored


def test_numbers_are_those_of_the_architecture() -> None:
    assert (numbers("x86_64")["openat"], numbers("aarch64")["openat"]) == (257, 56)
    with pytest.raises(Unsupported, match="riscv64"):
        numbers("riscv64")
