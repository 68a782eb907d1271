"""Models that crash, hang, lie and are swapped: what becomes of their own requests, and of everybody else's."""

import asyncio
import os

import numpy as np
import pytest
from tests.contracts.plane_contract import X, ask, make_call, shared_memory  # noqa: F401

from tenure.errors import SpecError, Unavailable
from tenure.serve.dataplane import Limits
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded
from tenure.serve.plane import ModelOptions, TensorRef, Wanted

from .models import write_models
from .test_plane import _importable, on_plane, opened  # noqa: F401

pytestmark = pytest.mark.real
DEADLY, ENDLESS = np.full((1, 4), 666, np.float32), np.full((1, 4), 777, np.float32)


def limits(**options):
    bounds = {name: options.pop(name) for name in ("max_answer_bytes",) if name in options}
    return Limits(memory_budget_bytes=1 << 22, options=ModelOptions(**options), **bounds)


def row(number):
    return np.full((1, 4), number, np.float32)


async def until(condition, limit_s=30):
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def pid_of(plane, model="process"):
    return int((await ask(plane, model, {"x": X}))["pid"][0])


def test_of_a_batch_that_kills_its_instance_only_the_deadly_call_fails(tmp_path):
    async def body(plane):
        asked = [DEADLY if i == 5 else row(i) for i in range(16)]
        found = await asyncio.gather(*(ask(plane, "mortal", {"x": x}) for x in asked), return_exceptions=True)
        assert [i for i, answer in enumerate(found) if isinstance(answer, Exception)] == [5]
        assert isinstance(found[5], Unavailable)
        assert "SIGSEGV" in str(found[5])
        assert all(np.array_equal(found[i]["y"], asked[i] * 2) for i in range(16) if i != 5)
        await until(lambda: plane.model_ready("mortal"))
        assert plane.statistics("mortal")[("mortal", "1")].restarts == 2
        assert plane.held_bytes == 0

    on_plane(write_models(tmp_path, "mortal"), body)


def test_other_models_never_wait_for_one_that_crashes_or_hangs(tmp_path):
    async def body(plane):
        bad = [asyncio.ensure_future(ask(plane, "mortal", {"x": x})) for x in (DEADLY, ENDLESS, DEADLY, ENDLESS)]
        for number in range(200):
            np.testing.assert_array_equal((await ask(plane, "double", {"x": row(number)}))["y"], row(number) * 2)
        found = await asyncio.gather(*bad, return_exceptions=True)
        assert all(isinstance(answer, Unavailable) for answer in found)
        await until(lambda: plane.ready)
        np.testing.assert_array_equal((await ask(plane, "mortal", {"x": X}))["y"], X * 2)

    on_plane(write_models(tmp_path, "mortal", "double"), body, limits(timeout_s=0.5))


def test_a_hanging_instance_is_killed_when_the_models_time_is_over_not_the_callers(tmp_path):
    async def body(plane):
        with pytest.raises(Unavailable, match=r"did not answer within 0\.05 s"):
            await ask(plane, "mortal", {"x": ENDLESS}, timeout_s=0.05)
        assert plane.model_ready("mortal")
        assert plane.held_bytes > 0, "the model may still read the call's memory"
        await until(lambda: not plane.model_ready("mortal"))
        await until(lambda: plane.model_ready("mortal"))
        assert plane.held_bytes == 0
        np.testing.assert_array_equal((await ask(plane, "mortal", {"x": X}))["y"], X * 2)

    on_plane(write_models(tmp_path, "mortal"), body, limits(timeout_s=0.6))


def test_a_model_that_always_dies_is_refused_after_a_while_and_welcome_once_it_lives(tmp_path):
    async def body(plane):
        for _ in range(3):
            with pytest.raises(Unavailable, match="SIGSEGV"):
                await ask(plane, "mortal", {"x": DEADLY})
        with pytest.raises(Unavailable, match="not ready"):
            await ask(plane, "mortal", {"x": X})
        assert not plane.model_ready("mortal")
        assert not plane.ready
        [entry] = plane.index()
        assert (entry.state, "SIGSEGV" in entry.reason) == ("UNAVAILABLE", True)
        await until(lambda: plane.model_ready("mortal"))
        np.testing.assert_array_equal((await ask(plane, "mortal", {"x": X}))["y"], X * 2)

    on_plane(write_models(tmp_path, "mortal"), body)


