import asyncio
import os
import threading

import pytest

from tenure import codec, wire
from tenure.errors import NoPlacement, NotFound, SpecError, Unavailable
from tenure.sockets import AsyncLineClient, LineClient, LineServer, check_owner, socket_dir

OPS = {
    "hello": wire.Op(args=wire.Hello, result=wire.Welcome),
    "renew": wire.Op(args=wire.Renew, result=wire.LeaseRef),
    "nudge": wire.Op(args=wire.Nudge, result=wire.Nothing),
}


async def _renew(args, connection):
    if args.lease_id == "none":
        raise NoPlacement("no node fits", {"a": "too small"})
    if args.lease_id == "bug":
        raise ZeroDivisionError("oops")
    if args.lease_id == "slow":
        await asyncio.sleep(60)
    return wire.LeaseRef(lease_id=args.lease_id * int(args.for_s))


async def _nudge(args, connection):
    return None


@pytest.fixture
def server(tmp_path):
    """A server in a thread of its own, as clients meet it."""
    path = socket_dir(tmp_path / ("deep" * 30)) / "s.sock"
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)
    line_server = LineServer(path, OPS, {"renew": _renew, "nudge": _nudge}, who="test")
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(line_server.start(), loop).result(5)
    yield line_server
    asyncio.run_coroutine_threadsafe(line_server.close(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def test_a_call_returns_the_noun_and_errors_come_back_with_their_class_and_fields(server):
    client = LineClient(server.path, OPS, who="t", timeout_s=5)
    assert client.welcome.who == "test"
    assert client.call("renew", wire.Renew(lease_id="ab", for_s=2)) == wire.LeaseRef(lease_id="abab")
    with pytest.raises(NoPlacement) as refused:
        client.call("renew", wire.Renew(lease_id="none", for_s=1))
    assert refused.value.reasons == {"a": "too small"}
    with pytest.raises(Exception, match="ZeroDivisionError: oops"):
        client.call("renew", wire.Renew(lease_id="bug", for_s=1))
    assert client.call("nudge", wire.Nudge(run_id="r", stage="s")) == wire.Nothing()
    client.close()


def test_a_call_that_takes_too_long_ends_in_unavailable(server):
    client = LineClient(server.path, OPS, who="t", timeout_s=5)
    with pytest.raises(Unavailable):
        client.call("renew", wire.Renew(lease_id="slow", for_s=1), timeout_s=0.05)
    client.close()


def test_a_server_without_a_socket_is_unavailable(tmp_path):
    with pytest.raises(Unavailable):
        LineClient(tmp_path / "nobody", OPS, who="t")


def test_lines_that_are_no_calls_are_refused_and_the_server_lives_on(server):
    import socket

    with socket.socket(socket.AF_UNIX) as raw, raw.makefile("rb") as answers:
        raw.settimeout(5)
        raw.connect(str(server.path))
        raw.sendall(b"nonsense\n[]\n" + b'{"id":1,"op":"steal","args":{}}\n{"id":2,"op":"renew","args":{"lease_id":7}}\n')
        replies = [answers.readline() for _ in range(4)]
    assert all(b'"error"' in reply for reply in replies)
    assert any(b"it has: hello, nudge, renew" in reply for reply in replies)
    client = LineClient(server.path, OPS, who="t", timeout_s=5)
    client.close()


def test_an_async_client_has_many_calls_in_flight_gets_notes_and_hears_the_end(tmp_path):
    async def scenario():
        path = socket_dir(tmp_path) / "s.sock"
        server = LineServer(path, OPS, {"renew": _renew, "nudge": _nudge}, who="test")
        await server.start()
        notes, closed = [], asyncio.Event()
        client = AsyncLineClient(path, OPS, who="t", on_note=lambda n, d: notes.append((n, d)), on_close=closed.set)
        await client.connect()
        answers = await asyncio.gather(*(client.call("renew", wire.Renew(lease_id=str(i), for_s=1)) for i in range(20)))
        assert [a.lease_id for a in answers] == [str(i) for i in range(20)]
        await server.notify_all("attempt", wire.LeaseRef(lease_id="x"))
        with pytest.raises(Unavailable):
            await client.call("renew", wire.Renew(lease_id="slow", for_s=1), timeout_s=0.05)
        assert notes == [("attempt", {"lease_id": "x"})]
        slow = asyncio.ensure_future(client.call("renew", wire.Renew(lease_id="slow", for_s=1)))
        await asyncio.sleep(0)
        await server.close()
        with pytest.raises(Unavailable):
            await slow
        await asyncio.wait_for(closed.wait(), 5)
        await client.close()

    asyncio.run(scenario())


def test_a_client_of_another_version_is_told_so(tmp_path, monkeypatch, server):
    monkeypatch.setattr("tenure.sockets._checked_welcome", lambda w: (_ for _ in ()).throw(Unavailable("older")))
    with pytest.raises(Unavailable, match="older"):
        LineClient(server.path, OPS, who="t")


def test_two_who_ask_for_the_socket_folder_get_the_same_short_one(tmp_path):
    home = tmp_path / ("x" * 100)
    first, second = socket_dir(home), socket_dir(home)
    assert first == second
    assert len(str(first)) < 80
    first.rmdir()
    assert socket_dir(home).is_dir()


def test_an_unknown_error_class_becomes_the_base_error():
    assert type(codec.error_from_wire({"kind": "Path", "message": "m"})).__name__ == "TenureError"
    error = codec.error_from_wire(codec.error_to_wire(NotFound("no lease x")))
    assert isinstance(error, NotFound)
    assert str(error) == "no lease x"
    assert isinstance(codec.error_from_wire(codec.error_to_wire(SpecError("s"))), SpecError)


def test_a_home_of_another_user_is_refused_whoever_asks(tmp_path, monkeypatch):
    owner = os.geteuid()
    check_owner(tmp_path)
    check_owner(tmp_path / "not made yet")
    for other in (0, 65534):
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda other=other: other)
            if other != owner:
                with pytest.raises(SpecError, match=rf"{tmp_path} belongs to user .*; this is user .*Set TENURE_HOME"):
                    check_owner(tmp_path)
