"""What a guest is told, and what is taken out of its console: pure, no guest is started."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.nouns.test_cpio import read

from tenure.runtimes.microvm_config import Console, KernelWords, Said, note_of, start_archive

TOKEN = "0123abcd"
OUTPUT = st.binary(max_size=20).filter(lambda data: b"\x01" not in data)
PIECES = st.lists(st.one_of(OUTPUT, st.sampled_from(["up 0", "program 7", "exit 3 0 0", "file result.json 7b7d"])), max_size=8)


@given(PIECES, st.integers(1, 7))
def test_what_is_said_is_taken_out_of_the_output_however_it_is_cut(pieces, step):
    sent = b"".join(piece if isinstance(piece, bytes) else f"\x01{TOKEN} {piece}\n".encode() for piece in pieces)
    console, output, said = Console(TOKEN), b"", []
    for at in range(0, len(sent), step):
        for part in console.feed(sent[at : at + step]):
            if isinstance(part, Said):
                said.append(" ".join([part.word, *part.rest]))
            else:
                output += part
    output += console.rest()
    assert output == b"".join(piece for piece in pieces if isinstance(piece, bytes))
    assert said == [piece for piece in pieces if isinstance(piece, str)]


def test_a_program_that_knows_no_token_says_nothing_in_the_guests_name():
    console = Console(TOKEN)
    parts = [*console.feed(b"\x01wrong exit 0 0 0\n"), console.rest()]
    assert b"".join(part for part in parts if isinstance(part, bytes)) == b"\x01wrong exit 0 0 0\n"


def test_command_environment_and_secrets_are_words_of_the_archive_and_folders_are_the_guests():
    data = start_archive(
        token=TOKEN,
        argv=["/bin/x", "a b", ""],
        env={"SECRET": "s=1"},
        workdir="/srv",
        root_type="squashfs",
        modules=["a.ko", "b.ko"],
        lease=b"{}",
        pids_max=100,
    )
    words = read(data)["config"][1].split(b"\0")
    assert [word for word in words if word.startswith(b"arg=")] == [b"arg=/bin/x", b"arg=a b", b"arg="]
    assert [word for word in words if word.startswith(b"module=")] == [b"module=a.ko", b"module=b.ko"]
    assert {b"env=SECRET=s=1", b"workdir=/srv", b"root=squashfs", b"worker=/run/tenure/worker"} <= set(words)
    assert read(data)["config"][0] & 0o777 == 0o600


@pytest.mark.parametrize("more", [{"argv": ["a\0b"]}, {"env": {"A": "x" * (1 << 20)}}, {"argv": ["x"] * 5000}])
def test_what_the_first_program_could_not_read_is_refused(more):
    words = {"argv": ["x"], "env": {}} | more
    with pytest.raises(ValueError, match=r"zero byte|at most"):
        start_archive(token=TOKEN, workdir="/", root_type="", modules=[], lease=b"", **words)


def test_the_kernels_own_lines_are_told_from_a_programs():
    kernel = KernelWords()
    kernel.feed(b"Out of memory: Killed process 1 (mine)\nKernel panic - not syncing: mine\n")
    assert (kernel.out_of_memory, kernel.panic) == ("", "")
    kernel.feed(b"[    1.2] Out of memory: Kil")
    kernel.feed(b"led process 79 (python3)\r\n[    2.0] Kernel panic - not syncing: System is deadlocked on memory\r\n")
    note = note_of({"up": Said("up", ("0",))}, kernel, boots=1)
    assert note["out_of_memory"].endswith("Killed process 79 (python3)")
    assert note["panic"].endswith("deadlocked on memory")
    assert note["exit"] is None