def test_with_two_instances_one_that_dies_leaves_the_model_ready(tmp_path):
    async def body(plane):
        with pytest.raises(Unavailable, match="SIGSEGV"):
            await ask(plane, "mortal", {"x": DEADLY})
        assert plane.model_ready("mortal")
        np.testing.assert_array_equal((await ask(plane, "mortal", {"x": X}))["y"], X * 2)

    on_plane(write_models(tmp_path, "mortal"), body, limits(instances=2))


def test_instances_work_at_the_same_time(tmp_path):
    async def body(plane):
        hanging = asyncio.ensure_future(ask(plane, "mortal", {"x": ENDLESS}, timeout_s=20))
        await asyncio.sleep(0)
        for number in range(20):
            np.testing.assert_array_equal((await ask(plane, "mortal", {"x": row(number)}))["y"], row(number) * 2)
        assert not hanging.done()
        hanging.cancel()

    on_plane(write_models(tmp_path, "mortal"), body, limits(instances=2))


def test_requests_past_the_queue_are_refused_with_when_to_try_again(tmp_path):
    async def body(plane):
        await ask(plane, "slow", {"x": row(0.05)})
        waiting = [asyncio.ensure_future(ask(plane, "slow", {"x": row(0.05)})) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await ask(plane, "slow", {"x": X})
        assert 0 < caught.value.retry_after_s <= 10
        await asyncio.gather(*waiting)
        outcomes = plane.statistics("slow")[("slow", "1")].outcomes
        assert outcomes == {"ok": 4, "overloaded": 1}
        assert plane.held_bytes == 0

    on_plane(write_models(tmp_path, "slow"), body, limits(max_queue=3))


def test_a_call_that_waits_past_its_time_is_told_and_not_run(tmp_path):
    async def body(plane):
        running = asyncio.ensure_future(ask(plane, "mortal", {"x": ENDLESS}, timeout_s=20))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match=r"did not answer within 0\.02 s"):
            await ask(plane, "mortal", {"x": DEADLY}, timeout_s=0.02)
        assert plane.statistics("mortal")[("mortal", "1")].outcomes == {"timed_out": 1}
        running.cancel()

    on_plane(write_models(tmp_path, "mortal"), body)


def test_a_call_may_wait_less_than_its_answer_may_take(tmp_path):
    async def body(plane):
        running = asyncio.ensure_future(ask(plane, "slow", {"x": row(0.3)}))
        await until(lambda: plane.statistics("slow")[("slow", "1")].queue.count == 1)
        with pytest.raises(Unavailable, match=r"within 0\.05 s"):
            await ask(plane, "slow", {"x": row(0)})
        assert "y" in await running

    on_plane(write_models(tmp_path, "slow"), body, limits(queue_timeout_s=0.05))


def test_a_model_says_in_its_folder_how_it_is_served(tmp_path):
    write_models(tmp_path / "double", "double")
    (tmp_path / "double" / "double.fake").rename(tmp_path / "double" / "model.fake")
    (tmp_path / "double" / "model.toml").write_text("max_batch_rows = 4\ninstances = 2\n")
    write_models(tmp_path, "picky")

    async def body(plane):
        config = plane.config("double")
        assert (config["max_batch_size"], config["instance_group"][0]["count"]) == (4, 2)
        assert [tensor["dims"] for tensor in config["input"]] == [[4]]
        assert plane.metadata("double").inputs[0].shape == (-1, 4)
        assert plane.config("picky")["max_batch_size"] == 16
        (tmp_path / "double" / "model.toml").write_text("max_batch_rows = 1\n")
        await plane.load("double")
        config = plane.config("double")
        assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, [-1, 4])
        (tmp_path / "double" / "model.toml").write_text("max_rows = 1\n")
        with pytest.raises(SpecError, match="max_rows"):
            await plane.load("double")
        np.testing.assert_array_equal((await ask(plane, "double", {"x": X}))["y"], X * 2)

    on_plane(tmp_path, body, limits(max_batch_rows=16))


