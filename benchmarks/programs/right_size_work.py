"""Twenty real workloads for `lease_right_size`: ``python right_size_work.py NAME SECONDS SEED`` repeats one's pass of work.

Each pass does the same work on the same input; its checksum goes to stdout, a line per pass, at least three. The libraries'
threads are as the environment says. Input is made from the seed before the first pass.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import lzma
import random
import re
import sqlite3
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

LEAST_PASSES = 3
Pass = Callable[[], object]


def _text(rng: random.Random, size: int) -> bytes:
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    return " ".join(rng.choices(words, k=size // 6)).encode()[:size]


def _crc(data: object) -> int:
    return zlib.crc32(data if isinstance(data, bytes) else repr(data).encode())


def matmul(rng: random.Random) -> Pass:
    """Multiply matrices."""
    import numpy as np

    a = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 100, (1500, 1500)).astype(np.float64)
    return lambda: _crc((a @ a).astype(np.int64).tobytes())


def sort_numbers(rng: random.Random) -> Pass:
    """Sort numbers of NumPy."""
    import numpy as np

    values = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 1 << 40, 6_000_000)
    return lambda: _crc(np.sort(values).tobytes()[::4096])


def fourier(rng: random.Random) -> Pass:
    """Transform a signal there and back."""
    import numpy as np

    signal = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 1000, 1 << 21).astype(float)
    return lambda: _crc(np.rint(np.fft.irfft(np.fft.rfft(signal))).astype(np.int64).tobytes())


def singular_values(rng: random.Random) -> Pass:
    """Decompose a matrix."""
    import numpy as np

    a = np.random.default_rng(rng.randrange(1 << 30)).random((600, 600))
    return lambda: _crc([round(float(value), 6) for value in np.linalg.svd(a, compute_uv=False)[:20]])


def sparse(rng: random.Random) -> Pass:
    """Square a sparse matrix."""
    import numpy as np
    from scipy.sparse import csr_array

    draw = np.random.default_rng(rng.randrange(1 << 30))
    rows, columns = draw.integers(0, 20_000, (2, 300_000))
    a = csr_array((draw.random(300_000), (rows, columns)), shape=(20_000, 20_000))
    return lambda: _crc(round(float((a @ a).sum()), 3))


def forest(rng: random.Random) -> Pass:
    """Train a random forest."""
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier

    x, y = make_classification(4000, 40, n_informative=20, random_state=rng.randrange(1 << 30))
    return lambda: _crc(RandomForestClassifier(40, random_state=1, n_jobs=1).fit(x, y).predict(x).tolist())


def boosting(rng: random.Random) -> Pass:
    """Train boosted trees."""
    from sklearn.datasets import make_classification
    from sklearn.ensemble import HistGradientBoostingClassifier

    x, y = make_classification(20_000, 40, random_state=rng.randrange(1 << 30))
    return lambda: _crc(HistGradientBoostingClassifier(max_iter=20, random_state=1).fit(x, y).predict(x).tolist())


def clusters(rng: random.Random) -> Pass:
    """Find clusters."""
    from sklearn.cluster import KMeans
    from sklearn.datasets import make_blobs

    x, _ = make_blobs(60_000, 16, centers=12, random_state=rng.randrange(1 << 30))
    return lambda: _crc(sorted(Counter(KMeans(12, n_init=1, random_state=1).fit_predict(x).tolist()).values()))


def components(rng: random.Random) -> Pass:
    """Find principal components."""
    import numpy as np
    from sklearn.decomposition import PCA

    x = np.random.default_rng(rng.randrange(1 << 30)).random((20_000, 100))
    return lambda: _crc([round(float(v), 6) for v in PCA(10, random_state=1).fit(x).explained_variance_])


def pictures(rng: random.Random) -> Pass:
    """Read, shrink and write pictures."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    with io.BytesIO() as out:
        Image.fromarray(pixels).resize((3000, 2250)).save(out, "JPEG")
        coded = out.getvalue()

    def once() -> int:
        total = 0
        for _ in range(4):
            with Image.open(io.BytesIO(coded)) as image, io.BytesIO() as out:
                image.convert("RGB").resize((800, 600)).save(out, "PNG")
                total += len(out.getvalue())
        return total

    return once


