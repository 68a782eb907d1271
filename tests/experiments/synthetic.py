"""A full digits run, made up: rows as the broker would hand them out, so that the report can be built without one."""

import math
from dataclasses import replace

from tenure.codec import to_builtins
from tenure.events import Event
from tenure.experiments.report import ReportData
from tenure.jobs import Command, Job, ServeGoal, TrainGoal
from tenure.leases import EndReason, Lease, LeaseState
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, Envelope
from tenure.runs import Run, RunState, Stage
from tenure.trials import Broken, Candidate, Prediction, Recommendation, Trial
from tenure.usage import Usage, summarize
from tenure.wire import UsagePoint

MIB = 1 << 20
T0 = 1_790_000_000.0
RUN = "r-20260921-7f3a"
MACHINE = Machine(
    cpu_model="Example CPU 2.1GHz", cpu_features=("avx2", "fma"), cores=2, memory_bytes=8 << 30, kernel="6.1", python="3.11"
)
BOUNDS = {"memory_bytes": "exact", "cpus": "exact", "disk_bytes": "upper", "slot_s": "exact", "total_s": "exact"}


def spread(mean, n=3, share=0.04):
    return summarize([mean * (1 + share * math.sin(7.0 * index + mean)) for index in range(n)])


def around(value, share=0.12):
    return Prediction(value=value, low=value * (1 - share), high=value * (1 + share))


def trial(number, stage, source, configuration, metrics, **more):
    return Trial(
        id=f"t-{number:03d}",
        run_id=RUN,
        stage=stage,
        fingerprint=f"{stage}-0123456789",
        source=source,
        configuration=configuration,
        metrics=metrics,
        bounds=BOUNDS,
        machine=MACHINE,
        versions={"numpy": "2.1.0", "onnxruntime": "1.20.1", "tenure": "0.1.0"},
        seed=7,
        at_s=T0 + number,
        **more,
    )


def learning(rounds):
    steps = tuple(float(index) for index in range(0, rounds + 1, 4))
    return {"round": steps, "accuracy": tuple(0.972 - 0.87 * (1 + step / 3) ** -1.1 for step in steps)}


def training_trials():
    made = []
    for number, (workers, rounds) in enumerate(((1, 24), (2, 24), (1, 60))):
        metrics = {
            "startup_s": spread(0.41),
            "shard_s": spread(0.0021),
            "combine_s": spread(0.0009),
            "round_s": spread(0.0165 / workers + 0.004),
            "peak_memory_bytes": spread(71.0 * MIB, share=0.01),
            "examples_per_s": spread(85_000.0 * workers),
        }
        made.append(
            trial(
                number, "train", "probe", {"workers": workers, "cpus": 1.0, "rounds": rounds}, metrics, curves=learning(rounds)
            )
        )
    observed = {name: summarize([value]) for name, value in OBSERVED.items()}
    made.append(trial(9, "train", "observed", {"workers": 2, "cpus": 1.0, "rounds": 88}, observed, curves=learning(88)))
    return made


OBSERVED = {
    "time_s": 3.4,
    "rounds": 88.0,
    "accuracy": 0.9546,
    "round_s": 0.0131,
    "peak_memory_bytes": 73.5 * MIB,
    "cost_usd": 4.1e-5,
}


def training_candidate(workers, cpus, broken=()):
    time_s = 0.4 + 90 * (0.0165 / workers / cpus + 0.004)
    return Candidate(
        configuration={"workers": workers, "cpus": cpus},
        envelope=Envelope(cpus=cpus, memory_bytes=96 * MIB, slot_s=20, total_s=60),
        leases=workers,
        predictions={
            "time_s": around(time_s),
            "rounds": around(90.0, 0.06),
            "round_s": around(0.0165 / workers / cpus + 0.004),
            "peak_memory_bytes": around(72.0 * MIB, 0.1),
            "cost_usd": around(time_s * workers * cpus * 1.1e-5),
        },
        broken=broken,
    )


def training_recommendation():
    slow = Broken(constraint="time_s", limit=2.0, found=2.6, reason="It would take 2.6 s; the goal allows 2 s.")
    dear = Broken(
        constraint="cost_usd", limit=2.9e-5, found=4.2e-5, reason="It meets the goal but costs $4.2e-05, not $2.9e-05."
    )
    full = Broken(constraint="node capacity", limit=2.0, found=4.0, reason="4 cpus are needed; node local has 2.")
    return Recommendation(
        id="rec-train",
        run_id=RUN,
        stage="train",
        goal="accuracy ≥ 95 % within 2min",
        chosen=training_candidate(2, 1.0),
        ruled_out=(
            training_candidate(1, 1.0, (slow,)),
            training_candidate(1, 0.5, (slow,)),
            training_candidate(2, 0.5, (slow,)),
            training_candidate(3, 1.0, (full, dear)),
            training_candidate(4, 0.5, (dear,)),
            training_candidate(4, 1.0, (full,)),
        ),
        trials=("t-000", "t-001", "t-002"),
        why="Two workers are the cheapest that reach 95 % in time: one would need 2.6 s, four do not fit on the node.",
        at_s=T0 + 8,
    )


