"""The parser of strace's lines: on lines as strace wrote them, on whole traces made up by hypothesis, and on a real one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.images.strace import (
    MAX_KEPT_UNREAD,
    Call,
    Ended,
    PathUse,
    Signal,
    StraceParser,
    decode_string,
    descriptor_path,
    parse,
)


def one(line: str) -> Call:
    parser = StraceParser()
    record = parser.feed(line)
    assert parser.unread == []
    assert isinstance(record, Call)
    return record


def test_a_call_with_a_path_names_the_directory_the_path_and_the_file_it_gave() -> None:
    call = one('7 openat(AT_FDCWD</srv>, "a.py", O_RDONLY|O_CLOEXEC) = 3</srv/app/a.py>')
    assert (call.pid, call.name, call.result, call.error, call.result_path) == (7, "openat", 3, "", "/srv/app/a.py")
    assert call.arguments == ("AT_FDCWD</srv>", '"a.py"', "O_RDONLY|O_CLOEXEC")
    (path,) = call.paths()
    assert (path.directory, path.path, path.use, path.follows) == ("/srv", "a.py", PathUse.OPENED, True)


def test_a_failed_call_keeps_the_name_of_its_error() -> None:
    call = one('12 newfstatat(AT_FDCWD</>, "/x", 0x7ffe, AT_SYMLINK_NOFOLLOW) = -1 ENOENT (No such file or directory)')
    assert call.failed
    assert (call.result, call.error) == (-1, "ENOENT")
    assert not call.paths()[0].follows


@pytest.mark.parametrize(
    ("line", "arguments", "result"),
    [
        ("getuid()                          = 0", (), 0),
        ("[pid    41] mprotect(0x7f00, 4096, PROT_READ) = 0", ("0x7f00", "4096", "PROT_READ"), 0),
        ("41 12:00:01.000002 brk(NULL) = 0x55d0 <0.000004>", ("NULL",), 0x55D0),
        ("41 1700000000.123456 umask(022) = 077", ("022",), 0o77),
        ("     0.000031 exit_group(0) = ?", ("0",), None),
        (
            "41 clone(child_stack=0x7f, flags=CLONE_VM|CLONE_FS, parent_tid=[42], tls=0x7f) = 42",
            ("child_stack=0x7f", "flags=CLONE_VM|CLONE_FS", "parent_tid=[42]", "tls=0x7f"),
            42,
        ),
        (
            "41 wait4(42, [{WIFEXITED(s) && WEXITSTATUS(s) == 0}], 0, NULL) = 42",
            ("42", "[{WIFEXITED(s) && WEXITSTATUS(s) == 0}]", "0", "NULL"),
            42,
        ),
        ('9 execve("/bin/a", ["a", "b, c) = 0"], 0x7f /* 38 vars, (more) */) = 0', None, 0),
        ("9 capset({version=3, pid=0}, {effective=1<<CAP_CHOWN|1<<CAP_KILL}) = 0", None, 0),
        (
            "9 read(5<TCP:[127.0.0.1:80->127.0.0.1:90]>, 0x7f, 16) = -1 EAGAIN (Resource temporarily unavailable)",
            ("5<TCP:[127.0.0.1:80->127.0.0.1:90]>", "0x7f", "16"),
            -1,
        ),
        ("9 ppoll([{fd=3, events=POLLIN}], 1, NULL, NULL, 8) = 0 (Timeout)", None, 0),
        ('9 read(0</dev/null<char 1:3>>, "", 1) = 0', ("0</dev/null<char 1:3>>", '""', "1"), 0),
        ('9 write(1<UNIX-STREAM:[3->4,"/run/a>b"]>, "<unfinished ...>", 16) = 16', None, 16),
        ("9 pause( <unfinished ...>) = ?", (), None),
        (
            "9 restart_syscall(<... resuming interrupted read ...>) = ? ERESTART_RESTARTBLOCK (Interrupted by signal)",
            None,
            None,
        ),
    ],
)
def test_lines_as_strace_writes_them_are_read(line: str, arguments: tuple[str, ...] | None, result: int | None) -> None:
    call = one(line)
    assert call.result == result
    if arguments is not None:
        assert call.arguments == arguments


def test_a_call_that_was_cut_in_two_is_one_record_though_others_ended_between() -> None:
    records = list(
        parse(
            [
                "1 read(4<pipe:[9]>,  <unfinished ...>",
                "2 getpid( <unfinished ...>",
                '1 <... read resumed>"x", 50000)      = 1',
                "2 <... getpid resumed>)             = 2",
                "1 --- SIGCHLD {si_signo=SIGCHLD, si_pid=2} ---",
                "2 +++ exited with 3 +++",
                "1 +++ killed by SIGSEGV (core dumped) +++",
            ]
        )
    )
    assert [(r.pid, r.name) for r in records[:2] if isinstance(r, Call)] == [(1, "read"), (2, "getpid")]
    assert isinstance(records[0], Call)
    assert records[0].arguments == ("4<pipe:[9]>", '"x"', "50000")
    assert records[2:] == [Signal(pid=1, name="SIGCHLD"), Ended(pid=2, exit_code=3), Ended(pid=1, signal="SIGSEGV")]


def test_a_thread_that_executes_a_program_goes_on_as_its_process() -> None:
    lines = [
        '8 execve("/bin/a", ["a"], 0x7f <unfinished ...>',
        "7 +++ superseded by execve in pid 8 +++",
        "7 <... execve resumed>) = 0",
    ]
    (call,) = parse(lines)
    assert isinstance(call, Call)
    assert (call.pid, call.name, call.paths()[0].use) == (7, "execve", PathUse.EXECUTED)


def test_a_call_that_never_returned_is_told_at_the_end_of_the_trace() -> None:
    (call,) = parse(['5 openat(AT_FDCWD</>, "/a", O_RDONLY <unfinished ...>'])
    assert isinstance(call, Call)
    assert (call.result, call.paths()[0].path) == (None, "/a")


def test_a_file_that_is_opened_to_be_written_counts_as_changed() -> None:
    assert one('1 open("/tmp/a", O_WRONLY|O_CREAT, 0666) = 3').paths()[0].use is PathUse.CHANGED
    moved = one('1 renameat2(3</a>, "x", 4</b>, "y", 0) = 0').paths()
    assert [(path.directory, path.path) for path in moved] == [("/a", "x"), ("/b", "y")]


def test_words_of_a_programs_arguments_are_never_taken_for_flags() -> None:
    (path,) = one('1 execve("/bin/a", ["a", "AT_SYMLINK_NOFOLLOW"], 0x7f) = 0').paths()
    assert path.follows


def test_what_strace_says_itself_is_no_call() -> None:
    parser = StraceParser()
    said = ["strace: Process 9 attached", "[ Process PID=9 runs in 32 bit mode. ]", "", "9 --- stopped by SIGTSTP ---"]
    assert [parser.feed(line) for line in said] == [None] * 4
    assert parser.unread_count == 0


def test_unreadable_lines_are_counted_and_the_first_are_kept() -> None:
    parser = StraceParser()
    lines = ["7 openat(AT_FDCWD", "7 <... read resumed>) = 0", "hello"] + [f"garbage {i}" for i in range(100)]
    assert list(parse(lines, parser)) == []
    assert parser.unread_count == len(lines)
    assert parser.unread == lines[:MAX_KEPT_UNREAD]


def test_a_descriptors_file_is_unescaped_and_a_socket_has_none() -> None:
    assert descriptor_path(r"4</a\74b\76\n\"\303\251>") == '/a<b>\n"é'
    assert descriptor_path("4<socket:[12]>") == ""
    assert descriptor_path("AT_FDCWD</tmp/a->") == "/tmp/a-"


# Whole traces: records made up, written as strace writes them, and read back.

names = st.sampled_from(["read", "openat", "stat", "futex", "clone3", "execve"])
plain = st.sampled_from(
    ["NULL", "0x7ffd", "AT_FDCWD", "O_RDONLY|O_CLOEXEC", "{st_mode=S_IFREG|0644, ...}", "[CHLD]", "flags=0", "-1"]
)


def quoted(data: bytes) -> str:
    """As strace quotes: printable ASCII as it is, letters for what has one, else octal digits as few as the next allows."""
    letters = {10: "n", 9: "t", 13: "r", 11: "v", 12: "f"}
    out = []
    for place, byte in enumerate(data):
        if byte in b'"\\':
            out.append("\\" + chr(byte))
        elif byte in letters:
            out.append("\\" + letters[byte])
        elif 32 <= byte < 127:
            out.append(chr(byte))
        else:
            following = data[place + 1 : place + 2]
            out.append(f"\\{byte:03o}" if following and following in b"0123456789" else f"\\{byte:o}")
    return '"' + "".join(out) + '"'


def told(data: bytes) -> str:
    inside = quoted(b"/" + data)[1:-1]
    return "3<" + inside.replace("<", r"\74").replace(">", r"\76") + ">"


strings = st.binary(max_size=12)
arguments = st.lists(
    st.one_of(plain, strings.map(quoted), strings.filter(lambda b: b"<" not in b and b">" not in b).map(told)), max_size=5
)
results = st.one_of(st.integers(0, 1 << 40).map(lambda n: (n, "")), st.just((-1, "ENOENT")), st.just((None, "")))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    result, error = draw(results)
    return Call(pid=draw(st.integers(1, 4)), name=draw(names), arguments=tuple(draw(arguments)), result=result, error=error)


def ending(call: Call) -> str:
    if call.result is None:
        return ")  = ?"
    return f") = {call.result}" + (f" {call.error} (No such file or directory)" if call.error else "")


@given(st.lists(calls(), max_size=12), st.data())
def test_what_is_written_as_strace_does_is_read_back(written: list[Call], data: st.DataObject) -> None:
    lines: list[str] = []
    open_ones: dict[int, tuple[Call, int]] = {}
    expected: list[Call] = []

    def finish(pid: int) -> None:
        call, cut = open_ones.pop(pid)
        rest = ", ".join(call.arguments[cut:])
        lines.append(f"{pid} <... {call.name} resumed>{', ' if 0 < cut < len(call.arguments) else ''}{rest}{ending(call)}")
        expected.append(call)

    for call in written:
        if call.pid in open_ones:
            finish(call.pid)
        if data.draw(st.booleans()):
            cut = data.draw(st.integers(0, len(call.arguments)))
            lines.append(f"{call.pid} {call.name}({', '.join(call.arguments[:cut])} <unfinished ...>")
            open_ones[call.pid] = (call, cut)
        else:
            lines.append(f"{call.pid} {call.name}({', '.join(call.arguments)}{ending(call)}")
            expected.append(call)
    for pid in list(open_ones):
        finish(pid)
    parser = StraceParser()
    assert [replace(record, result_path="") for record in parse(lines, parser) if isinstance(record, Call)] == expected
    assert parser.unread == []


@given(st.binary())
def test_a_quoted_string_is_read_back_byte_for_byte(data: bytes) -> None:
    assert decode_string(quoted(data)) == data
    assert decode_string(quoted(data) + "...") == data


@given(st.lists(st.text(alphabet='ab"\\<>()[]{},=-0179 \t?+./*', max_size=60), max_size=4))
def test_no_line_breaks_the_parser_and_each_is_a_record_or_unread(lines: list[str]) -> None:
    parser = StraceParser()
    records = list(parse([f"7 x{line})" for line in lines], parser))
    assert len(records) + parser.unread_count == len(lines)


@pytest.mark.real
def test_a_real_trace_is_read_to_its_last_line(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, subprocess, threading\n"
        "threads = [threading.Thread(target=os.listdir, args=('/',)) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "os.chdir(os.path.dirname(__file__)); open('a<b>\\n\"é', 'w').close()\n"
        "subprocess.run(['true'])\n"
    )
    out = tmp_path / "trace"
    command = [strace, "-f", "-yy", "-o", str(out), sys.executable, str(program)]
    if subprocess.run(command, timeout=60, check=False).returncode != 0:
        pytest.skip("this machine does not let one process trace another")
    parser = StraceParser()
    with out.open(errors="surrogateescape") as lines:
        records = list(parse(lines, parser))
    assert parser.unread == []
    made = [r for r in records if isinstance(r, Call) and r.result_path == str(tmp_path / 'a<b>\n"é')]
    assert made[0].paths()[0].use is PathUse.CHANGED
    assert made[0].paths()[0].directory == str(tmp_path)
    executed = [r for r in records if isinstance(r, Call) and r.name == "execve" and not r.failed]
    assert len(executed) == 2
    assert sum(isinstance(r, Ended) for r in records) == 6
