"""The laws of serving: exact where one request is under way, never above what the slowest part or the cores allow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tenure.decide.serve_laws import QUANTITIES, levels, predict, prior
from tenure.errors import SpecError

PLACES = (("simple", "none", "in-process"), ("microservice", "http", "loopback"), ("distributed", "grpc", "netns"))
FACTORS = ("architecture", "transport", "link", "interaction", "batch", "instances", "threads", "max_delay_s")
SETTINGS = [
    dict(zip(FACTORS, (*place, *rest), strict=True))
    for place, *rest in itertools.product(PLACES, ("sync", "async"), (1, 8), (1, 4), (2,), (0.0, 0.002))
]
CORES = 4.0


def at(settings, parameters):
    """Return quantity -> values of all settings."""
    known = levels(settings)
    names = prior(known).names
    theta = prior(known).mean.copy()
    for name, value in parameters.items():
        theta[names.index(name)] = value
    return dict(zip(QUANTITIES, np.exp(predict(known, names, theta, cores=CORES)), strict=True)), names, theta


def test_one_request_at_a_time_takes_the_sum_of_its_stages():
    run_s, image_s, threads_left = 0.6 * 0.004, 0.004, 1 - 0.5 + 0.5 / 2
    found, names, theta = at(SETTINGS, {"run_over_image": np.log(0.6), "image_s": np.log(0.004), "parallel": 0.0})
    value = dict(zip(names, np.exp(theta), strict=True))
    for n, setting in enumerate(SETTINGS):
        if setting["interaction"] != "sync" or setting["max_delay_s"]:
            continue
        b, t = setting["batch"], setting["transport"]
        stages_s = (run_s + image_s * b) * threads_left + image_s * value["join_over_image"]  # two threads meet once a run
        stages_s += value["client_call_s"] * value[f"client_call {t}"]
        stages_s += image_s * value["client_image"] * value[f"client_image {t}"] * b
        if setting["architecture"] != "simple":
            stages_s += value["door_call_s"] * value[f"door_call {t}"]
            stages_s += image_s * value["door_image"] * value[f"door_image {t}"] * b
        if setting["link"] == "netns":
            stages_s += value["round_trip_s netns"] + image_s * value["wire_image netns"] * b
        assert found["rate"][n] == pytest.approx(b / stages_s, rel=0.01), setting


def test_a_single_request_waits_the_whole_delay_for_company_that_never_comes():
    found, *_ = at(SETTINGS, {})
    by = {(s["transport"], s["interaction"], s["batch"], s["instances"], s["max_delay_s"]): n for n, s in enumerate(SETTINGS)}
    slow, quick = found["rate"][by["http", "sync", 1, 1, 0.002]], found["rate"][by["http", "sync", 1, 1, 0.0]]
    assert 1 / slow - 1 / quick == pytest.approx(0.002, rel=0.02)


def test_no_setting_outruns_the_cores_or_its_instances():
    rng, known = np.random.default_rng(0), levels(SETTINGS)
    expected = prior(known)
    for _ in range(40):
        theta = expected.mean + expected.sd * rng.standard_normal(expected.mean.size)
        found = dict(zip(QUANTITIES, np.exp(predict(known, expected.names, theta, cores=CORES)), strict=True))
        cpu_s = found["app_cpu"] + np.where(known.simple, 0.0, found["server_cpu"])
        assert np.all(found["rate"] * cpu_s <= CORES * 1.03)
        assert np.all(np.isfinite(found["rate"]))


def test_requests_in_flight_share_runs_so_that_a_dear_run_costs_less_per_image():
    found, *_ = at(SETTINGS, {"run_over_image": np.log(10.0)})
    by = {(s["transport"], s["interaction"], s["batch"], s["instances"], s["max_delay_s"]): n for n, s in enumerate(SETTINGS)}
    alone, together = found["server_cpu"][by["http", "sync", 1, 1, 0.0]], found["server_cpu"][by["http", "async", 1, 1, 0.0]]
    assert together < 0.5 * alone


def test_settings_with_impossible_numbers_are_refused_by_name():
    with pytest.raises(SpecError, match="batch of a setting"):
        levels([{"architecture": "simple", "batch": 0}])
    with pytest.raises(SpecError, match="at least one setting"):
        levels([])


def test_threads_pay_off_more_the_larger_the_batch_as_they_meet_once_a_run():
    base = {"architecture": "simple", "transport": "none", "link": "in-process", "interaction": "sync", "instances": 1}
    settings = [{**base, "batch": b, "threads": t, "max_delay_s": 0.0} for b in (1, 16) for t in (1, 2)]
    found, *_ = at(settings, {"join_over_image": np.log(0.3)})
    small, large = found["rate"][1] / found["rate"][0], found["rate"][3] / found["rate"][2]
    assert 1 < small < large < 2
    free, *_ = at(settings, {"join_over_image": np.log(1e-6)})
    assert free["rate"][0] == pytest.approx(found["rate"][0])  # one thread meets nobody
