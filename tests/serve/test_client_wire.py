"""The HTTP client against servers on bad days: sync, asyncio's loop and uvloop alike."""

import asyncio
import gc
import os
import threading
import time

import numpy as np
import pytest
import uvloop
from tests.serve.wire_server import METADATA, Request, WireServer, same

from tenure.errors import Unavailable
from tenure.serve import Model
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded, TooLarge

pytestmark = pytest.mark.real
X = np.arange(6, dtype=np.float32)
LARGE = np.zeros(4 << 20, np.float32)


class Asker:
    """Asks one model, sync or on one event loop, and closes both."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.models: list[Model] = []
        factory = {"uvloop": uvloop.new_event_loop}.get(way, asyncio.new_event_loop)
        self.runner = None if way == "sync" else asyncio.Runner(loop_factory=factory)

    def model(self, target: str, **options) -> Model:
        self.models.append(Model(target, "same", **{"timeout_s": 5.0, **options}))
        return self.models[-1]

    def __call__(self, model: Model, x, **options):
        if self.runner is None:
            return model.predict(x, **options)
        return self.runner.run(model.predict_async(x, **options))

    def many(self, model: Model, x, count: int) -> list:
        if self.runner is not None:
            return self.runner.run(gathered(model, x, count))
        found: list = []
        threads = [threading.Thread(target=lambda: found.append(model.predict(x))) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return found

    def close(self) -> None:
        for model in self.models:
            if self.runner is None:
                model.close()
            else:
                self.runner.run(model.close_async())
        if self.runner is not None:
            self.runner.run(asyncio.sleep(0))
            self.runner.close()


async def gathered(model: Model, x, count: int) -> list:
    return await asyncio.gather(*(model.predict_async(x) for _ in range(count)))


@pytest.fixture(params=["sync", "asyncio", "uvloop"])
def ask(request):
    asker = Asker(request.param)
    yield asker
    asker.close()


def test_an_answer_may_come_in_any_pieces(ask):
    content = same(X.tobytes())

    def handle(request: Request):
        for at in range(len(content)):
            request.send(content[at : at + 1])

    with WireServer(handle) as server:
        model = ask.model(server.url)
        for _ in range(2):
            np.testing.assert_array_equal(ask(model, X), X)
        assert server.connected == (1 if ask.way == "sync" else 2)  # metadata is asked by the sync client


def test_chunks_interim_answers_and_a_body_without_length_are_understood(ask):
    body = b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1.5, 2.5]}]}'
    answers = [
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body),
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body,
    ]
    turn = iter(answers)

    def handle(request: Request):
        said = next(turn)
        request.send(said)
        return b"close" not in said

    with WireServer(handle) as server:
        model = ask.model(server.url)
        for _ in answers:
            np.testing.assert_array_equal(ask(model, X), [1.5, 2.5])


def test_a_connection_that_was_closed_while_idle_is_replaced_without_notice(ask):
    with WireServer(Request.answer_same) as server:
        model = ask.model(server.url)
        ask(model, X)
        for _ in range(3):
            server.drop()
            np.testing.assert_array_equal(ask(model, X), X)


def test_a_server_that_always_hangs_up_is_unavailable_after_one_more_try(ask):
    with WireServer(lambda request: False) as server:
        model = ask.model(server.url)
        model.metadata()
        with pytest.raises(Unavailable, match="closed"):
            ask(model, X)
        assert server.infers <= 2


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 12e\r\n\r\n", b"\0" * 70_000]
)
def test_what_is_not_http_is_unavailable_with_the_address(ask, said):
    def handle(request: Request):
        request.send(said)
        return False

    with WireServer(handle) as server, pytest.raises(Unavailable, match=f"127.0.0.1:{server.port}"):
        ask(ask.model(server.url), X)


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": ["a", "b"]}]}',
        b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [3], "data": [1, 2]}]}',
    ],
)
def test_an_answer_that_breaks_the_protocol_is_the_models_failure_and_the_connection_lives(ask, body):
    turn = iter([body])

    def handle(request: Request):
        broken = next(turn, None)
        return request.answer_same() if broken is None else request.answer(body=broken)

    with WireServer(handle) as server:
        model = ask.model(server.url)
        with pytest.raises(ModelFailed):
            ask(model, X)
        np.testing.assert_array_equal(ask(model, X), X)


def test_raw_outputs_that_do_not_add_up_are_refused(ask):
    short = same(X.tobytes()).replace(b"[6]", b"[5]")
    with WireServer(lambda request: request.send(short)) as server, pytest.raises(ModelFailed, match="bytes"):
        ask(ask.model(server.url), X)


@pytest.mark.parametrize(
    ("status", "kind"), [(400, InputRefused), (413, TooLarge), (429, Overloaded), (500, ModelFailed), (503, Unavailable)]
)
def test_a_status_is_an_error_with_the_servers_reason(ask, status, kind):
    with WireServer(lambda request: request.answer(status, {"error": "not today"}, "Retry-After: 7")) as server:
        with pytest.raises(kind, match="not today") as caught:
            ask(ask.model(server.url), X)
        if kind is Overloaded:
            assert caught.value.retry_after_s == 7


def test_a_refusal_that_comes_before_the_body_is_read_is_heard(ask):
    class Early(WireServer):
        def handle_unread(self, request: Request) -> bool:
            request.answer(413, {"error": "too large a thing"})
            return self.infers < 2 or request.connection.recv(1) is None

    with Early(Request.answer_same) as server:
        model = ask.model(server.url, shm=False)
        with pytest.raises(TooLarge, match="too large a thing"):
            ask(model, LARGE)


def test_no_answer_within_the_timeout_is_unavailable_and_the_next_call_works(ask):
    slow = threading.Event()
    turn = iter([lambda request: slow.wait(10) and False])

    def handle(request: Request):
        return next(turn, Request.answer_same)(request)

    with WireServer(handle) as server:
        model = ask.model(server.url, timeout_s=0.2)
        with pytest.raises(Unavailable, match=r"within 0.2 s"):
            ask(model, X)
        np.testing.assert_array_equal(ask(model, X), X)
        slow.set()


def test_an_answer_that_drips_does_not_outlast_the_timeout(ask):
    ended = threading.Event()

    def handle(request: Request):
        content = same(X.tobytes())
        for at in range(len(content)):
            request.send(content[at : at + 1])
            if ended.wait(0.02):
                return False

    with WireServer(handle) as server:
        model = ask.model(server.url, timeout_s=0.3)
        with pytest.raises(Unavailable, match=r"within 0.3 s"):
            ask(model, X)
        ended.set()


def test_retry_asks_an_overloaded_server_again_when_it_says(ask):
    asked_at_s: list[float] = []

    def handle(request: Request):
        asked_at_s.append(time.monotonic())
        if len(asked_at_s) < 3:
            return request.answer(429, {"error": "full"}, "Retry-After: 1", "Retry-After-Ms: 40")
        return request.answer_same()

    with WireServer(handle) as server:
        np.testing.assert_array_equal(ask(ask.model(server.url, retry=True), X), X)
    assert len(asked_at_s) == 3
    assert min(np.diff(asked_at_s)) >= 0.04


def test_retry_ends_with_the_timeout_and_is_off_unless_asked_for(ask):
    with WireServer(lambda request: request.answer(429, {"error": "full"}, "Retry-After-Ms: 50")) as server:
        with pytest.raises(Overloaded):
            ask(ask.model(server.url), X)
        assert server.infers == 1
        with pytest.raises(Overloaded, match="full"):
            ask(ask.model(server.url, timeout_s=0.3, retry=True), X)
        assert 3 <= server.infers <= 8


def test_many_at_once_survive_refusals_and_connections_that_were_closed(shares):
    refused = iter([1, 1])

    def handle(request: Request):
        if request.path.endswith("/infer") and next(refused, None):
            return request.answer(429, {"error": "full"}, "Retry-After-Ms: 5")
        return shares(request)

    xs = [BIG + turn for turn in range(12)]
    with WireServer(handle, extensions=SHM) as server, Model(server.url, "same", timeout_s=5) as model:
        for _ in range(3):
            for x, found in zip(xs, model.predict_many(xs), strict=True):
                np.testing.assert_array_equal(found, x)
            server.drop()
            shares.forget()
        assert shares.from_body == 0
        model.predict(BIG)
        server.close()
        with pytest.raises(Unavailable):
            model.predict_many(xs)


def test_many_in_flight_share_a_bounded_number_of_connections():
    from tenure.serve.http_client.streaming import MAX_CONNECTIONS

    ask = Asker("asyncio")
    with WireServer(Request.answer_same) as server:
        model = ask.model(server.url)
        for found in ask.many(model, X, 300):
            np.testing.assert_array_equal(found, X)
        assert server.infers == 300
        assert server.connected <= MAX_CONNECTIONS + 1
    ask.close()


def test_a_cancelled_call_leaves_no_answer_for_the_next_one():
    held = threading.Event()
    turn = iter([lambda request: held.wait(10) and request.answer_same(LARGE.tobytes())])

    def handle(request: Request):
        return next(turn, Request.answer_same)(request)

    async def go(model: Model):
        first = asyncio.ensure_future(model.predict_async(X))
        while not server.infers:
            await asyncio.sleep(0.005)
        first.cancel()
        held.set()
        np.testing.assert_array_equal(await model.predict_async(X), X)
        await model.close_async()

    with WireServer(handle) as server:
        asyncio.run(go(Model(server.url, "same", timeout_s=5)))


def test_one_model_may_be_used_from_one_event_loop_after_another():
    with WireServer(Request.answer_same) as server:
        model = Model(server.url, "same", timeout_s=5)

        async def once():
            found = await model.predict_async(X)
            await model.close_async()
            return found

        for _ in range(2):
            np.testing.assert_array_equal(asyncio.run(once()), X)


class Shares:
    """Plays a server with system shared memory: opens regions when they are registered, reads inputs from them."""

    def __init__(self) -> None:
        self.regions: dict[str, int] = {}
        self.refuse = ""
        self.from_memory = self.from_body = 0

    def __call__(self, request: Request):
        if "/systemsharedmemory/" in request.path:
            return self.control(request, *request.path.split("/")[4:6])
        where = request.header["inputs"][0]["parameters"]
        if "shared_memory_region" not in where:
            self.from_body += 1
            return request.answer_same()
        if where["shared_memory_region"] not in self.regions:
            return request.answer(400, {"error": "no such region"})
        self.from_memory += 1
        file = self.regions[where["shared_memory_region"]]
        return request.answer_same(os.pread(file, where["shared_memory_byte_size"], where["shared_memory_offset"]))

    def control(self, request: Request, name: str, verb: str):
        if verb == "status":
            return request.answer(*((200, []) if name in self.regions else (400, {"error": "unknown"})))
        if verb == "unregister":
            if name in self.regions:
                os.close(self.regions.pop(name))
        elif self.refuse:
            return request.answer(400, {"error": self.refuse})
        else:
            asked = request.header
            self.regions[name] = os.open("/dev/shm" + asked["key"], os.O_RDONLY)
            assert os.fstat(self.regions[name]).st_size >= asked["byte_size"]
        return request.answer()

    def forget(self) -> None:
        while self.regions:
            os.close(self.regions.popitem()[1])


@pytest.fixture
def shares():
    made = Shares()
    yield made
    made.forget()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"tenure-{os.getpid()}-")]


SHM = ("binary_tensor_data", "system_shared_memory")
BIG = np.random.default_rng(0).random(1 << 16).astype(np.float32)


def test_large_inputs_go_by_shared_memory_and_small_ones_do_not(ask, shares):
    with WireServer(shares, extensions=SHM) as server:
        model = ask.model(server.url)
        np.testing.assert_array_equal(ask(model, X), X)
        assert (shares.from_memory, shares.from_body) == (0, 1)
        for turn in range(3):
            np.testing.assert_array_equal(ask(model, BIG + turn), BIG + turn)
        np.testing.assert_array_equal(ask(model, BIG[::-1]), BIG[::-1])  # no copy is made to straighten it
        assert (shares.from_memory, shares.from_body) == (4, 1)
        ask.close()
        ask.models.clear()
        ask.runner = None
        assert not shares.regions


def test_many_in_flight_have_a_part_each(ask, shares):
    with WireServer(shares, extensions=SHM) as server:
        model = ask.model(server.url)
        for found in ask.many(model, BIG, 40):
            np.testing.assert_array_equal(found, BIG)
        assert shares.from_memory == 40


def test_a_server_that_offers_or_opens_no_shared_memory_gets_bodies(ask, shares):
    shares.refuse = "no such object: this is another machine"
    for extensions in ((), SHM):
        with WireServer(shares, extensions=extensions) as server:
            model = ask.model(server.url)
            for _ in range(2):
                np.testing.assert_array_equal(ask(model, BIG), BIG)
    assert (shares.from_memory, shares.from_body) == (0, 4)


def test_shared_memory_can_be_refused_and_insisted_on(ask, shares):
    with WireServer(shares, extensions=SHM) as server:
        np.testing.assert_array_equal(ask(ask.model(server.url, shm=False), BIG), BIG)
        assert shares.from_memory == 0
        insisting = ask.model(server.url.replace("http", "shm"))
        np.testing.assert_array_equal(ask(insisting, X), X)
        assert shares.from_memory == 1
    with WireServer(shares) as server, pytest.raises(Unavailable, match="system_shared_memory"):
        ask(ask.model(server.url, shm=True), BIG)


def test_a_server_that_does_not_speak_of_shared_memory_in_time_costs_no_more_than_the_timeout(ask):
    ended = threading.Event()

    class Silent(WireServer):
        def _one(self, connection, stream):
            first = stream.readline()
            if b"/v2 " in first:
                ended.wait(10)
                return False
            while stream.readline().strip():
                pass
            return Request(connection, "", "", {}, b"").answer(content=METADATA)

    with Silent(Request.answer_same) as server:
        model = ask.model(server.url, timeout_s=0.3)
        model.metadata()
        began_s = time.monotonic()
        with pytest.raises(Unavailable, match=r"within 0.3 s"):
            ask(model, BIG)
        assert time.monotonic() - began_s < 5
        ended.set()


def test_a_server_that_is_too_busy_to_open_a_region_is_asked_again_later(ask, shares):
    busy = iter([1])

    def handle(request: Request):
        if request.path.endswith("/register") and next(busy, None):
            return request.answer(429, {"error": "full"}, "Retry-After-Ms: 5")
        return shares(request)

    with WireServer(handle, extensions=SHM) as server:
        model = ask.model(server.url)
        with pytest.raises(Overloaded):
            ask(model, BIG)
        np.testing.assert_array_equal(ask(model, BIG), BIG)
        assert shares.from_memory == 1


def test_a_server_started_anew_is_given_a_new_region(ask, shares):
    with WireServer(shares, extensions=SHM) as server:
        model = ask.model(server.url)
        ask(model, BIG)
        server.drop()
        shares.forget()
        np.testing.assert_array_equal(ask(model, BIG), BIG)
        assert (shares.from_memory, shares.from_body) == (2, 0)


def test_wrong_input_in_shared_memory_is_refused_once_and_the_region_stays(ask, shares):
    class Picky(WireServer):
        def handle_unread(self, request: Request) -> bool:
            if self.infers == 2:
                request.answer(400, {"error": "wrong shape"})
                return True
            return False

    with Picky(shares, extensions=SHM) as server:
        model = ask.model(server.url)
        ask(model, BIG)
        with pytest.raises(InputRefused, match="wrong shape"):
            ask(model, BIG)
        assert server.infers == 2
        np.testing.assert_array_equal(ask(model, BIG), BIG)
        assert len(shares.regions) == 1


def test_a_full_shared_memory_is_noticed_before_it_is_written(ask, shares, monkeypatch):
    def full(file, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with WireServer(shares, extensions=SHM) as server:
        model = ask.model(server.url)
        for _ in range(2):
            np.testing.assert_array_equal(ask(model, BIG), BIG)
    assert (shares.from_memory, shares.from_body) == (0, 2)


def test_a_closed_client_keeps_no_memory_mapped(shares):
    with WireServer(shares, extensions=SHM) as server:
        with Model(server.url, "same") as model:
            model.predict(BIG)
        del model
        gc.collect()
        with open("/proc/self/maps") as maps:
            assert "/dev/shm/tenure-" not in maps.read()
