"""How many instances of a model, and how many threads each, make use of a share of the CPUs; with the reason.

Measured on a shared machine of two cores at a load of 5 to 11, in turns, images per second and CPU time per image:

| model, batch 1 | one instance of two threads | two instances of one thread | one of one |
| --- | --- | --- | --- |
| ResNet-50 fp32, ONNX Runtime, 102 MB | 2.8/s, 93 ms | 3.8/s, 83 ms | 4.0/s, 82 ms |
| MobileNetV2 QDQ, ONNX Runtime, 14 MB | 39/s, 9.8 ms | 34/s, 8.7 ms | 46/s, 8.9 ms |
| MobileNetV2 uint8, LiteRT, 3.6 MB | 46/s, 8.0 ms | 52/s, 7.0 ms | 42/s, 7.4 ms |
| MobileNetV1 0.25 uint8, LiteRT, 0.5 MB | 268/s, 0.77 ms | 403/s, 0.51 ms | 602/s, 0.52 ms |

So a second thread costs 10-15 % more CPU per image, and half as much again where a run takes half a millisecond. What it
buys is the time of a single request (the best of many: 6.9 to 4.0 ms for the third row, 0.44 to 0.26 ms for the last),
and one copy of the weights instead of two. Hence: models whose runs are long get one instance with all threads, up to
four, then more instances; small ones get one thread. Who has many clients and no hurry sets instances = cores,
threads = 1. Beyond two cores nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from tenure.errors import SpecError

MAX_THREADS = 4
MAX_INSTANCES = 8
SMALL_BYTES = 2_000_000
"""A model file below this has runs so short that a second thread costs half as much CPU again."""


@dataclass(frozen=True, slots=True)
class Threads:
    """What a model gets."""

    instances: int
    threads: int
    """Per instance."""
    reason: str


def choose_threads(
    cpus: float, *, kind: str, model_bytes: int, device: str = "cpu", instances: int = 0, threads: int = 0
) -> Threads:
    """Return how to use `cpus` cores, which may be a fraction; `instances` and `threads` above 0 are kept.

    kind: the model file's ending, ``.onnx``. A fraction of a core is left to the server: threads beyond a quota are all
    stopped together when it is used up. Raises SpecError for a share that is not above 0.
    """
    if not cpus > 0 or instances < 0 or threads < 0:
        raise SpecError(f"threads need a CPU share above 0, and counts of 0 or more; found {cpus}, {instances}, {threads}")
    cores = max(1, int(cpus))
    share = f"{cpus:g} CPUs"
    if instances and threads:
        return Threads(instances, threads, "both as asked for")
    if instances:
        return Threads(instances, max(1, cores // instances), f"{share} shared by the {instances} instances asked for")
    if threads:
        return Threads(min(MAX_INSTANCES, max(1, cores // threads)), threads, f"{share} in instances of the threads asked for")
    if device != "cpu":
        return Threads(1, 1, f"the device {device} does the work; one instance keeps it busy")
    if kind == ".skops":
        return Threads(1, 1, "runs of scikit-learn are short; batches do more than threads")
    if model_bytes < SMALL_BYTES:
        few = min(MAX_INSTANCES, max(1, cores // 2))
        return Threads(
            few, 1, f"a model of {model_bytes} bytes is too small for a second thread; half of {share} leave the doors room"
        )
    each = min(MAX_THREADS, cores)
    many = min(MAX_INSTANCES, cores // each)
    return Threads(many, each, f"{share}: threads shorten a single request, up to {MAX_THREADS}; more cores make instances")
