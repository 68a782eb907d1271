"""An engine that is started anew, killed or gone while leases run; and an engine's answers, good and bad."""

import json
import os
import signal
import socket
import threading

import pytest
from tests import docker_engine
from tests.contracts.runtime_contract import CLOCK, LONG_S, until
from tests.runtimes.test_container import ContainerBench, bench, make_runtime, shared, state_dir  # noqa: F401

from tenure.errors import Unavailable
from tenure.protocols import ExitKind
from tenure.runtimes.container import ContainerRuntime
from tenure.runtimes.container_engine import Engine, EngineError
from tenure.runtimes.images import ensure_base_image

COUNT = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; sleep 0.05; done"


@pytest.fixture
def answering(tmp_path):
    """Give `serve(answer)`: a socket where every request gets these bytes; returns an `Engine` on it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "engine.sock"))
    listener.listen()

    def serve(answer):
        def run():
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        threading.Thread(target=run, daemon=True).start()
        return Engine(str(tmp_path / "engine.sock"))

    yield serve
    listener.close()


def test_an_answer_is_read_from_json(answering):
    assert answering(b'HTTP/1.0 200 OK\r\nX: y\r\n\r\n{"a": 1}').call("GET", "/x") == {"a": 1}


def test_a_refusal_carries_the_engines_own_words(answering):
    with pytest.raises(EngineError, match="no such thing") as error:
        answering(b'HTTP/1.0 404 Not Found\r\n\r\n{"message": "no such thing"}').call("GET", "/x")
    assert error.value.status == 404


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.0\r\n\r\n", b"HTTP/1.0 two\r\n\r\n"])
def test_who_does_not_answer_like_an_engine_is_unavailable(answering, answer):
    with pytest.raises(Unavailable, match="does not answer"):
        answering(answer).call("GET", "/x")


def test_an_engine_that_is_not_there_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="see that it runs"):
        Engine(str(tmp_path / "none")).call("GET", "/x")


@pytest.mark.real
@pytest.mark.docker
def test_a_lease_outlives_a_restart_of_the_engine_and_no_line_of_its_output_is_lost(docker, bench):  # noqa: F811
    handle = bench.start("sh", "-c", COUNT)
    bench.said(handle, "line 5")
    docker.restart()
    ended = bench.end(handle)
    assert ended.kind is ExitKind.COMPLETED
    assert bench.log(handle).splitlines() == [f"line {i + 1}" for i in range(60)]


@pytest.mark.real
@pytest.mark.docker
def test_the_deadline_holds_while_the_engine_is_dead_and_the_end_is_told_when_it_is_back(docker, bench):  # noqa: F811
    handle = bench.start("sleep", "60", grace_s=0.2)
    pid = json.loads((bench.state / "leases/lease-1/container.json").read_text())["pid"]
    docker.end(signal.SIGKILL)
    try:
        bench.runtime.renew(handle, deadline_boot_s=CLOCK.boot_s(), fence=1)
        until(lambda: not os.path.exists(f"/proc/{pid}"), "the container is ended without its engine")
    finally:
        docker.start()
    assert bench.end(handle).kind is ExitKind.OUT_OF_TIME


@pytest.mark.real
@pytest.mark.docker
def test_a_container_that_somebody_else_removes_has_ended(docker, bench):  # noqa: F811
    handle = bench.start("sleep", "60")
    (container,) = docker.containers()
    docker.ask("DELETE", f"/containers/{container['Id']}?force=1")
    ended = bench.end(handle)
    assert ended.kind in (ExitKind.SIGNALLED, ExitKind.COMPLETED, ExitKind.FAILED)
    assert "engine" in ended.witness


@pytest.mark.real
@pytest.mark.docker
def test_what_a_killed_agent_and_shim_left_with_the_engine_is_removed_by_the_next_runtime(docker, bench, make_runtime):  # noqa: F811
    handle = bench.start("sleep", "60")
    os.kill(handle.pid, signal.SIGKILL)
    later = make_runtime()
    assert "shim lost" in later.wait(later.attach("lease-1"), LONG_S).witness
    assert not docker.containers()


@pytest.mark.real
@pytest.mark.docker
def test_an_engine_without_live_restore_ends_its_containers_and_the_record_says_so(docker, tmp_path):
    with docker_engine.running(live_restore=False) as other:
        name = ensure_base_image(Engine(str(docker.socket)))
        status, image = docker.ask("GET", f"/images/{name}/get")
        assert status == 200
        other.load(image)
        runtime = ContainerRuntime(tmp_path / "state", socket=str(other.socket))
        try:
            bench = ContainerBench(runtime, tmp_path / "leases")
            handle = bench.start("sleep", "600")
            other.restart()
            ended = bench.end(handle)
            assert (ended.kind, ended.signal in (signal.SIGTERM, signal.SIGKILL)) == (ExitKind.SIGNALLED, True)
            assert "the engine's record" in ended.witness
        finally:
            runtime.close()
