"""Profiles of system calls: what a compiled filter decides is what its rules say, and a process under one can do no more."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.data.system_calls import numbers
from tenure.errors import SpecError
from tenure.runtimes.seccomp import compile_profile, compiled, for_container, parse_profile, read_profile

ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COMPARE = {
    "SCMP_CMP_EQ": lambda found, value, two: found == value,
    "SCMP_CMP_NE": lambda found, value, two: found != value,
    "SCMP_CMP_MASKED_EQ": lambda found, value, two: found & value == two,
    "SCMP_CMP_GT": lambda found, value, two: found > value,
    "SCMP_CMP_GE": lambda found, value, two: found >= value,
    "SCMP_CMP_LT": lambda found, value, two: found < value,
    "SCMP_CMP_LE": lambda found, value, two: found <= value,
}


def run(program: bytes, arch: int, number: int, arguments: list[int]) -> int:
    """What the kernel's machine makes of one call (classic BPF, as far as seccomp has it)."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments)
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    place = accumulator = 0
    while True:
        operation, yes, no, value = code[place]
        place += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x06:
            return value
        else:
            held = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}[operation]
            place += yes if held else no


def profile(*rules: dict[str, Any], **other: Any) -> str:
    return json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": list(rules), **other})


words = st.one_of(st.integers(0, 5), st.sampled_from([1 << 32, (1 << 32) + 3, 0x7E020000, (1 << 64) - 1, 0xFFFFFFFF]))
conditions = st.fixed_dictionaries(
    {"index": st.integers(0, 5), "value": words, "valueTwo": words, "op": st.sampled_from(sorted(COMPARE))}
)
rules = st.fixed_dictionaries(
    {
        "names": st.lists(st.sampled_from(["read", "write", "clone", "socket", "openat"]), min_size=1, max_size=3),
        "action": st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_LOG"]),
        "args": st.lists(conditions, max_size=3),
    }
)


@given(st.lists(rules, max_size=5), st.sampled_from(sorted(ARCH)), st.data())
def test_the_filter_decides_as_the_first_rule_that_fits(drawn: list[dict[str, Any]], machine: str, data: st.DataObject) -> None:
    program = compile_profile(parse_profile(profile(*drawn), machine), machine)
    name = data.draw(st.sampled_from(["read", "write", "clone", "socket", "openat", "mount"]))
    arguments = data.draw(st.lists(words, min_size=6, max_size=6))
    actions = {"SCMP_ACT_ALLOW": ALLOW, "SCMP_ACT_KILL_PROCESS": KILL_PROCESS, "SCMP_ACT_LOG": 0x7FFC0000}
    expected = ERRNO | 38
    for rule in drawn:
        fits = all(COMPARE[c["op"]](arguments[c["index"]], c["value"], c["valueTwo"]) for c in rule["args"])
        if name in rule["names"] and fits:
            expected = actions[rule["action"]]
            break
    assert run(program, ARCH[machine], numbers(machine)[name], arguments) == expected


def test_calls_of_other_architectures_are_not_let_through() -> None:
    program = compile_profile(parse_profile(profile({"names": ["read"], "action": "SCMP_ACT_ALLOW"}), "x86_64"), "x86_64")
    assert run(program, ARCH["x86_64"], 0, [0] * 6) == ALLOW
    assert run(program, 0x40000003, 0, [0] * 6) == KILL_PROCESS  # i386
    assert run(program, ARCH["x86_64"], 0x40000000, [0] * 6) == ERRNO | 38  # x32


def test_rules_for_other_machines_and_for_capabilities_do_not_hold() -> None:
    text = profile(
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390x"]}},
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
    )
    assert [rule.names for rule in parse_profile(text, "x86_64").rules] == [("clone",)]
    assert [rule.names for rule in parse_profile(text, "aarch64").rules] == [("clone",), ("read",)]


@pytest.mark.parametrize(
    "text",
    [
        "secret of somebody",
        "[]",
        '{"syscalls": []}',
        '{"defaultAction": "secret"}',
        profile({"names": ["read"]}),
        profile({"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 9, "value": 0, "op": "SCMP_CMP_EQ"}]}),
        profile({"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5000}),
    ],
)
def test_a_file_that_is_no_profile_is_refused_without_telling_what_is_in_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"lease l-1: .*profile\.json") as error:
        read_profile(str(path), whose="lease l-1")
    assert "secret" not in str(error.value)


def test_a_profile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"/nowhere/x\.json can't be read: No such file"):
        read_profile("/nowhere/x.json", whose="lease l-1")
    with pytest.raises(SpecError, match="absolute"):
        read_profile("x.json", whose="lease l-1")
    os.mkfifo(tmp_path / "fifo")  # nobody ever writes into it
    with pytest.raises(SpecError, match="no regular file"):
        read_profile(str(tmp_path / "fifo"), whose="lease l-1")


def test_for_a_container_the_engine_may_start_it_and_make_no_namespace() -> None:
    own = profile({"names": ["read", "ioctl", "clone"], "action": "SCMP_ACT_ALLOW"})
    program = compile_profile(parse_profile(for_container(own, whose="x"), "x86_64"), "x86_64")
    fork, namespace = 17, 0x10000000
    decided = {
        name: run(program, ARCH["x86_64"], numbers("x86_64")[name.split()[0]], [flags] + [0] * 5)
        for name, flags in {"clone": fork, "clone of a user namespace": namespace, "setpgid": 0, "read": 0, "mount": 0}.items()
    }
    assert [name for name, action in decided.items() if action == ALLOW] == ["clone", "setpgid", "read"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (profile({"names": ["read", "unshare", "mount"], "action": "SCMP_ACT_ALLOW"}), "lets through mount, unshare"),
        (profile({"names": ["bpf"], "action": "SCMP_ACT_LOG"}), "lets through bpf"),
        (profile(defaultAction="SCMP_ACT_ALLOW"), "refuses only what it names"),
    ],
)
def test_no_profile_widens_what_a_container_may_do(text: str, found: str) -> None:
    with pytest.raises(SpecError, match=f"lease l-1: .*{found}"):
        for_container(text, whose="lease l-1")


@pytest.mark.real
def test_a_process_under_a_filter_can_do_what_it_lets_through_and_no_more() -> None:
    if os.uname().machine not in ARCH:
        pytest.skip("no filter can be made on this machine")
    text = json.dumps(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                {
                    "names": ["socket"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 97,
                    "args": [{"index": 0, "value": 16, "op": "SCMP_CMP_EQ"}],
                },
            ],
        }
    )
    inside = (
        "import os, socket, sys\n"
        "from tenure.runtimes.become import filter_calls\n"
        "filter_calls(bytes.fromhex(sys.argv[1]))\n"
        "def tried(work):\n"
        "    try: work(); return 0\n"
        "    except OSError as error: return error.errno\n"
        "print(tried(lambda: os.mkdir('/tmp/never')), tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),"
        " tried(lambda: socket.socket().close()))\n"
        "print(os.system('mkdir /tmp/never 2>/dev/null') != 0)\n"
    )
    command = [sys.executable, "-c", inside, compiled(text).hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "refused the filter" in done.stderr:
        pytest.skip("this kernel takes no filter here")
    assert done.stdout.split() == ["38", "97", "0", "True"], done.stderr
