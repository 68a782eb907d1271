"""ELF objects say what they need, and libraries are found as ld.so finds them."""

import os
import struct
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.images.elf import find_library, read_elf


def an_object(*, needed=(), runpath="", rpath="", interpreter="", soname="", order="<", wide=True):
    """Return the bytes of an ELF file with one loaded segment at address 0x1000, which holds all of it."""
    strings, places = b"\0", {}
    for text in (*needed, runpath, rpath, soname):
        places[text] = len(strings)
        strings += text.encode() + b"\0"
    base, word = 0x1000, "qQ" if wide else "iI"
    tags = [(1, places[name]) for name in needed]
    tags += [(29, places[runpath])] if runpath else []
    tags += [(15, places[rpath])] if rpath else []
    tags += [(14, places[soname])] if soname else []
    heads = 2 + bool(interpreter)
    start = 64 + heads * (56 if wide else 32)
    middle = interpreter.encode() + b"\0" if interpreter else b""
    table = start + len(middle)
    dynamic = b"".join(struct.pack(order + word, *tag) for tag in [*tags, (5, base + table), (10, len(strings)), (0, 0)])
    total = table + len(strings) + len(dynamic)

    def head(kind, offset, size):
        fields = (
            (kind, 4, offset, base + offset, 0, size, size, 1) if wide else (kind, offset, base + offset, 0, size, size, 4, 1)
        )
        return struct.pack(order + ("IIQQQQQQ" if wide else "IIIIIIII"), *fields)

    segments = head(1, 0, total) + head(2, table + len(strings), len(dynamic))
    segments += head(3, start, len(middle)) if interpreter else b""
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    rest = struct.pack(
        order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"), 3, 62, 1, 0, 64, 0, 0, 64, 56 if wide else 32, heads, 0, 0, 0
    )
    return (ident + rest).ljust(64, b"\0") + segments + middle + strings + dynamic


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("wide", [True, False])
def test_what_an_object_says_is_read(tmp_path, order, wide):
    path = tmp_path / "lib/a.so"
    path.parent.mkdir()
    path.write_bytes(
        an_object(
            needed=("libb.so.1", "libc.so.6"),
            runpath="$ORIGIN/../x:/y",
            soname="liba.so",
            interpreter="/ld.so",
            order=order,
            wide=wide,
        )
    )
    found = read_elf(str(path))
    assert found.needed == ("libb.so.1", "libc.so.6")
    assert found.runpath == (f"{tmp_path}/x", "/y")
    assert (found.soname, found.interpreter, found.bits, found.machine) == ("liba.so", "/ld.so", 64 if wide else 32, "x86_64")


def test_the_running_python_and_its_libraries_are_all_found():
    waiting, seen = [read_elf(os.path.realpath(sys.executable))], set()
    assert waiting[0] is not None
    while waiting:
        item = waiting.pop()
        for name in item.needed:
            found = find_library(name, item)
            assert found is not None, f"{name} of {item.path}"
            if found.path not in seen:
                seen.add(found.path)
                waiting.append(read_elf(found.path))
    assert any("libc.so" in path for path in seen)


def library(folder, name, **fields):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(an_object(**fields))
    return read_elf(str(folder / name))


def test_the_order_of_the_search_is_that_of_the_linker(tmp_path):
    for folder in ("rpath", "env", "runpath"):
        library(tmp_path / folder, "libx.so")
    old = library(tmp_path, "old.so", needed=("libx.so",), rpath=f"{tmp_path}/rpath")
    new = library(tmp_path, "new.so", needed=("libx.so",), rpath=f"{tmp_path}/rpath", runpath=f"{tmp_path}/runpath")
    env = [f"{tmp_path}/env"]
    assert find_library("libx.so", old, library_path=env).path == f"{tmp_path}/rpath/libx.so"
    assert find_library("libx.so", new, library_path=env).path == f"{tmp_path}/env/libx.so"  # RUNPATH: RPATH is not looked at
    assert find_library("libx.so", new).path == f"{tmp_path}/runpath/libx.so"
    assert find_library("liby.so", new) is None


def test_a_library_of_another_machine_is_passed_over(tmp_path):
    library(tmp_path / "narrow", "libx.so", wide=False)
    wide = library(tmp_path / "wide", "libx.so")
    item = library(tmp_path, "a.so", needed=("libx.so",), runpath=f"{tmp_path}/narrow:{tmp_path}/wide")
    assert find_library("libx.so", item).path == wide.path


@given(st.data())
@settings(deadline=None)
def test_damage_never_raises(tmp_path_factory, data):
    good = an_object(needed=("libb.so",), interpreter="/ld.so")
    at = data.draw(st.integers(0, len(good) - 1))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(good[:at] + data.draw(st.binary(max_size=8)) + good[data.draw(st.integers(at, len(good))) :])
    read_elf(str(path))


def test_other_files_are_no_objects(tmp_path):
    (tmp_path / "text").write_text("#!/bin/sh\n")
    assert read_elf(str(tmp_path / "text")) is None
    assert read_elf(str(tmp_path / "missing")) is None
    assert replace(library(tmp_path, "a.so"), machine="arm").machine == "arm"