def test_a_call_cancelled_while_it_runs_is_never_told_and_keeps_its_memory_till_then(tmp_path):
    async def body(plane):
        call, future = make_call(plane, "slow", {"x": row(0.2)})
        plane.submit(call)
        await until(lambda: plane.statistics("slow")[("slow", "1")].queue.count == 1)
        plane.cancel(call)
        assert plane.held_bytes > 0
        await ask(plane, "slow", {"x": row(0)})
        assert not future.done()
        assert plane.held_bytes == 0
        assert plane.statistics("slow")[("slow", "1")].outcomes == {"cancelled": 1, "ok": 1}

    on_plane(write_models(tmp_path, "slow"), body)


def test_an_answer_past_the_limit_fails_alone_and_says_so(tmp_path):
    async def body(plane):
        sizes = [1000, 200_000, 40_000, 40_000, 40_000]
        asked = (ask(plane, "blob", {"x": np.array([size])}) for size in sizes)
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [answer["y"].shape for answer in found if isinstance(answer, dict)] == [(1, s) for s in sizes if s < 100_000]
        assert isinstance(found[1], ModelFailed)
        assert "200000 bytes or more" in str(found[1])
        assert plane.statistics("blob")[("blob", "1")].restarts == 0

    on_plane(write_models(tmp_path, "blob"), body, limits(max_answer_bytes=100_000))


def test_a_model_without_a_row_for_each_row_never_mixes_answers_up(tmp_path):
    async def body(plane):
        asked = [np.arange(1 + i % 4) for i in range(20)]
        found = await asyncio.gather(*(ask(plane, "sizes", {"x": x}) for x in asked))
        assert [int(answer["y"][0]) for answer in found] == [len(x) for x in asked]

    on_plane(write_models(tmp_path, "sizes"), body, limits(warmup=False))


def test_what_a_model_raises_is_told_and_the_instance_lives(tmp_path):
    async def body(plane):
        with pytest.raises(ModelFailed, match="ZeroDivisionError: nobody expects this"):
            await ask(plane, "raising", {"x": X})
        assert plane.model_ready("raising")

    on_plane(write_models(tmp_path, "raising"), body)


@pytest.mark.parametrize(("content", "kind"), [("nonsense", SpecError), ("exits", Unavailable)])
def test_a_model_that_cannot_be_loaded_keeps_the_plane_from_opening(tmp_path, content, kind):
    write_models(tmp_path, "double")
    (tmp_path / "broken.fake").write_text(content)

    async def go():
        with pytest.raises(kind, match="nonsense" if content == "nonsense" else "exit code 7"):
            await opened(tmp_path)

    asyncio.run(go())


def test_a_swap_under_load_fails_no_request_and_frees_the_old_process(tmp_path):
    async def body(plane):
        first = await pid_of(plane)
        seen, stop = [], False

        async def keep_asking():
            while not stop:
                seen.append(await pid_of(plane))

        asking = [asyncio.ensure_future(keep_asking()) for _ in range(8)]
        await plane.load("process")
        await until(lambda: not alive(first))
        second = await pid_of(plane)
        await plane.load("process")
        await until(lambda: not alive(second))
        third = await pid_of(plane)
        stop = True
        await asyncio.gather(*asking)
        assert len({first, second, third}) == 3
        assert set(seen) == {first, second, third}
        assert seen == sorted(seen, key=[first, second, third].index)

    on_plane(write_models(tmp_path, "process"), body)


