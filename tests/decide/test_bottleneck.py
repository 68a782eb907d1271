"""Bottlenecks of planted worlds: the truth is a small queueing network whose slowest part is known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.experiments.bench_synthetic import sweep_trials

from tenure.decide.bottleneck import STAGES, bottleneck, changed, find_bottlenecks, repeat_error
from tenure.nodes import Machine
from tenure.trials import Trial
from tenure.usage import summarize

CORES = 4.0
WORK = {"load_data": 0.001, "prepare_data": 0.002, "send": 0.001, "compute": 0.004, "fetch": 0.0005, "log": 0.0001}
"""Seconds of work per image in the planted world."""
MINE = ("load_data", "prepare_data", "send", "fetch", "log")
"""What the application's one thread does."""


def planted(
    number=0, *, work=WORK, in_flight=1, batch=1, delay_s=0.0, cores=CORES, repeats=8, noise=0.0, drift=0.0, **configuration
):
    """Measure one setting of the planted world: one thread of the application, one of the model, a link with a delay."""
    app_s, model_s = batch * sum(work[name] for name in MINE), batch * work["compute"]
    request_s = app_s + model_s + 2 * delay_s
    slow = max(1.0, (app_s + model_s) * min(in_flight / request_s, 1 / app_s, 1 / model_s) / cores)
    rate = min(in_flight / request_s, 1 / app_s, 1 / model_s) / slow
    stages = {f"{name}_s": batch * work[name] for name in MINE}
    wall_s = in_flight / rate
    stages["recognise_s"] = wall_s - app_s
    stages["other_s"] = 0.0
    rng = np.random.default_rng(number)
    rates = [batch * rate * (1 + drift * at) * (1 + noise * rng.normal()) for at in range(repeats)]
    whole = {
        "architecture": "microservice",
        "transport": "grpc",
        "interaction": "async" if in_flight > 1 else "sync",
        "batch": batch,
        "clients": 1,
        "link": f"1Gbit {delay_s * 1e3:g}ms" if delay_s else "loopback",
        "server": "tenure",
        "data": "files",
        "load": "closed",
        **configuration,
    }
    metrics = {"images_per_s": summarize(rates), "wall_s": summarize([wall_s]), "p99_s": summarize([1.2 * request_s] * repeats)}
    metrics |= {name: summarize([stages[name]]) for name in STAGES}
    used = {"app": rate * app_s, "client": rate * batch * work["send"], "server": rate * model_s, "recogniser": rate * model_s}
    if configuration.get("architecture") == "simple":
        used = {"app": rate * (app_s + model_s), "recogniser": rate * model_s}
    metrics |= {f"{party}_cpu": summarize([cpu]) for party, cpu in used.items()}
    metrics |= {f"{party}_cpu_s_per_image": summarize([cpu / rate / batch]) for party, cpu in used.items()}
    metrics |= {"app_memory_bytes": summarize([50e6]), "server_memory_bytes": summarize([100e6])}
    metrics |= {"requests": summarize([200.0] * repeats)}
    return Trial(
        id=f"t-{number}",
        run_id="r",
        stage="serve",
        fingerprint="f",
        source="sweep",
        configuration=whole,
        metrics=metrics,
        machine=Machine(cpu_model="m", cores=int(cores)),
        curves={"images_per_s": tuple(rates)},
    )


def found(trial, **more):
    one = bottleneck(trial, **more)
    assert one is not None
    return one


def test_one_request_at_a_time_is_bounded_by_its_longest_stage():
    one = found(planted())
    assert (one.where, one.waiting) == ("recognise", True)
    assert one.share == pytest.approx(WORK["compute"] / sum(WORK.values()))
    slow_files = found(planted(work={**WORK, "prepare_data": 0.009}))
    assert (slow_files.where, slow_files.waiting) == ("prepare_data", True)
    assert "async" in slow_files.change


def test_with_enough_in_flight_the_slowest_single_thread_bounds():
    assert (found(planted(in_flight=16, work={**WORK, "compute": 0.001})).where) == "app"
    model = found(planted(in_flight=16, work={**WORK, "compute": 0.01}))
    assert (model.where, model.waiting) == ("recogniser", False)
    assert "cores stand idle" in model.change


def test_a_full_node_is_said_before_any_part_of_it_and_names_who_fills_it():
    app = found(planted(in_flight=16, cores=1.0))
    assert (app.where, app.party) == ("node", "app")
    assert "in the application" in app.change
    heavy = found(planted(in_flight=16, cores=1.0, work={**WORK, "compute": 0.04}))
    assert (heavy.where, heavy.party) == ("node", "model")
    whole = sum(WORK.values()) - WORK["compute"] + 0.04
    assert heavy.at_most == pytest.approx(whole / 0.04)


