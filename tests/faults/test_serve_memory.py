"""Shared memory that a client registered is removed or cut short, before and during use: nobody else notices."""

import contextlib
import json
import os
import threading
from multiprocessing import shared_memory

import numpy as np
import pytest
from tests.serve.conftest import Server

from .serving import WIDTH, ask_http, instances, loads, until, write_scaled

pytestmark = pytest.mark.real
ROWS = 4096
NBYTES = ROWS * WIDTH * 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    (folder / "models").mkdir()
    write_scaled(folder / "models" / "double.onnx", 2.0)
    write_scaled(folder / "models" / "other.onnx", 3.0)
    started = Server(folder / "models", folder / "w", "--threads", "1")
    yield started
    assert started.end() == 0


@contextlib.contextmanager
def region(server, name):
    """Register shared memory full of ones; give its object."""
    memory = shared_memory.SharedMemory(create=True, size=NBYTES)
    try:
        memory.buf[:NBYTES] = np.ones(NBYTES // 4, np.float32).tobytes()
        key = f"/{memory.name.lstrip('/')}"
        body = json.dumps({"key": key, "offset": 0, "byte_size": NBYTES}).encode()
        assert ask_http(server, "POST", f"/v2/systemsharedmemory/region/{name}/register", body)[0] == 200
        yield memory
    finally:
        ask_http(server, "POST", f"/v2/systemsharedmemory/region/{name}/unregister")
        memory.close()
        with contextlib.suppress(FileNotFoundError):
            memory.unlink()


def ask(server, name, *, size=NBYTES, rows=ROWS):
    """Ask for the double of a region; return status and the first value, or the reason."""
    where = {"shared_memory_region": name, "shared_memory_byte_size": size}
    tensor = {"name": "x", "shape": [rows, WIDTH], "datatype": "FP32", "parameters": where}
    status, found, _ = ask_http(server, "POST", "/v2/models/double/infer", json.dumps({"inputs": [tensor]}).encode())
    return status, found["outputs"][0]["data"][0] if status == 200 else found["error"]


def test_a_region_whose_name_is_removed_goes_on_and_is_gone_once_unregistered(server):
    with region(server, "removed") as memory:
        assert ask(server, "removed") == (200, 2.0)
        memory.unlink()
        assert ask(server, "removed") == (200, 2.0)
        ask_http(server, "POST", "/v2/systemsharedmemory/region/removed/unregister")
        status, told = ask(server, "removed")
        assert (status, "removed" in told) == (400, True)
        os.close(os.open(f"/dev/shm/{memory.name}", os.O_CREAT | os.O_RDWR, 0o600))  # so that the object can be unlinked


def test_a_region_cut_short_is_told_and_usable_again_once_it_is_whole(server):
    with region(server, "cut") as memory:
        before = [instance.pid for instance in instances(server, "double")]
        os.truncate(f"/dev/shm/{memory.name}", 0)
        status, told = ask(server, "cut")
        assert (status, "cut to 0 bytes" in told) == (400, True)
        os.truncate(f"/dev/shm/{memory.name}", NBYTES)
        assert ask(server, "cut") == (200, 0.0)
        assert [instance.pid for instance in instances(server, "double")] == before


def test_a_region_that_is_cut_again_and_again_under_load_takes_nobody_along(server):
    with region(server, "flapping") as memory, loads(server, "other") as others:
        path, enough = f"/dev/shm/{memory.name}", threading.Event()

        def flap():
            while not enough.is_set():
                os.truncate(path, 0)
                os.truncate(path, NBYTES)

        thread = threading.Thread(target=flap, daemon=True)
        thread.start()
        try:
            found = [ask(server, "flapping") for _ in range(150)]
        finally:
            enough.set()
            thread.join()
        assert {status for status, _ in found} <= {200, 400, 503}, found
        assert all(value == 0.0 for status, value in found if status == 200)  # what was cut reads zero, never something else
        with region(server, "another"):
            until(lambda: ask(server, "another") == (200, 2.0), "the model answers again")
        for load in others:
            load.more()
    for load in others:
        assert load.errors == []
        assert load.right(3.0)


@pytest.mark.parametrize(
    ("key", "offset", "size"),
    [
        ("/../etc/passwd", 0, 16),
        ("/etc/passwd", 0, 16),
        ("", 0, 16),
        ("/none-such", 0, 16),
        (".", 0, 16),
        ("/\0", 0, 16),
    ],
)
def test_only_objects_of_shared_memory_can_be_registered(key, offset, size, server):
    body = json.dumps({"key": key, "offset": offset, "byte_size": size}).encode()
    status, found, _ = ask_http(server, "POST", "/v2/systemsharedmemory/region/bad/register", body)
    assert (status, bool(found["error"])) == (400, True)


@pytest.mark.parametrize(("offset", "size"), [(0, NBYTES * 64), (-1, 16), (2**63 - 1, 16), (NBYTES * 64, 1), (0, 0), (0, -5)])
def test_a_region_must_lie_inside_of_its_object(offset, size, server):
    with region(server, "whole") as memory:
        body = json.dumps({"key": f"/{memory.name}", "offset": offset, "byte_size": size}).encode()
        status, found, _ = ask_http(server, "POST", "/v2/systemsharedmemory/region/part/register", body)
        assert (status, bool(found["error"])) == (400, True)
        assert ask(server, "whole") == (200, 2.0)


@pytest.mark.parametrize(
    ("size", "rows"), [(NBYTES * 2, ROWS * 2), (NBYTES - 4, ROWS), (2**63, 2**58), (-4, ROWS), (10**30, 1)]
)
def test_a_request_must_lie_inside_of_the_region(size, rows, server):
    with region(server, "whole"):
        status, told = ask(server, "whole", size=size, rows=rows)
        assert (status, bool(told)) == (400, True)
        assert ask(server, "whole") == (200, 2.0)
