"""The trials of a serving experiment, made up from a small model of it: settings as `tenure bench serve` has them."""

import itertools
import random
from dataclasses import replace

import numpy as np

from tenure.decide.bottleneck import STAGES
from tenure.experiments.report import ReportData
from tenure.jobs import Command, Job, ServeGoal
from tenure.leases import EndReason, Lease, LeaseState
from tenure.nodes import Node
from tenure.resources import Capacity, Envelope
from tenure.runs import Run, RunState, Stage
from tenure.usage import summarize

from .synthetic import BOUNDS, MACHINE, MIB, RUN, T0, trial

REPEATS = 20
MODEL_S, DECODE_S, READ_S = 0.009, 0.004, 0.0003
"""CPU seconds of one picture: in the model, decoding, reading."""
SEND_S = {"none": 0.0, "shm": 0.0002, "grpc": 0.0008, "http": 0.0011}
"""CPU seconds per picture on the way, half of it on each side, and three times as much again per request."""


def settings():
    places = [("simple", "none", "in-process", "tenure")]
    places += [("microservice", transport, "loopback", "tenure") for transport in ("http", "grpc", "shm")]
    places += [("distributed", transport, "1Gbit 20ms", "tenure") for transport in ("http", "grpc")]
    places += [("microservice", "grpc", "loopback", "triton")]
    for (architecture, transport, link, server), how, data, batch in itertools.product(
        places, ("sync", "async"), ("memory", "files"), (1, 8, 32)
    ):
        yield {
            "architecture": architecture,
            "transport": transport,
            "interaction": how,
            "batch": batch,
            "clients": 1,
            "link": link,
            "server": server,
            "data": data,
            "load": "closed",
            "runtime": "process",
        }


