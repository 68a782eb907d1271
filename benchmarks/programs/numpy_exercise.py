"""Drives `numpy_door.py` as its author would: 1 and 5 rows by JSON and by binary tensors, and one request that is refused.

`python numpy_exercise.py --at HOST:PORT [--wait-s 60]` waits until it listens. Exit: 0 all was answered as it should
be, 1 it was not.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request


def ask(address, path, body=None, headers=None):
    """Return status and body."""
    request = urllib.request.Request(f"http://{address}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait(address, wait_s):
    """Return the name of the model once it is served."""
    ends_s = time.monotonic() + wait_s
    while True:
        try:
            return ask(address, "/v2")[0]
        except OSError:
            if time.monotonic() > ends_s:
                raise
            time.sleep(0.05)


def main():
    """Exercise; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", required=True)
    parser.add_argument("--wait-s", type=float, default=60.0)
    parser.add_argument("--model", default="perceptron")
    options = parser.parse_args()
    wait(options.at, options.wait_s)
    path = f"/v2/models/{options.model}"
    shape = json.loads(ask(options.at, path)[1])["inputs"][0]["shape"][1:]
    count = 1
    for length in shape:
        count *= length
    seen = []
    for rows in (1, 5):
        tensor = {"name": "x", "datatype": "FP32", "shape": [rows, *shape]}
        seen.append(
            ask(options.at, f"{path}/infer", json.dumps({"inputs": [{**tensor, "data": [0.5] * rows * count}]}).encode())[0]
        )
        raw = bytes(4 * rows * count)
        head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}]}).encode()
        seen.append(ask(options.at, f"{path}/infer", head + raw, {"Inference-Header-Content-Length": str(len(head))})[0])
    refused = ask(options.at, f"{path}/infer", b"{")[0]
    print(f"answered: {seen}, refused: {refused}")
    return 0 if seen == [200] * 4 and refused == 400 else 1


if __name__ == "__main__":
    sys.exit(main())