def serving_trials():
    made, number = [], 20
    places = [("simple", "none", "in-process")]
    places += [
        (where, how, link)
        for where, link in (("microservice", "loopback"), ("distributed", "netns"))
        for how in ("http", "grpc")
    ]
    for architecture, transport, link in places:
        for interaction in ("sync", "async"):
            for batch in (1, 8, 32):
                far = {"simple": 0.0, "microservice": 0.0009, "distributed": 0.0011}[architecture]
                request = 0.00004 + 0.000004 * batch + far * (0.8 if transport == "grpc" else 1.0)
                wide = 2.2 if interaction == "async" and far else 1.0
                metrics = {
                    "images_per_s": spread(batch / request * wide),
                    "p50_s": spread(request * 0.95 * wide),
                    "p99_s": spread(request * 2.1 * wide, share=0.2),
                    "mean_s": spread(request * wide),
                    "prepare_model_s": spread(0.05),
                    "prepare_data_s": spread(0.002),
                    "send_s": spread(request * 0.1),
                    "recognise_s": spread(request * 0.7),
                    "fetch_s": spread(request * 0.1),
                    "app_cpu_s_per_image": spread(request * 0.5 / batch),
                    "server_cpu_s_per_image": spread(request * 0.4 / batch) if far else summarize([0.0] * 3),
                    "app_memory_bytes": spread((62.0 if far == 0 else 24.0) * MIB, share=0.01),
                    "server_memory_bytes": spread(70.0 * MIB, share=0.01) if far else summarize([0.0] * 3),
                    "wrong_answers": summarize([0.0] * 3),
                }
                configuration = {
                    "architecture": architecture,
                    "transport": transport,
                    "interaction": interaction,
                    "batch": batch,
                    "clients": 1,
                    "link": link,
                }
                made.append(trial(number, "serve", "probe", configuration, metrics))
                number += 1
    return made


def serving_candidate(architecture, transport, batch, rate, p99_s, memory_mib, usd, broken=()):
    return Candidate(
        configuration={"architecture": architecture, "transport": transport, "interaction": "sync", "batch": batch},
        envelope=Envelope(memory_bytes=memory_mib * MIB, slot_s=600, total_s=3600),
        predictions={
            "images_per_s": around(rate),
            "p99_s": around(p99_s, 0.3),
            "memory_bytes": around(memory_mib * MIB, 0.1),
            "cost_usd": around(usd, 0.1),
        },
        broken=broken,
    )


def serving_recommendations():
    late = Broken(constraint="p99_s", limit=0.0005, found=0.0019, reason="p99 would be 1.9 ms; the goal allows 0.5 ms.")
    big = Broken(
        constraint="memory_bytes",
        limit=300.0 * MIB,
        found=520.0 * MIB,
        reason="8 copies need 520 MiB; the goal allows 300 MiB.",
    )
    one = Recommendation(
        id="rec-one",
        run_id=RUN,
        stage="serve",
        goal="single: p99 ≤ 0.5 ms",
        chosen=serving_candidate("simple", "none", 1, 21_000.0, 0.0001, 64, 0.021),
        ruled_out=(
            serving_candidate("microservice", "grpc", 1, 1_200.0, 0.0016, 96, 0.034, (late,)),
            serving_candidate("microservice", "http", 1, 1_000.0, 0.0019, 96, 0.034, (late,)),
        ),
        trials=("t-020", "t-026"),
        why="In one process nothing has to be sent, so it alone answers in time.",
        at_s=T0 + 60,
    )
    many = Recommendation(
        id="rec-many",
        run_id=RUN,
        stage="serve",
        goal="shared: 8 clients, memory ≤ 300 MiB",
        chosen=serving_candidate("microservice", "grpc", 8, 6_100.0, 0.004, 262, 0.052),
        ruled_out=(
            serving_candidate("simple", "none", 8, 90_000.0, 0.0003, 520, 0.071, (big,)),
            serving_candidate(
                "microservice",
                "http",
                8,
                5_000.0,
                0.005,
                270,
                0.055,
                (Broken(constraint="cost_usd", limit=0.052, found=0.055, reason="It costs more."),),
            ),
        ),
        trials=("t-021",),
        why="One service holds the model once; eight copies would break the memory bound.",
        at_s=T0 + 61,
    )
    return one, many


