"""What to change about each kind of bottleneck, and which factors of a trial are that change. Texts and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_OVERLAP = "Overlap it with the model's work: asynchronous calls keep requests on their way meanwhile."


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about one kind of bottleneck."""

    change: str
    factors: tuple[str, ...]
    """Of a trial's configuration, the first to be tried first; ``place`` is architecture, transport and link."""


_ADVICE: Mapping[str, Advice] = {
    "gpu": Advice(
        "Use less GPU time per image: larger batches, half precision, a smaller model. Nothing around the GPU helps.",
        ("batch",),
    ),
    "link": Advice(
        "Send fewer bytes per image (8-bit pixels or the JPEG file itself instead of floats), or take a faster link.",
        ("place",),
    ),
    "node model": Advice(
        "The model itself fills the cores: a smaller or quantised one, more cores, or a GPU.",
        ("batch", "place"),
    ),
    "node app": Advice(
        "Spend less CPU in the application: pictures decoded at the size that is needed, or elsewhere; larger batches.",
        ("batch", "place", "data"),
    ),
    "node server": Advice(
        "Spend less CPU on the way: shared memory on one machine, or the model in the application's process.",
        ("place", "batch"),
    ),
    "node other": Advice(
        "Which part of that server uses them is not known here: see its own statistics, and its CPU per image beside ours.",
        ("batch", "place", "server"),
    ),
    "node client": Advice("Spend less CPU on sending: larger batches, shared memory on one machine.", ("batch", "place")),
    "app": Advice(
        "It has one thread while cores stand idle: decode in several threads, send from several applications, or make larger "
        "batches, which cost it less per image.",
        ("batch", "interaction", "place", "data", "clients"),
    ),
    "client": Advice("Larger batches, or a cheaper transport: shared memory on one machine.", ("batch", "place")),
    "server": Advice(
        "A cheaper transport (shared memory on one machine), or larger batches: fewer requests.", ("place", "batch")
    ),
    "recogniser": Advice("More instances of the model, or more threads for it: cores stand idle.", ("batch",)),
    "forwarder": Advice("What is measured is the emulated link: declare a slower one, or use a real one.", ("place",)),
    "delay": Advice(
        "Keep more requests on their way (async), or send larger batches: each round trip then carries more.",
        ("interaction", "batch", "place"),
    ),
    "queue": Advice(
        "More instances or threads of the model where cores stand idle; else fewer requests in flight.", ("batch",)
    ),
    "load_data": Advice(f"Read files ahead. {_OVERLAP}", ("interaction", "place", "data")),
    "prepare_data": Advice(f"Decode in several threads. {_OVERLAP}", ("interaction", "place", "data")),
    "send": Advice("Shared memory instead of a socket on one machine; else larger batches.", ("place", "interaction", "batch")),
    "recognise": Advice(f"Cores stand idle while a request is answered. {_OVERLAP}", ("interaction", "batch", "place")),
    "fetch": Advice("Ask only for outputs that are needed; shared memory on one machine.", ("place", "interaction", "batch")),
    "log": Advice("Write the log in another thread, or less of it.", ("interaction", "batch")),
    "other": Advice("Larger batches: this work is done once per request.", ("batch", "interaction")),
}


def advice(where: str, party: str) -> Advice:
    """Return what to do about a bottleneck; where and party as `bottleneck.Bottleneck` has them. Raises KeyError."""
    if where == "others":  # what uses the CPU is known all the same
        known = advice("node", party)
        return Advice(f"Measure again while nobody else uses the machine. {known.change}", known.factors)
    if where in ("node", "server_node", "client_node"):
        return _ADVICE.get(f"node {party}", _ADVICE["node server"])
    return _ADVICE[where]
