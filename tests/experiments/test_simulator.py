"""The simulator: the broker's deciders under a virtual clock, every second of service accounted for."""

from __future__ import annotations

import pickle

import pytest

from tenure.errors import SpecError
from tenure.experiments.simulator import Policy, Simulation, TraceJob, simulate
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, Envelope, Gpu

GIB = 1 << 30


def a_node(name="n", gpus=8):
    devices = tuple(Gpu(index=i, memory_bytes=GIB) for i in range(gpus))
    return Node(name=name, capacity=Capacity(cpus=64.0, memory_bytes=64 * GIB, gpus=devices), machine=Machine(cpu_model="t"))


def a_job(name, *, at_s=0.0, lasts_s=100.0, gpus=1, members=1, tenant="a", estimate_s=None):
    envelope = Envelope(cpus=0.1, memory_bytes=1 << 20, gpus=gpus)
    return TraceJob(
        id=name,
        tenant=tenant,
        submit_s=at_s,
        envelope=envelope,
        members=members,
        duration_s=lasts_s,
        estimate_s=estimate_s,
    )


def test_first_come_first_served_runs_each_job_for_as_long_as_it_needs():
    jobs = [a_job("a", lasts_s=5000, gpus=8), a_job("b", at_s=10, lasts_s=50, gpus=4)]
    first, second = simulate(jobs, [a_node()], Policy(slot_s=3600)).jobs
    assert (first.first_start_s, first.end_s, first.restarts) == (0.0, 5000.0, 0)
    assert (second.first_start_s, second.end_s, second.completion_s) == (5000.0, 5050.0, 5040.0)


def test_a_gang_starts_together_on_several_nodes():
    (job,) = simulate([a_job("a", gpus=8, members=2)], [a_node("x"), a_node("y")], Policy()).jobs
    assert job.gpus == 16
    assert job.end_s == 100.0


def test_a_job_no_fleet_could_hold_is_dropped_with_the_reason():
    jobs = [a_job("a", gpus=9), a_job("b", at_s=1)]
    dropped, other = simulate(jobs, [a_node()], Policy()).jobs
    assert "whole gpus" in dropped.dropped
    assert dropped.end_s is None
    assert other.end_s == 101.0


def test_a_run_laid_down_and_taken_up_again_ends_the_same():
    jobs = [a_job(f"j{i}", at_s=i * 10.0, lasts_s=300 + i, gpus=1 + i % 8) for i in range(40)]
    simulation = Simulation(jobs, [a_node()], Policy(slot_s=100))
    for _ in range(30):
        simulation.step()
    resumed = pickle.loads(pickle.dumps(simulation))
    while resumed.step():
        pass
    assert resumed.outcome() == simulate(jobs, [a_node()], Policy(slot_s=100))


def test_jobs_of_one_id_and_a_fleet_without_nodes_are_refused():
    with pytest.raises(SpecError, match="same id"):
        simulate([a_job("a"), a_job("a")], [a_node()], Policy())
    with pytest.raises(SpecError, match="at least one node"):
        simulate([], [], Policy())


def test_a_job_that_gives_way_keeps_its_work_and_pays_for_its_restart():
    jobs = [a_job("long", lasts_s=1000, gpus=8), a_job("short", at_s=350, lasts_s=50, gpus=8)]
    long, short = simulate(jobs, [a_node()], Policy(order="las", slot_s=100, restart_s=5)).jobs
    assert (short.first_start_s, short.end_s) == (700.0, 750.0)  # half of 700 + 600 s is more than 600 s
    assert (long.end_s, long.restarts) == (1055.0, 1)


def test_when_work_ends_has_no_say_in_what_was_decided_before():
    def starts(lasts_s):
        jobs = [a_job(f"j{i}", at_s=i * 30.0, lasts_s=200 + 70 * i, gpus=1 + i % 8) for i in range(20)]
        jobs[0] = a_job("j0", lasts_s=lasts_s, gpus=1)
        simulation = Simulation(jobs, [a_node()], Policy(order="fair", slot_s=100))
        while simulation.now_s < 1900:
            simulation.step()
        return [(job.first_start_s, job.restarts) for job in simulation.outcome().jobs]

    assert starts(2000.0) == starts(9000.0)


def test_an_unknown_order_is_refused_with_those_there_are():
    with pytest.raises(SpecError, match="fifo, backfill, las, fair"):
        simulate([a_job("a")], [a_node()], Policy(order="lifo"))
