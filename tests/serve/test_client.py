"""One client for all targets: the same call, the same answer, the same errors."""

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from tests.serve.conftest import Server

from tenure.errors import NotFound, SpecError, Unavailable
from tenure.serve import Model
from tenure.serve.faults import InputRefused, TooLarge

pytestmark = pytest.mark.real


@pytest.fixture(params=["simple", "http", "grpc", "shm"])
def target(request, server, digits):
    if request.param == "simple":
        return str(digits.path)
    return remote(request.param, server)


def remote(scheme, server):
    if scheme == "shm":
        with urllib.request.urlopen(f"http://{server.http}/v2", timeout=10) as answer:
            if "system_shared_memory" not in json.load(answer)["extensions"]:
                pytest.skip("this server offers no system shared memory")
    return f"{scheme}://{server.grpc if scheme == 'grpc' else server.http}"


def test_every_target_gives_the_same_answer_sync_and_async(target, digits):
    with Model(target, "digits") as model:
        found = model.predict(digits.x)

        async def ask():
            answers = await asyncio.gather(*(model.predict_async(digits.x) for _ in range(8)))
            await model.close_async()
            return answers

        for answer in [found, *asyncio.run(ask())]:
            np.testing.assert_array_equal(answer["label"], digits.label)
            np.testing.assert_allclose(answer["probability"], digits.probability, atol=1e-5)


def test_many_requests_at_once_are_answered_in_their_order(target, digits):
    with Model(target, "digits") as model:
        for count in (0, 1, 20):
            found = model.predict_many([digits.x[index : index + 2] for index in range(count)])
            assert len(found) == count
            for index, answer in enumerate(found):
                np.testing.assert_array_equal(answer["label"], digits.label[index : index + 2])
        with pytest.raises(InputRefused):
            model.predict_many([digits.x, digits.x[:, :3], digits.x])
        np.testing.assert_array_equal(model.predict_many([digits.x], outputs=["label"])[0], digits.label)


def test_a_stream_of_requests_is_taken_no_faster_than_its_answers_are_read(target, digits):
    taken = 0

    def stream():
        nonlocal taken
        for index in itertools.count():
            taken += 1
            yield digits.x[index % 4 : index % 4 + 1]

    with Model(target, "digits") as model:
        answers = model.predict_each(stream(), outputs=["label"], in_flight=3)
        for index in range(9):
            np.testing.assert_array_equal(next(answers), digits.label[index % 4 : index % 4 + 1])
            assert taken <= index + 1 + 3
        answers.close()  # what is under way is given up, and the model goes on
        np.testing.assert_array_equal(model.predict(digits.x)["label"], digits.label)
        for wrong in (0, 257):
            with pytest.raises(SpecError, match="in_flight"):
                model.predict_each([digits.x], in_flight=wrong)


def test_one_output_comes_as_an_array_and_float64_is_taken(target, digits):
    with Model(target, "digits") as model:
        np.testing.assert_array_equal(model.predict(digits.x.astype(float), outputs=["label"]), digits.label)
        assert [meta.name for meta in model.metadata().outputs] == ["label", "probability"]


def test_wrong_input_is_refused_alike_everywhere(target, digits):
    with Model(target, "digits") as model:
        for wrong in (digits.x[:, :3], np.zeros((2, 16), complex), {"y": digits.x}, np.zeros((0, 16))):
            with pytest.raises(InputRefused):
                model.predict(wrong)
        with pytest.raises(InputRefused):
            model.predict(digits.x, outputs=["colour"])
        np.testing.assert_array_equal(model.predict(digits.x)["label"], digits.label)


def test_a_client_may_be_used_from_several_threads(target, digits):
    wrong = []
    with Model(target, "digits") as model:

        def ask():
            for _ in range(20):
                if not np.array_equal(model.predict(digits.x)["label"], digits.label):
                    wrong.append(1)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_listening_is_unavailable_and_an_unknown_model_not_found(scheme, server, digits):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"{scheme}://127.0.0.1:{unused.getsockname()[1]}"
        with Model(address, "digits", timeout_s=5) as model:
            with pytest.raises(Unavailable):
                model.predict(digits.x)
            with pytest.raises(Unavailable):
                model.wait_ready(0.1)
    with Model(f"{scheme}://{server.endpoints[scheme]}", "nothing") as model, pytest.raises(NotFound, match="nothing"):
        model.predict(digits.x)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_request_past_the_servers_limit_is_too_large_and_the_next_one_is_answered(scheme, server):
    with Model(remote(scheme, server), "same_uint8", shm=False) as model:

        async def ask(x):
            return await model.predict_async(x)

        with asyncio.Runner() as runner:
            for call in (model.predict, lambda x: runner.run(ask(x))):
                with pytest.raises(TooLarge):
                    call(np.zeros(2_000_000, np.uint8))
                np.testing.assert_array_equal(call(np.ones(9, np.uint8)), np.ones(9, np.uint8))
            runner.run(model.close_async())


def test_stages_add_up_to_no_more_than_the_call_took(target, digits):
    with Model(target, "digits") as model:
        model.predict(digits.x)
        began_s = time.perf_counter()
        _, stages = model.predict_timed(digits.x)
        took_s = time.perf_counter() - began_s
    parts = (stages.send_s, stages.recognise_s, stages.fetch_s)
    assert min(parts) >= 0
    assert stages.recognise_s > 0
    assert sum(parts) <= took_s