def test_a_load_that_fails_leaves_what_is_served_alone(tmp_path):
    async def body(plane):
        first = await pid_of(plane)
        (tmp_path / "process.fake").write_text("nonsense")
        with pytest.raises(SpecError, match="nonsense"):
            await plane.load("process")
        assert await pid_of(plane) == first
        assert [(e.name, e.state) for e in plane.index()] == [("process", "READY")]

    on_plane(write_models(tmp_path, "process"), body)


def test_an_unload_answers_what_was_accepted_and_ends_the_process(tmp_path):
    async def body(plane):
        pid = await pid_of(plane)
        accepted = [asyncio.ensure_future(pid_of(plane)) for _ in range(5)]
        await asyncio.sleep(0)
        await plane.unload("process")
        assert not alive(pid)
        assert await asyncio.gather(*accepted) == [pid] * 5
        with pytest.raises(Unavailable, match="unloaded"):
            plane.metadata("process")

    on_plane(write_models(tmp_path, "process"), body)


def test_a_drain_answers_what_was_accepted_and_says_when_the_grace_is_too_short(tmp_path):
    async def body(plane):
        accepted = [asyncio.ensure_future(ask(plane, "slow", {"x": row(0.05)})) for _ in range(3)]
        await asyncio.sleep(0)
        assert await plane.drain(20)
        assert all("y" in answer for answer in await asyncio.gather(*accepted))

    async def late(plane):
        hanging = asyncio.ensure_future(ask(plane, "mortal", {"x": ENDLESS}))
        await asyncio.sleep(0)
        assert not await plane.drain(0.05)
        hanging.cancel()

    on_plane(write_models(tmp_path / "a", "slow"), body)
    on_plane(write_models(tmp_path / "b", "mortal"), late)


def test_shared_memory_cut_short_fails_its_own_requests_only(tmp_path, shared_memory):  # noqa: F811
    async def body(plane):
        key = shared_memory(1 << 16)
        plane.register_region("in", f"/{key}", 0, 1 << 16)
        ref = TensorRef("x", "FP32", (1, 4), (1 << 16) - 16, 16, "in")
        np.testing.assert_array_equal((await ask(plane, "double", {}, inputs=(ref,)))["y"], row(0))
        call, future = make_call(plane, "double", {}, inputs=(ref,))
        plane.submit(call)
        os.truncate(f"/dev/shm/{key}", 0)
        others = [asyncio.ensure_future(ask(plane, "double", {"x": row(i)})) for i in range(8)]
        found = await asyncio.gather(future, *others, return_exceptions=True)
        assert isinstance(found[0], Unavailable | InputRefused | ModelFailed)
        assert all(np.array_equal(found[1 + i]["y"], row(i) * 2) for i in range(8))
        with pytest.raises(InputRefused, match="cut"):
            await ask(plane, "double", {}, inputs=(ref,))

    on_plane(write_models(tmp_path, "double"), body)


def test_shared_memory_can_be_switched_off(tmp_path, shared_memory):  # noqa: F811
    async def body(plane):
        with pytest.raises(InputRefused, match="no shared memory"):
            plane.register_region("r", f"/{shared_memory(4096)}", 0, 4096)
        assert "system_shared_memory" not in plane.extensions

    on_plane(write_models(tmp_path, "double"), body, Limits(shared_memory=False))


def test_an_instance_started_later_knows_the_regions(tmp_path, shared_memory):  # noqa: F811
    async def body(plane):
        key = shared_memory(4096)
        plane.register_region("r", f"/{key}", 0, 4096)
        with pytest.raises(Unavailable):
            await ask(plane, "mortal", {"x": DEADLY})
        ref = TensorRef("x", "FP32", (1, 4), 0, 16, "r")
        found = await ask(plane, "mortal", {}, inputs=(ref,), outputs=(Wanted("y", "r", 64, 16),))
        assert found["y"].region == "r"

    on_plane(write_models(tmp_path, "mortal"), body)


