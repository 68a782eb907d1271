"""Pairs of calls: the model in this process and behind a server, one after the other, in an order drawn per pair.

Run by any interpreter that has NumPy, ONNX Runtime and the client it is asked for: ours (ways `http`, `grpc`, `shm`), Triton's
(`triton_http`, `triton_grpc`, `triton_shm` by gRPC, `triton_shm_http`), or none (`json`: the numbers written out). One
argument, a JSON object: file, name, addresses, pid of the server, threads, ways, seed, rows. Then one JSON command a line
on standard input, one answer a line: {"way", "rows", "pairs"} -> {"pairs": [[in-process s, served s], …],
"in_process_cpu_s", "server_cpu_s"}.
CPU: of this process around its own calls; of the server's whole tree from the first call to the last.
"""

import json
import os
import random
import sys
import time

import numpy as np
from procs import cpu_s, tree


def session(path, threads):
    """Return ONNX Runtime's session with the settings that the servers have."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_ours(scheme, address, name):
    """Return a call through our client."""
    from tenure.serve.client import Model

    extra = {"shm": False} if scheme == "http" else {}
    model = Model(f"{scheme}://{address}", name, timeout_s=60, **extra)
    return model.predict, model.close


def open_triton(door, address, name, rows, *, shared):
    """Return a call through tritonclient; shared: by system shared memory, the image copied into it for each call."""
    import importlib

    lib = importlib.import_module(f"tritonclient.{door}")
    client = lib.InferenceServerClient(address)
    wanted = [lib.InferRequestedOutput("y")]
    if shared:
        return _open_shared(lib, client, name, rows)

    def call(x):
        tensor = lib.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        return client.infer(name, [tensor], outputs=wanted).as_numpy("y")

    return call, client.close


def _open_shared(lib, client, name, rows):
    import tritonclient.utils.shared_memory as shm

    answer_bytes = rows * 4096
    keys = [f"/pairs-{os.getpid()}-{lib.__name__}-{part}" for part in ("x", "y")]
    taken = shm.create_shared_memory_region(keys[0][1:], keys[0], rows * 602112)
    given = shm.create_shared_memory_region(keys[1][1:], keys[1], answer_bytes)
    client.register_system_shared_memory(keys[0][1:], keys[0], rows * 602112)
    client.register_system_shared_memory(keys[1][1:], keys[1], answer_bytes)
    tensors, outputs = {}, lib.InferRequestedOutput("y")
    outputs.set_shared_memory(keys[1][1:], answer_bytes)

    def call(x):
        shm.set_shared_memory_region(taken, [x])
        if x.shape not in tensors:
            tensors[x.shape] = lib.InferInput("x", list(x.shape), "FP32")
            tensors[x.shape].set_shared_memory(keys[0][1:], x.nbytes)
        told = client.infer(name, [tensors[x.shape]], outputs=[outputs]).get_output("y")
        shape = told["shape"] if isinstance(told, dict) else list(told.shape)
        return shm.get_contents_as_numpy(given, np.float32, shape).copy()

    def close():
        for key in keys:
            client.unregister_system_shared_memory(key[1:])
        shm.destroy_shared_memory_region(taken)
        shm.destroy_shared_memory_region(given)
        client.close()

    return call, close


def open_json(address, name):
    """Return a call with the numbers written out in JSON."""
    import http.client

    connection = http.client.HTTPConnection(address, timeout=60)

    def call(x):
        tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.reshape(-1).tolist()}
        connection.request("POST", f"/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}))
        (output,) = json.loads(connection.getresponse().read())["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    return call, connection.close


def open_way(way, addresses, name, rows):
    """Return (call, close) of one way to the server."""
    if way == "json":
        return open_json(addresses["http"], name)
    if way.startswith("triton_"):
        door = {"triton_shm": "grpc", "triton_shm_http": "http"}.get(way, way.removeprefix("triton_"))
        return open_triton(door, addresses[door], name, rows, shared=way.startswith("triton_shm"))
    return open_ours(way, addresses["grpc" if way == "grpc" else "http"], name)


def main():
    """Open all ways, then answer commands until the input ends."""
    told = json.loads(sys.argv[1])
    rng = random.Random(told["seed"])
    x = np.random.default_rng(told["seed"]).normal(size=(told["rows"], 3, 224, 224)).astype(np.float32)
    local = session(told["file"], told["threads"])

    def here(part):
        return local.run(["y"], {"x": part})[0]

    ways = {way: open_way(way, told["addresses"], told["name"], told["rows"]) for way in told["ways"]}
    for way, (call, _) in ways.items():
        for part in (x[:1], x):
            found, expected = np.asarray(call(part)), here(part)
            assert found.shape == expected.shape, f"{way} gave {found.shape}"
            assert np.allclose(found, expected, rtol=1e-3, atol=1e-4), f"{way} answered wrongly"
    print(json.dumps({"ready": list(ways)}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        call, part = ways[order["way"]][0], x[: order["rows"]]
        print(json.dumps(measure(here, call, part, order["pairs"], told["pid"], rng)), flush=True)
    for _, close in ways.values():
        close()


def measure(here, call, part, count, pid, rng):
    """Return the times of so many pairs, and the CPU time of both sides."""
    pairs, own_cpu_s = [], 0.0
    pids = tree(pid)
    server_before_s = cpu_s(pids)
    for _ in range(count):
        took_s = {}
        for which in rng.sample(("here", "served"), 2):
            cpu_before_s = time.process_time()
            before_s = time.perf_counter()
            (here if which == "here" else call)(part)
            took_s[which] = time.perf_counter() - before_s
            if which == "here":
                own_cpu_s += time.process_time() - cpu_before_s
        pairs.append([took_s["here"], took_s["served"]])
    return {"pairs": pairs, "in_process_cpu_s": own_cpu_s, "server_cpu_s": cpu_s(pids) - server_before_s}


if __name__ == "__main__":
    main()