def test_cores_that_are_leased_bound_and_not_those_of_the_machine():
    trial = planted(in_flight=16, cores=1.0)
    wide = replace(trial, machine=Machine(cpu_model="m", cores=8))
    assert found(wide).where != "node"
    assert (found(wide, near_cores=1.0).where, found(wide, near_cores=1.0).share) == ("node", pytest.approx(1.0))


def test_two_nodes_are_judged_each_by_its_own_cores():
    far = planted(in_flight=16, architecture="distributed", link="netns")
    assert found(far, near_cores=2.0, far_cores=1.0).where == "client_node"
    slow_model = planted(in_flight=16, architecture="distributed", link="netns", work={**WORK, "compute": 0.01})
    one = found(slow_model, near_cores=1.0, far_cores=2.0)
    assert (one.where, one.party, one.at_most) == ("server_node", "model", pytest.approx(1.0))


def test_when_others_fill_the_machine_nothing_else_is_claimed():
    trial = planted()
    disturbed = replace(trial, metrics={**trial.metrics, "other_cpu_cores": summarize([3.1])})
    one = found(disturbed)
    assert one.where == "others"
    assert one.change.startswith("Measure again")
    assert one.at_most is None
    assert found(replace(trial, metrics={**trial.metrics, "other_cpu_cores": summarize([0.2])})).where == "recognise"
    far = planted(delay_s=0.02)
    far = replace(far, metrics={**far.metrics, "other_cpu_cores": summarize([3.7])})
    assert found(far).where == "delay"  # which no CPU makes shorter


def test_another_server_whose_parts_nobody_knows_is_judged_as_a_whole():
    trial = planted(in_flight=16, server="triton", work={**WORK, "compute": 0.01})
    metrics = {name: summary for name, summary in trial.metrics.items() if not name.startswith("recogniser")}
    assert found(replace(trial, metrics=metrics)).where == "recognise"
    full = {**metrics, "server_cpu": summarize([3.2]), "app_cpu": summarize([0.6])}
    assert (found(replace(trial, metrics=full)).where, found(replace(trial, metrics=full)).party) == ("node", "other")
    no_cpu = {name: summary for name, summary in metrics.items() if "cpu" not in name}
    assert found(replace(trial, metrics=no_cpu)).where == "recognise"


def test_a_distant_server_is_bounded_by_the_way_there_and_back():
    one = found(planted(delay_s=0.02))
    assert (one.where, one.waiting) == ("delay", True)
    assert {row.metric: row.value for row in one.rows}["link"] == pytest.approx(0.04)
    assert found(planted(delay_s=0.02, in_flight=16)).where == "app"


def test_a_busy_gpu_or_link_bounds_whatever_the_cores_do():
    trial = planted(in_flight=16)
    for metric, where in (("gpu_busy", "gpu"), ("link_busy", "link")):
        full = replace(trial, metrics={**trial.metrics, metric: summarize([0.97])})
        assert found(full).where == where
        idle = replace(trial, metrics={**trial.metrics, metric: summarize([0.4])})
        assert found(idle).where == "app"


def test_a_queue_at_a_server_with_idle_cores_asks_for_instances():
    trial = planted(in_flight=4, work={**WORK, "compute": 0.0045})
    waits = {"queue_s": summarize([0.012]), "compute_s": summarize([0.004]), "app_cpu": summarize([0.5])}
    cpu = {"client_cpu": summarize([0.2]), "server_cpu": summarize([2.1]), "recogniser_cpu": summarize([2.0])}
    metrics = {**trial.metrics, **waits, **cpu}
    one = found(replace(trial, metrics=metrics))
    assert one.where == "queue"
    assert "instances" in one.change


def test_in_one_process_the_recogniser_is_part_of_the_application():
    trial = planted(cores=2.0, architecture="simple", transport="none", link="in-process")
    one = found(trial)
    assert (one.where, one.waiting) == ("recognise", True)
    metrics = {**trial.metrics, "app_cpu": summarize([1.9]), "recogniser_cpu": summarize([1.5])}
    one = found(replace(trial, metrics=metrics))
    assert (one.where, one.party, one.share) == ("node", "model", pytest.approx(0.95))
    assert one.at_most == pytest.approx(1.9 / 1.5)


@given(
    st.fixed_dictionaries({name: st.floats(1e-4, 5e-2) for name in WORK}),
    st.sampled_from([1, 2, 4, 16, 64]),
    st.sampled_from([0.0, 0.02]),
)
def test_relieving_the_bottleneck_helps_and_by_no_more_than_was_said(work, in_flight, delay_s):
    before = planted(work=work, in_flight=in_flight, delay_s=delay_s)
    one = found(before)
    rate = before.metrics["images_per_s"].mean
    if one.waiting:  # what waits is overlapped: more in flight
        after = planted(work=work, in_flight=256, delay_s=delay_s)
    else:
        owned = MINE if one.where in ("app", "client") else ("compute",)
        assert one.where in ("app", "client", "recogniser")
        after = planted(work={**work, **{name: work[name] / 1000 for name in owned}}, in_flight=in_flight, delay_s=delay_s)
    grown = after.metrics["images_per_s"].mean / rate
    assert one.at_most is not None
    assert 1.0 - 1e-9 <= grown <= one.at_most * (1 + 1e-9)
    if not one.waiting:  # relieving the others alone wins next to nothing: it was full at 85 % or more
        others = ("compute",) if one.where != "recogniser" else MINE
        beside = planted(work={**work, **{name: work[name] / 1000 for name in others}}, in_flight=in_flight, delay_s=delay_s)
        assert beside.metrics["images_per_s"].mean / rate <= 1 / 0.85 + 1e-9