def test_many_regions_reach_an_instance_that_is_busy_and_one_that_starts(tmp_path, shared_memory):  # noqa: F811
    async def body(plane):
        busy = asyncio.ensure_future(ask(plane, "slow", {"x": row(0.2)}))
        await until(lambda: plane.statistics("slow")[("slow", "1")].queue.count == 1)
        key = shared_memory(4096)
        for number in range(300):
            plane.register_region(f"r{number}", f"/{key}", 0, 4096)
            if number % 2:
                plane.unregister_region(f"r{number}")
        await busy
        ref = TensorRef("x", "FP32", (1, 4), 0, 16, "r298")
        assert "y" in await ask(plane, "slow", {}, inputs=(ref,))
        await plane.load("slow")
        assert "y" in await ask(plane, "slow", {}, inputs=(ref,))
        assert plane.statistics("slow")[("slow", "1")].restarts == 0

    on_plane(write_models(tmp_path, "slow"), body)


@pytest.mark.parametrize("lie", [1, 2])
def test_an_instance_that_breaks_the_protocol_is_ended(tmp_path, lie):
    async def body(plane):
        with pytest.raises(Unavailable, match=r"cannot be read|not running"):
            await ask(plane, "rogue", {"x": row(lie)})
        await until(lambda: plane.model_ready("rogue"))
        np.testing.assert_array_equal((await ask(plane, "rogue", {"x": row(0)}))["y"], row(0))

    on_plane(write_models(tmp_path, "rogue"), body)


def test_urgent_calls_go_first(tmp_path):
    async def body(plane):
        order = []

        async def go(priority):
            await ask(plane, "slow", {"x": row(0.001 * priority)}, priority=priority)
            order.append(priority)

        running = asyncio.ensure_future(ask(plane, "slow", {"x": row(0.05)}))
        await until(lambda: plane.statistics("slow")[("slow", "1")].queue.count == 1)
        await asyncio.gather(*(go(priority) for priority in (3, 0, 1, 3, 1)), running)
        assert order == [1, 1, 0, 3, 3]

    on_plane(write_models(tmp_path, "slow"), body, limits(priority_levels=3))


def test_calls_that_cannot_be_stacked_are_answered_each_and_counted_each(tmp_path):
    async def body(plane):
        pairs = [{"a": np.array([i, 1]), "b": np.array([1, i])} for i in range(200)]
        for _ in range(3):
            found = await asyncio.gather(*(ask(plane, "sums", pair) for pair in pairs))
            assert [list(answer["sum"]) for answer in found] == [[i + 1, i + 1] for i in range(200)]
        statistics = plane.statistics("sums")[("sums", "1")]
        assert (statistics.inference_count, statistics.execution_count) == (600, 600)
        assert plane.config("sums")["max_batch_size"] == 0

    on_plane(write_models(tmp_path, "sums"), body)


def test_a_model_whose_rows_cost_the_same_in_company_is_run_call_by_call_and_counts_its_rows(tmp_path):
    async def body(plane):
        assert plane.config("sleepy")["max_batch_size"] > 1
        found = await asyncio.gather(*(ask(plane, "sleepy", {"x": X + i}) for i in range(5)))
        assert all(np.array_equal(answer["y"], (X + i) * 2) for i, answer in enumerate(found))
        statistics = plane.statistics("sleepy")[("sleepy", "1")]
        assert (statistics.inference_count, statistics.execution_count) == (10, 5)
        assert {rows: each[1].count for rows, each in statistics.batches.items()} == {2: 5}

    on_plane(write_models(tmp_path, "sleepy"), body)


def test_rows_of_calls_that_wait_together_run_together(tmp_path):
    async def body(plane):
        await asyncio.gather(*(ask(plane, "double", {"x": row(i)}) for i in range(64)))
        statistics = plane.statistics("double")[("double", "1")]
        assert (statistics.inference_count, statistics.execution_count) == (64, 8)
        assert list(statistics.batches) == [8]
        assert [each.count for each in statistics.batches[8]] == [8, 8, 8]

    on_plane(write_models(tmp_path, "double"), body, limits(max_batch_rows=8))
