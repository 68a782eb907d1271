"""A client of others, unchanged, against our server. It pins an older protobuf, so it may live in another interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.real

SCRIPT = """
import sys
import numpy as np
import tritonclient.grpc as g
import tritonclient.http as h
http, grpc = sys.argv[1:]
x = np.random.default_rng(5).normal(size=(6, 16)).astype(np.float32)
answers = []
for lib, address in ((h, http), (g, grpc)):
    client = lib.InferenceServerClient(address)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("digits")
    assert client.get_model_metadata("digits")
    for binary in (True, False):
        tensor = lib.InferInput("x", x.shape, "FP32")
        if lib is h:
            tensor.set_data_from_numpy(x, binary_data=binary)
            wanted = [lib.InferRequestedOutput(n, binary_data=binary) for n in ("label", "probability")]
        else:
            tensor.set_data_from_numpy(x)
            wanted = [lib.InferRequestedOutput(n) for n in ("label", "probability")]
        found = client.infer("digits", [tensor], outputs=wanted, request_id="9")
        answers.append((found.as_numpy("label"), found.as_numpy("probability")))
        whole = client.infer("digits", [tensor])
        assert np.array_equal(whole.as_numpy("label"), answers[-1][0])
    client.close()
assert all(np.array_equal(a, answers[0][0]) and np.allclose(p, answers[0][1]) for a, p in answers)
print("agreed", len(answers))
"""


def test_tritonclient_works_unchanged(server):
    python = os.environ.get("TENURE_PEER_PYTHON", sys.executable)
    if python == sys.executable and importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient[http,grpc] is not installed here; name an interpreter that has it in TENURE_PEER_PYTHON")
    done = subprocess.run([python, "-c", SCRIPT, server.http, server.grpc], capture_output=True, text=True, timeout=60)
    assert "agreed 4" in done.stdout, done.stderr
