"""Visits of one repeat added up: as if they had been one cell."""

from dataclasses import replace

import numpy as np
import pytest

from tenure.experiments.sweep import Setting
from tenure.experiments.sweep_crossing import Crossed
from tenure.experiments.sweep_nodes import Asked
from tenure.experiments.sweep_parties import CellUse, PartyUse
from tenure.experiments.sweep_trials import metrics_of
from tenure.experiments.sweep_visits import added
from tenure.serve.load.orders import STAGES, Cell

SETTING = Setting(architecture="distributed", transport="http", interaction="sync", batch=2, data="memory", link="1Gbit")


def visit(requests, wall_s, *, order, cores=0.5, memory=10.0):
    cell = Cell(
        requests=requests,
        images=2 * requests,
        wall_s=wall_s,
        stages=dict.fromkeys(STAGES, wall_s / 7),
        cpu_s=cores * wall_s,
        own_cpu_s=0.1 * wall_s,
    )
    parties = {
        name: PartyUse(cpu_s=cores * wall_s, cores_min=cores / 2, cores_max=cores * 2, memory_bytes=memory)
        for name in ("app", "server")
    }
    return Asked(
        setting=SETTING,
        repeat=0,
        order=order,
        cell=cell,
        latencies_s=np.full(requests, wall_s / requests, np.float32),
        use=CellUse(span_s=wall_s, parties=parties, host_cpu_s=2 * cores * wall_s),
        queue_s=0.001 * requests,
        compute_s=0.002,
        crossed=Crossed(busy=cores, forwarder_cpu_s=0.1 * wall_s, forwarder_memory_bytes=memory),
        at_s=1.0,
    )


def test_one_visit_is_the_cell():
    only = visit(10, 1.0, order=3)
    assert added([only]) is only


def test_rates_and_shares_are_those_of_all_visits_together():
    both = added([visit(10, 1.0, order=2, cores=0.2, memory=5.0), visit(30, 2.0, order=5, cores=0.8, memory=9.0)])
    (metrics,) = [metrics_of([both])]
    assert metrics["images_per_s"].mean == pytest.approx(80 / 3)
    assert metrics["wall_s"].mean == pytest.approx(3 / 40)
    assert sum(metrics[name].mean for name in STAGES) == pytest.approx(3 / 40)
    assert metrics["app_cpu"].mean == metrics["server_cpu"].mean == pytest.approx((0.2 + 1.6) / 3)
    assert (metrics["app_cpu_min"].mean, metrics["app_cpu_max"].mean) == (0.1, 1.6)
    assert metrics["server_memory_bytes"].mean == 9.0
    assert metrics["queue_s"].mean == pytest.approx((0.01 * 10 + 0.03 * 30) / 40)
    assert metrics["link_busy"].mean == pytest.approx((0.2 + 1.6) / 3)
    assert metrics["forwarder_cpu"].mean == pytest.approx(0.1)
    assert metrics["other_cpu_cores"].mean == pytest.approx(0.0)
    assert both.order == 3.5
    assert len(both.latencies_s) == 40


def test_a_visit_over_a_link_that_failed_spoils_the_cell():
    good = visit(10, 1.0, order=1)
    bad = replace(good, crossed=Crossed(invalid=("it was late",)))
    assert added([good, bad]).crossed.invalid == ("it was late",)
