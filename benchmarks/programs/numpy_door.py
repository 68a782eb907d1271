"""A plain program with NumPy and the standard library that serves one .npz of `benchmarks.image_models` by the v2 protocol.

`python numpy_door.py MODEL.npz [--host 127.0.0.1] [--port 0]` prints its address as a JSON line once it listens. HTTP only:
JSON and binary tensors. SIGTERM and SIGINT end it with 0. It stands for anybody's program: nothing of ours is imported.
"""

import argparse
import gzip
import json
import signal
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

VERSION = "1"
MAX_BYTES = 16 << 20


class Refused(Exception):
    """A request that can't be answered: status and reason."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


class Model:
    """x -> score, probability."""

    def __init__(self, path):
        with np.load(path) as archive:
            self.weights = {name: archive[name] for name in archive.files}
        self.name = Path(path).stem
        self.shape = (8, 8, 1) if "filters" in self.weights else (64,)

    def metadata(self):
        """Return what the model takes and gives, as the protocol has it."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "numpy_npz",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, *self.shape]}],
            "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, 10]} for name in ("score", "probability")],
        }

    def run(self, x):
        """Return the outputs by name."""
        w = self.weights
        if "w1" in w:
            score = np.maximum(x @ w["w1"] + w["b1"], 0) @ w["w2"] + w["b2"]
        elif "filters" in w:
            patches = np.lib.stride_tricks.sliding_window_view(x[..., 0], (3, 3), (1, 2)).reshape(len(x), 36, 9)
            hidden = np.maximum(patches @ w["filters"].reshape(9, 8) + w["bias"], 0)
            score = hidden.reshape(len(x), -1) @ w["w"] + w["b"]
        else:
            left = (x[:, w["feature"]] <= w["threshold"]).astype(np.float32)
            score = ((left @ w["paths"]) == w["lefts"]).astype(np.float32) @ w["values"] + w["start"]
        with np.errstate(all="ignore"):
            shifted = np.exp(score - score.max(1, keepdims=True))
            return {"score": score, "probability": shifted / shifted.sum(1, keepdims=True)}


def infer(model, head, rest):
    """Return the answer's head and its binary part."""
    given = head.get("inputs")
    if not isinstance(given, list) or len(given) != 1 or given[0].get("name") != "x":
        raise Refused(400, 'one input "x" is needed')
    tensor = given[0]
    shape = tensor.get("shape")
    if tensor.get("datatype") != "FP32" or not isinstance(shape, list) or tuple(shape[1:]) != model.shape:
        raise Refused(400, f'input "x" is FP32 of shape [-1, {", ".join(map(str, model.shape))}]')
    if not shape[0] or not isinstance(shape[0], int) or shape[0] < 1 or shape[0] > 4096:
        raise Refused(400, 'input "x" has 1 to 4096 rows')
    size = tensor.get("parameters", {}).get("binary_data_size")
    if tensor.get("parameters", {}).get("shared_memory_region"):
        raise Refused(400, "there is no shared memory here")
    if size is not None:
        if size != 4 * int(np.prod(shape)) or size != len(rest):
            raise Refused(400, "the binary data has another size than its shape")
        x = np.frombuffer(rest, "<f4").reshape(shape)
    else:
        try:
            x = np.asarray(tensor.get("data"), dtype=np.float32).reshape(shape)
        except (ValueError, TypeError) as error:
            raise Refused(400, f"the data does not fit: {error}") from error
    names = [asked["name"] for asked in head.get("outputs", ())] or ["score", "probability"]
    unknown = set(names) - {"score", "probability"}
    if unknown:
        raise Refused(400, f"there is no output {sorted(unknown)[0]!r}")
    with np.errstate(all="ignore"):
        found = model.run(x)
    outputs, parts = [], []
    for asked in names:
        array = np.ascontiguousarray(found[asked])
        entry = {"name": asked, "datatype": "FP32", "shape": list(array.shape)}
        if size is not None:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            parts.append(array.tobytes())
        else:
            entry["data"] = array.reshape(-1).tolist()
        outputs.append(entry)
    answer = {"model_name": model.name, "model_version": VERSION, "outputs": outputs}
    if head.get("id"):
        answer["id"] = head["id"]
    return answer, b"".join(parts)


def handler(model):
    """Return the class that answers for a model."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *unused):
            pass

        def do_GET(self):
            self.take(self.asked)

        def do_HEAD(self):
            self.take(self.asked)

        def do_POST(self):
            self.take(self.inferred)

        def take(self, answer):
            try:
                status, head, rest = answer()
            except Refused as refused:
                status, head, rest = refused.status, {"error": str(refused)}, b""
            body = json.dumps(head).encode() if head is not None else b""
            self.send_response(status)
            if rest:
                self.send_header("Inference-Header-Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/octet-stream" if rest else "application/json")
            self.send_header("Content-Length", str(len(body) + len(rest)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body + rest)

        def asked(self):
            path = self.path.rstrip("/")
            here = (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{VERSION}")
            if path in ("/v2/health/live", "/v2/health/ready", f"{here[0]}/ready"):
                return 200, None, b""
            if path == "/v2":
                return 200, {"name": "numpy_door", "version": VERSION, "extensions": ["binary_tensor_data"]}, b""
            if path in here:
                return 200, model.metadata(), b""
            raise Refused(404, f"there is nothing at {self.path}")

        def inferred(self):
            text = self.headers.get("Content-Length", "0")
            if not text.isdigit() or int(text) > MAX_BYTES:
                raise Refused(413, "the request is too large")
            body = self.rfile.read(int(text))
            if self.path != f"/v2/models/{model.name}/infer":
                raise Refused(404, f"there is nothing at {self.path}")
            packed = self.headers.get("Content-Encoding", "")
            try:
                if packed:
                    body = gzip.decompress(body) if packed == "gzip" else zlib.decompress(body)
                end = int(self.headers.get("Inference-Header-Content-Length", len(body)))
                head = json.loads(body[:end])
                if not isinstance(head, dict):
                    raise Refused(400, "the request is no JSON object")
                answer, rest = infer(model, head, body[end:])
            except (ValueError, OSError, EOFError, zlib.error, AttributeError, KeyError, TypeError, RecursionError) as error:
                raise Refused(400, f"the request can't be read: {type(error).__name__}") from error
            return 200, answer, rest

    return Handler


def main():
    """Serve until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    server = ThreadingHTTPServer((options.host, options.port), handler(Model(options.model)))

    def leave(*unused):
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    print(json.dumps({"listening": {"http": f"{options.host}:{server.server_port}"}}), flush=True)
    server.serve_forever(0.02)
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