def test_every_row_of_the_proof_is_in_the_ledger():
    for trial in (planted(), planted(in_flight=16), planted(delay_s=0.02), planted(cores=1.0, in_flight=16)):
        for row in found(trial).rows:
            assert row.trial == trial.id
            if row.metric == "link":
                assert f"{row.value * 500:g}ms" in trial.configuration["link"]
            else:
                assert row.value == trial.metrics[row.metric].mean


def test_what_was_measured_with_one_thing_changed_is_the_gain():
    sync, many = planted(1, noise=0.01), planted(2, in_flight=16, noise=0.01)
    (one, _) = find_bottlenecks([sync, many])
    assert one.gain is not None
    assert (one.gain.trial, one.gain.change) == ("t-2", "interaction async")
    assert one.gain.ratio.low < one.gain.ratio.value < one.gain.ratio.high
    assert one.gain.ratio.value == pytest.approx(
        many.metrics["images_per_s"].mean / sync.metrics["images_per_s"].mean, rel=0.02
    )


def test_the_gain_is_that_of_the_change_that_is_advised_first():
    sync, many = planted(1, noise=0.01, delay_s=0.02), planted(2, in_flight=4, noise=0.01, delay_s=0.02)
    near = planted(3, noise=0.01, architecture="simple", transport="none", link="in-process")
    (one, *_) = find_bottlenecks([sync, many, near])
    assert one.where == "delay"
    assert near.metrics["images_per_s"].mean > many.metrics["images_per_s"].mean
    assert one.gain is not None
    assert one.gain.change == "interaction async"
    (alone, _) = find_bottlenecks([sync, near])
    assert alone.gain is not None
    assert alone.gain.change == "simple"


def test_no_gain_is_claimed_within_the_machines_own_repeat_error():
    plain, twin = planted(1, noise=0.05), planted(2, noise=0.05, twin=1)
    slightly = planted(3, in_flight=1, noise=0.001, interaction="async", work={**WORK, "compute": 0.0038})
    assert repeat_error([plain, twin, slightly]) is not None
    assert find_bottlenecks([planted(1, noise=0.001), slightly])[0].gain is not None
    (one, _) = find_bottlenecks([plain, twin, slightly])
    assert one.gain is None


def test_a_drift_that_hits_all_alike_leaves_paired_ratios_alone():
    one, two = planted(1, drift=-0.1), planted(2, drift=-0.1, batch=8, in_flight=16)
    (first, _) = find_bottlenecks([one, two, planted(3, drift=-0.1, twin=1)])[:2]
    assert first.gain is None  # two things differ
    three = planted(4, drift=-0.1, in_flight=16)
    gain = find_bottlenecks([one, three])[0].gain
    assert gain is not None
    assert gain.ratio.high - gain.ratio.low < 1e-9


def test_open_load_and_twins_have_no_bottleneck_of_their_own():
    assert find_bottlenecks([planted(1, load="open"), planted(2, twin=1)]) == ()


def test_changed_names_one_thing_or_nothing():
    one = planted(1)
    assert changed(planted(2, batch=8), one) == "batch 8"
    assert changed(planted(2, batch=8, in_flight=16), one) == ""
    assert changed(planted(2, transport="http"), one) == "microservice over http"
    assert changed(planted(2, architecture="simple", transport="none", link="in-process"), one) == "simple"
    assert changed(planted(2), one) == ""


def test_what_overlapping_was_measured_to_win_is_never_more_than_what_is_said_to_be_there():
    found = find_bottlenecks(sweep_trials(), near_cores=2.0)
    gains = [one for one in found if one.gain is not None and one.gain.change == "interaction async"]
    assert len(gains) > 5
    for one in gains:
        assert one.at_most is None or one.gain.ratio.low <= one.at_most * 1.02, one.why


def test_settings_that_differ_in_how_the_model_is_held_differ_in_more_than_their_batch():
    one, *_ = (trial for trial in sweep_trials() if trial.configuration["architecture"] == "microservice")
    held = replace(one, configuration={**one.configuration, "instances": 2})
    assert changed(held, one) == "instances 2"
    assert changed(replace(held, configuration={**held.configuration, "batch": 999}), one) == ""
