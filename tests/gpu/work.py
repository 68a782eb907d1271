"""A CUDA program for the checks. It speaks JSON lines.

`python -m tests.gpu.work` with

alloc BYTES... [--hold | --stay]   allocates each amount in turn and says what it got; keeps it until its input closes, or for
                                   a minute
burn SECONDS                       says that it is ready, waits for a line, runs the kernel again and again; says how many
                                   blocks a second, all answers checked
churn SECONDS                      the same without waiting
"""

import json
import sys
import time
from typing import Any

from tests.gpu.cuda import LOOPS, THREADS, CudaError, open_device

BLOCKS_PER_MULTIPROCESSOR = 32


def main(argv: list[str]) -> int:
    kind, *words = argv
    try:
        if kind == "alloc":
            alloc([int(word) for word in words if word.isdigit()])
            if "--hold" in words:
                sys.stdin.read()
            elif "--stay" in words:
                time.sleep(60.0)
        else:
            burn(float(words[0]), waits=kind == "burn")
    except CudaError as error:
        say(error=str(error), code=error.code)
        return 3
    return 0


def alloc(sizes: list[int]) -> None:
    cuda = open_device()
    got = [cuda.allocate(size) is not None for size in sizes]
    free, total = cuda.memory()
    say(got=got, free_bytes=free, total_bytes=total, multiprocessors=cuda.multiprocessors, visible=cuda.visible)


def burn(seconds: float, *, waits: bool) -> None:
    cuda = open_device()
    blocks = cuda.multiprocessors * BLOCKS_PER_MULTIPROCESSOR
    out = cuda.allocate(blocks * THREADS * 4)
    assert out is not None
    loops = LOOPS
    cuda.burn(out, blocks, loops)  # compiles, and lets the clock go up
    say(ready=True, multiprocessors=cuda.multiprocessors, visible=cuda.visible)
    if waits:
        sys.stdin.readline()
    end_s = time.monotonic() + 0.3
    while time.monotonic() < end_s:
        cuda.burn(out, blocks, loops)
    began_s, launches = time.monotonic(), 0
    while time.monotonic() < began_s + seconds:
        cuda.burn(out, blocks, loops)
        launches += 1
    took_s = time.monotonic() - began_s
    answers = cuda.floats(out, blocks * THREADS)
    say(
        blocks_per_s=blocks * launches / took_s,
        launches=launches,
        right=all(value == 2.0 for value in answers),
        multiprocessors=cuda.multiprocessors,
    )


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