@pytest.mark.parametrize(
    ("kind", "x"),
    [
        ("INT64", np.array([-(2**62), 0, 7])),
        ("UINT8", np.arange(200_000, dtype=np.uint8)),
        ("BOOL", np.array([True, False])),
        ("FLOAT16", np.array([0.5, -2], np.float16)),
        ("STRING", np.array([b"", b"a\x00b", "ä".encode()], object)),
    ],
)
@pytest.mark.parametrize("scheme", ["simple", "http", "grpc", "shm"])
def test_every_type_comes_back_as_it_went(scheme, kind, x, server, digits):
    name = f"same_{kind.lower()}"
    target = str(digits.path.parent / f"{name}.onnx") if scheme == "simple" else remote(scheme, server)
    with Model(target, name) as model:
        found = model.predict(x)
        np.testing.assert_array_equal(found, x)
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(model.predict(x[::-1]), x[::-1])


@pytest.mark.parametrize("scheme", ["http", "grpc", "shm"])
def test_a_server_that_is_started_anew_is_used_again(scheme, digits, tmp_path):
    first = Server(digits.path, tmp_path / "1")
    try:
        address = remote(scheme, first)
        with Model(address, "digits", timeout_s=20) as model, Model(address, "digits", timeout_s=20) as behind_loop:

            async def ask():
                return (await behind_loop.predict_async(digits.x))["label"]

            with asyncio.Runner() as runner:
                np.testing.assert_array_equal(model.predict(digits.x)["label"], digits.label)
                np.testing.assert_array_equal(runner.run(ask()), digits.label)
                first.end()
                with pytest.raises(Unavailable):
                    model.predict(digits.x)
                with pytest.raises(Unavailable):
                    runner.run(ask())
                port = address.rpartition(":")[2]
                second = Server(digits.path, tmp_path / "2", "--grpc-port" if scheme == "grpc" else "--http-port", port)
                try:
                    model.wait_ready(20)
                    np.testing.assert_array_equal(model.predict(digits.x)["label"], digits.label)
                    np.testing.assert_array_equal(runner.run(again(ask)), digits.label)
                finally:
                    runner.run(behind_loop.close_async())
                    second.end()
    finally:
        first.end()


async def again(ask):
    """gRPC comes back by itself, after a pause of its own choice."""
    for _ in range(200):
        try:
            return await ask()
        except Unavailable:
            await asyncio.sleep(0.05)
    return await ask()


def test_a_mere_name_is_a_file_here_or_a_model_of_the_server_in_the_environment(server, digits, monkeypatch, tmp_path):
    monkeypatch.chdir(digits.path.parent)
    with Model("digits.onnx") as model:
        assert model.metadata().name == "digits"
    monkeypatch.delenv("TENURE_SERVE", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=r"(?s)no model file \"digits\".*TENURE_SERVE is not set"):
        Model("digits")
    monkeypatch.setenv("TENURE_SERVE", f"http://{server.http}")
    with Model("digits") as model:
        np.testing.assert_array_equal(model.predict(digits.x)["label"], digits.label)
    with Model("numerals") as model, pytest.raises(NotFound, match=r'(?s)"numerals" is no file here.*does not serve it'):
        model.predict(digits.x)
    monkeypatch.setenv("TENURE_SERVE", server.http)
    with pytest.raises(SpecError, match="TENURE_SERVE"):
        Model("digits")


def test_several_instances_in_this_process_answer_at_once(digits):
    with Model(str(digits.path), instances=3, threads=1) as model:
        outcomes = []
        threads = [threading.Thread(target=lambda: outcomes.append(model.predict(digits.x)["label"])) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(outcomes) == 12
        for label in outcomes:
            np.testing.assert_array_equal(label, digits.label)


@pytest.mark.parametrize("wrong", [{"instances": 0}, {"timeout_s": 0}, {"timeout_s": float("nan")}])
def test_options_that_make_no_sense_are_refused(wrong, digits):
    with pytest.raises(SpecError):
        Model(str(digits.path), **wrong)


@pytest.mark.parametrize("scheme", ["http", "grpc", "shm"])
def test_who_never_answers_is_unavailable_when_the_timeout_has_passed(scheme):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Model(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", "digits", timeout_s=0.3) as model,
    ):

        async def ask():
            try:
                await model.predict_async([1.0])
            finally:
                await model.close_async()

        began_s = time.monotonic()
        with pytest.raises(Unavailable):
            model.predict([1.0])
        with pytest.raises(Unavailable):
            asyncio.run(ask())
        assert time.monotonic() - began_s < 60


@pytest.mark.parametrize(("address", "shm"), [("grpc://127.0.0.1:1", True), ("shm://127.0.0.1:1", False)])
def test_shared_memory_that_contradicts_the_address_is_refused(address, shm):
    with pytest.raises(SpecError, match="shared memory"):
        Model(address, "digits", shm=shm)


@pytest.mark.parametrize("target_", ["ftp://x:1", "http://x", "grpc://:5", "http://x:99999"])
def test_a_target_that_is_none_is_refused(target_):
    with pytest.raises(SpecError):
        Model(target_, "digits")


def test_a_thin_client_loads_neither_an_engine_nor_the_other_transports(server, digits):
    code = (
        "import sys, numpy as np; from tenure.serve import Model\n"
        f"m = Model('http://{server.http}', 'digits'); m.predict(np.zeros((1, 16), np.float32)); m.close()\n"
        "print([n for n in ('onnxruntime', 'grpc', 'aiohttp', 'uvicorn', 'sklearn', 'google.protobuf') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=os.environ)
    assert out.stdout.strip() == "[]"
