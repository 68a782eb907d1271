"""One client for all targets: the same call, the same answer, the same errors."""

import asyncio
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from tenure.errors import NotFound, SpecError, Unavailable
from tenure.serve import Model
from tenure.serve.faults import InputRefused

pytestmark = pytest.mark.real


@pytest.fixture(params=["simple", "http", "grpc"])
def target(request, server, digits):
    return {"simple": str(digits.path), "http": f"http://{server.http}", "grpc": f"grpc://{server.grpc}"}[request.param]


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