def observed_serving():
    base = {"interaction": "sync", "clients": 8, "link": "loopback"}
    many = trial(
        90,
        "serve",
        "observed",
        {"architecture": "microservice", "transport": "grpc", "batch": 8, **base},
        {"images_per_s": summarize([4_300.0]), "p99_s": summarize([0.0046]), "memory_bytes": summarize([259.0 * MIB])},
    )
    return [many]


def leases_and_events():
    leases, events = [], [Event(seq=1, at_s=T0, kind="broker.started", who="broker")]
    rows = [("train", 0, "", 1.0, 3.0), ("train", 0, "", 3.2, 5.0), ("train", 0, "g1", 6.0, 9.5), ("train", 1, "g1", 6.0, 9.5)]
    rows += [("serve", 0, "", 10.0 + 3 * index, 12.8 + 3 * index) for index in range(9)]
    for number, (stage, worker, gang, start, end) in enumerate(rows):
        lease = Lease(
            id=f"l-{number:03d}",
            run_id=RUN,
            stage=stage,
            worker=worker,
            gang_id=gang,
            envelope=Envelope(memory_bytes=96 * MIB if gang else 1 << 30, slot_s=20, total_s=60),
            command=Command(argv=("python", "-m", "something")),
            state=LeaseState.ENDED,
            attempt=1,
            node="local",
            fence=number + 1,
            requested_at_s=T0 + start - 0.1,
            starts_at_s=T0 + start,
            ends_at_s=T0 + end,
            total_ends_at_s=T0 + start + 60,
            ended_at_s=T0 + end,
            end_reason=EndReason.RELEASED if number == 1 else EndReason.COMPLETED,
            end_detail="exit 0, peak 73.5 MiB",
        )
        leases.append(lease)
        for kind, at_s in (("lease.granting", start), ("lease.active", start + 0.03), ("lease.ended", end)):
            events.append(
                Event(
                    seq=len(events) + 1,
                    at_s=T0 + at_s,
                    kind=kind,
                    who="broker",
                    run_id=RUN,
                    stage=stage,
                    lease_id=lease.id,
                    data={"lease": to_builtins(lease)},
                )
            )
    return tuple(leases), tuple(events)


def rollups():
    return tuple(
        UsagePoint(
            lease_id=lease_id,
            at_s=T0 + 6 + 0.25 * step,
            usage=Usage(
                at_s=T0 + 6 + 0.25 * step, cpu_s=0.2 * step, memory_bytes=int((30 + 43 * (1 - math.exp(-step / 3))) * MIB)
            ),
        )
        for lease_id in ("l-002", "l-003")
        for step in range(14)
    )


def full_run(name="digits"):
    leases, events = leases_and_events()
    run = Run(
        id=RUN,
        name=name,
        tenant="default",
        job_file="[run]\nname = 'digits'\n",
        source="examples/digits.toml",
        state=RunState.DONE,
        stages=(
            Stage(name="train", kind="train", state=RunState.DONE, fingerprint="train-0123456789", attempts=1),
            Stage(name="serve", kind="serve", state=RunState.DONE, fingerprint="serve-0123456789", attempts=1),
        ),
        created_at_s=T0,
    )
    node = Node(
        name="local",
        capacity=Capacity(cpus=2, memory_bytes=6 << 30),
        machine=MACHINE,
        bounds={"process": BOUNDS},
        confinement={"process": "cgroup v1: memory, cpu, pids"},
    )
    jobs = {
        "train": Job(kind="train", name="train", program="digits.py:Digits", train_goal=TrainGoal(accuracy=0.95)),
        "serve": Job(kind="serve", name="serve", model="train:model.onnx", serve_goals=(ServeGoal(name="single"),)),
    }
    return ReportData(
        run=run,
        node=node,
        leases=leases,
        events=events,
        trials=(*training_trials(), *serving_trials(), *observed_serving()),
        recommendations=(training_recommendation(), *serving_recommendations()),
        usage=rollups(),
        jobs=jobs,
        notes=("train · measure: 3 probes, 4.1 s", "train · recommend: 2 workers × 1 cpu, 96 MiB each"),
        at_s=T0 + 90,
    )


def failed_run():
    """It ended in the first stage, before anything was measured."""
    full = full_run()
    stages = (
        replace(full.run.stages[0], state=RunState.FAILED, detail="the program raised MemoryError: no room"),
        replace(full.run.stages[1], state=RunState.PENDING),
    )
    return ReportData(run=replace(full.run, state=RunState.FAILED, stages=stages), at_s=T0 + 3)