def measured(number, factors, rng, cores=2.0):
    batch, simple = factors["batch"], factors["architecture"] == "simple"
    places = min(8, max(2, 64 // batch)) if factors["interaction"] == "async" else 1
    load_s, prepare_s = (batch * READ_S, batch * DECODE_S) if factors["data"] == "files" else (0.0, 0.00005)
    way_s = (batch + 3) * SEND_S[factors["transport"]]
    model_s = batch * MODEL_S * (1.08 if factors["server"] == "triton" else 1.0) * (1 + 0.15 / batch)
    delay_s = 0.02 if factors["architecture"] == "distributed" else 0.0
    app_s, server_s = load_s + prepare_s + way_s / 2 + 0.0001, 0.0 if simple else model_s + way_s / 2
    alone_s = app_s + (server_s or model_s) + 2 * delay_s
    rate = min(places / alone_s, cores / (app_s + (server_s or model_s)) * 0.96)
    wall_s = places / rate
    stages = {
        "load_data_s": load_s,
        "prepare_data_s": prepare_s,
        "send_s": way_s / 4,
        "fetch_s": way_s / 4,
        "log_s": 0.00004,
        "other_s": 0.00006,
    }
    stages["recognise_s"] = wall_s - sum(stages.values())
    drift = 1 - 0.1 * np.arange(REPEATS) / REPEATS  # the machine slows down; all settings of a repeat alike
    spread = 0.03 if factors["architecture"] == "distributed" else 0.006
    rates = batch * rate * drift * (1 + spread * rng.normal(size=REPEATS))
    latencies = np.sort((wall_s - load_s - prepare_s) * (1 + 0.15 * rng.gamma(2.0, size=1001)))
    app, server, model = rate * (app_s + (model_s if simple else 0.0)), rate * server_s, rate * model_s
    parts = {"app": app, "recogniser": model}
    parts |= {} if simple else {"client": rate * way_s / 2, "server": server}
    metrics = {
        "images_per_s": summarize(rates.tolist()),
        "mean_s": summarize([wall_s]),
        "p50_s": summarize([float(latencies[500])]),
        "p99_s": summarize([float(latencies[990])]),
        "requests": summarize([max(4.0, rate * 0.5)] * REPEATS),
        "wall_s": summarize([wall_s] * REPEATS),
        **{name: summarize([stages[name]] * REPEATS) for name in STAGES},
        **{f"{name}_cpu": summarize([cpu] * REPEATS) for name, cpu in parts.items()},
        **{f"{name}_cpu_s_per_image": summarize([cpu / rate / batch] * REPEATS) for name, cpu in parts.items()},
        **{
            f"{name}_cpu_max": summarize([min(2.0, 1.1 * parts[name])] * REPEATS) for name in ("app", "server") if name in parts
        },
        **{f"{name}_cpu_min": summarize([0.4 * parts[name]] * REPEATS) for name in ("app", "server") if name in parts},
        "app_memory_bytes": summarize([(60 + (90 if simple else 0) + 0.6 * batch * places) * MIB] * REPEATS),
        "prepare_model_s": summarize([0.21 if simple else 0.012] * 3),
        "other_cpu_cores": summarize([0.05] * REPEATS),
        "wrong_answers": summarize([0.0] * REPEATS),
    }
    if not simple:
        metrics["server_memory_bytes"] = summarize(
            [(140 + 0.6 * batch * places + 6 * places) * MIB + i for i in range(REPEATS)]
        )
        metrics |= {"queue_s": summarize([0.3 * model_s * (places - 1)] * REPEATS), "compute_s": summarize([model_s] * REPEATS)}
    if factors["server"] == "triton":  # nobody knows which of its processes is which
        metrics = {
            name: summary for name, summary in metrics.items() if not name.startswith(("recogniser", "queue", "compute"))
        }
    curves = {
        "images_per_s": tuple(rates.tolist()),
        "order": tuple(float(place) for place in range(REPEATS)),
        "latency_s": tuple(latencies.tolist()),
    }
    note = f"{places} requests in flight." if places > 1 else ""
    return trial(number, "serve", "sweep", factors, metrics, curves=curves, note=note)


def sweep_trials():
    rng = np.random.default_rng(3)
    random.seed(0)
    made = [measured(200 + number, factors, rng) for number, factors in enumerate(settings())]
    first = made[0].configuration
    twins = [one for one in made if one.configuration["data"] == "files" and one.configuration["architecture"] == "simple"][:3]
    made += [measured(400 + n, {**one.configuration, "twin": 1}, rng) for n, one in enumerate(twins)]
    opened = measured(410, {**first, "architecture": "microservice", "transport": "grpc", "load": "open"}, rng)
    return (*made, replace(opened, metrics={**opened.metrics, "offered_per_s": summarize([40.0])}))


def bench_run(*, goal="p99<400ms", p99_s=0.4, trials=None):
    leases = tuple(
        Lease(
            id=f"l-{part}",
            run_id=RUN,
            stage="serve",
            worker=0,
            envelope=Envelope(cpus=2.0, memory_bytes=1 << 30, slot_s=120, total_s=600),
            command=Command(argv=("python", "-m", "tenure.serve.load.node", f"{part}-node.json")),
            state=LeaseState.ENDED,
            attempt=1,
            node="local",
            fence=1,
            requested_at_s=T0,
            starts_at_s=T0,
            ends_at_s=T0 + 300,
            total_ends_at_s=T0 + 600,
            ended_at_s=T0 + 300,
            end_reason=EndReason.COMPLETED,
        )
        for part in ("server", "client")
    )
    run = Run(
        id=RUN,
        name="mobilenet-v2",
        tenant="default",
        job_file="[run]\nname = 'mobilenet-v2'\n",
        source="mobilenet-v2.onnx",
        state=RunState.DONE,
        stages=(Stage(name="serve", kind="serve", state=RunState.DONE, fingerprint="serve-0123456789", attempts=1),),
        created_at_s=T0,
    )
    goals = (ServeGoal(name=goal, p99_s=p99_s),) if goal else (ServeGoal(name="any"),)
    return ReportData(
        run=run,
        node=Node(name="local", capacity=Capacity(cpus=2, memory_bytes=6 << 30), machine=MACHINE, bounds={"process": BOUNDS}),
        leases=leases,
        trials=sweep_trials() if trials is None else trials,
        jobs={"serve": Job(kind="serve", name="serve", model="model.onnx", serve_goals=goals)},
        at_s=T0 + 400,
    )