def inference(rng: random.Random) -> Pass:
    """Run a network in ONNX Runtime."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(rng.randrange(1 << 30))
    sizes, nodes, weights = [784, 2048, 2048, 10], [], []
    for layer, (rows, columns) in enumerate(pairwise(sizes)):
        weights.append(numpy_helper.from_array(draw.standard_normal((rows, columns)).astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"x{layer + 1}"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x0", 784), ("x3", 10))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    x = draw.standard_normal((256, 784)).astype(np.float32)
    return lambda: _crc([int(v) for v in session.run(None, {"x0": x})[0].argmax(axis=1)])


def database(rng: random.Random) -> Pass:
    """Fill, index and ask a database in memory."""
    rows = [(number, rng.randrange(1000), f"name {rng.randrange(1 << 20)}") for number in range(150_000)]

    def once() -> object:
        with sqlite3.connect(":memory:") as connection:
            connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, kind INTEGER, name TEXT)")
            connection.executemany("INSERT INTO t VALUES (?, ?, ?)", rows)
            connection.execute("CREATE INDEX i ON t (kind, name)")
            found = connection.execute("SELECT kind, count(*), max(name) FROM t GROUP BY kind ORDER BY kind").fetchall()
        connection.close()
        return _crc(found)

    return once


def compress_lzma(rng: random.Random) -> Pass:
    """Compress with LZMA."""
    data = _text(rng, 2 << 20)
    return lambda: _crc(lzma.compress(data, preset=4))


def compress_bz2(rng: random.Random) -> Pass:
    """Compress with bzip2."""
    data = _text(rng, 6 << 20)
    return lambda: _crc(bz2.compress(data))


def compress_zlib(rng: random.Random) -> Pass:
    """Compress and decompress with zlib."""
    data = _text(rng, 24 << 20)
    return lambda: _crc(zlib.decompress(zlib.compress(data, 6))[::4096])


def parse_json(rng: random.Random) -> Pass:
    """Write and read JSON."""
    things = [{"id": n, "tags": [f"t{rng.randrange(99)}" for _ in range(5)], "x": rng.random()} for n in range(80_000)]
    return lambda: _crc(len(json.loads(json.dumps(things))))


def parse_csv(rng: random.Random) -> Pass:
    """Read a table."""
    table = "\n".join(",".join(str(rng.randrange(10_000)) for _ in range(12)) for _ in range(100_000))
    return lambda: sum(int(row[3]) for row in list(csv.reader(io.StringIO(table))))


def count_words(rng: random.Random) -> Pass:
    """Find and count words."""
    text = _text(rng, 12 << 20).decode()
    return lambda: _crc(Counter(re.findall(r"[a-z]+", text)).most_common(20))


def sort_strings(rng: random.Random) -> Pass:
    """Sort strings."""
    strings = [f"{rng.randrange(1 << 40):x}" for _ in range(600_000)]
    return lambda: _crc(sorted(strings)[::1000])


def hash_tree(rng: random.Random) -> Pass:
    """Hash blocks into a tree."""
    data = _text(rng, 48 << 20)

    def once() -> str:
        level = [hashlib.sha256(data[i : i + 4096]).digest() for i in range(0, len(data), 4096)]
        while len(level) > 1:
            level = [hashlib.sha256(b"".join(level[i : i + 2])).digest() for i in range(0, len(level), 2)]
        return level[0].hex()

    return once


WORK = (
    *(matmul, database, parse_json, pictures),  # those of --quick: one of each kind
    *(sort_numbers, fourier, singular_values, sparse, forest, boosting, clusters, components, inference),
    *(compress_lzma, compress_bz2, compress_zlib, parse_csv, count_words, sort_strings, hash_tree),
)


def main(name: str, seconds: str, seed: str) -> None:
    """Repeat a workload's pass for so long, and three times at least."""
    once = {work.__name__: work for work in WORK}[name](random.Random(int(seed)))
    begun_s, passes = time.monotonic(), 0
    while passes < LEAST_PASSES or time.monotonic() - begun_s < float(seconds):
        print(once(), flush=True)
        passes += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
