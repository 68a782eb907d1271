"""What every data plane shows a door. A class says by `open_plane` how it is made; each test runs on an event loop.

`ask` does what a door does: reserve, write the tensors, submit, wait for `done`.
"""

import asyncio
import os

import numpy as np
import pytest

from tenure.errors import NotFound, TenureError, Unavailable
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded, TooLarge
from tenure.serve.plane import Call, TensorRef, Wanted
from tenure.serve.tensors import datatype_of, from_raw, to_raw

X = np.arange(8, dtype=np.float32).reshape(2, 4)
LIMIT_S = 30


def make_call(plane, model, arrays, *, outputs=(), door="test", **fields):
    """Return a call that is ready to be submitted, and the future of its outputs by name."""
    parts = {name: bytes(to_raw(array)) for name, array in arrays.items()}
    size = sum((len(part) + 63) // 64 * 64 for part in parts.values())
    buffer = plane.reserve(max(size, 1), door)
    refs, at = [], 0
    for name, array in arrays.items():
        part = parts[name]
        buffer.view[at : at + len(part)] = part
        refs.append(TensorRef(name, datatype_of(array), array.shape, at, len(part)))
        at += (len(part) + 63) // 64 * 64
    future = asyncio.get_running_loop().create_future()

    def done(call):
        assert not future.done(), "done is called exactly once"
        if call.error is not None:
            future.set_exception(call.error)
        else:
            future.set_result({o.name: _array(o) for o in call.answer.outputs})

    fields = {"version": "", "inputs": tuple(refs), **fields}
    return Call(model=model, done=done, buffer=buffer, outputs=outputs, **fields), future


def _array(output):
    if output.data is None:
        return output
    return from_raw(bytes(output.data), output.datatype, output.shape, tensor=output.name)


async def ask(plane, model, arrays, **fields):
    """Return a model's outputs by name, as a door would get them. Raises what the plane raises or answers."""
    call, future = make_call(plane, model, arrays, **fields)
    plane.submit(call)
    return await asyncio.wait_for(future, LIMIT_S)


class PlaneContract:
    """Mixed into a class with a fixture `run`: it runs a coroutine function on an open plane, fresh or as good as fresh.

    The plane has the models double, picky, upper and sums, and 1 MiB for requests.
    """

    def test_rows_come_back_doubled(self, run):
        async def go(plane):
            found = await ask(plane, "double", {"x": X})
            np.testing.assert_array_equal(found["y"], X * 2)

        run(go)

    def test_many_at_once_each_get_their_own_rows_back(self, run):
        async def go(plane):
            asked = [np.full((1 + i % 3, 4), i, np.float32) for i in range(100)]
            found = await asyncio.gather(*(ask(plane, "double", {"x": x}) for x in asked))
            for x, answer in zip(asked, found, strict=True):
                np.testing.assert_array_equal(answer["y"], x * 2)
            assert plane.held_bytes == 0

        run(go)

    def test_done_is_not_called_before_submit_has_returned(self, run):
        async def go(plane):
            call, future = make_call(plane, "double", {"x": X})
            plane.submit(call)
            assert not future.done()
            await asyncio.wait_for(future, LIMIT_S)

        run(go)

    def test_text_is_carried_whatever_its_length(self, run):
        async def go(plane):
            text = np.empty(3, dtype=object)
            text[:] = [b"a", b"", b"long" * 1000]
            found = await ask(plane, "upper", {"t": text})
            assert list(found["u"]) == [b"A", b"", b"LONG" * 1000]

        run(go)

    def test_outputs_come_in_the_order_asked_for_and_no_others(self, run):
        async def go(plane):
            pair = {"a": np.array([5, 6]), "b": np.array([1, 2])}
            assert list(await ask(plane, "sums", pair)) == ["sum", "difference"]
            both = (Wanted("difference"), Wanted("sum"))
            assert list(await ask(plane, "sums", pair, outputs=both)) == ["difference", "sum"]
            one = await ask(plane, "sums", pair, outputs=(Wanted("difference"),))
            assert {name: list(array) for name, array in one.items()} == {"difference": [4, 4]}

        run(go)

    @pytest.mark.parametrize(
        "inputs",
        [
            {"x": X.astype(np.float64)},
            {"x": X[:, :3]},
            {"x": X[0]},
            {"x": X[:0]},
            {"z": X},
            {"x": X, "z": X},
            {},
        ],
        ids=["type", "width", "rank", "no rows", "name", "one too many", "none"],
    )
    def test_inputs_that_do_not_fit_are_refused_and_hold_nothing(self, run, inputs):
        async def go(plane):
            with pytest.raises(InputRefused):
                await ask(plane, "double", inputs)
            assert plane.held_bytes == 0
            np.testing.assert_array_equal((await ask(plane, "double", {"x": X}))["y"], X * 2)

        run(go)

    @pytest.mark.parametrize(
        "ref",
        [
            TensorRef("x", "FP32", (2, 4), 40, 32),
            TensorRef("x", "FP32", (2, 4), -8, 32),
            TensorRef("x", "FP32", (1 << 40, 4), 0, 32),
            TensorRef("x", "FP32", (2, 4), 0, 16),
            TensorRef("x", "FP99", (2, 4), 0, 32),
            TensorRef("x", "FP32", (2, -4), 0, 32),
            TensorRef("x", "FP32", (2, 4), 0, 32, "nowhere"),
        ],
        ids=["past the end", "before the start", "huge claim", "short", "unknown type", "negative", "unknown region"],
    )
    def test_references_that_lie_are_refused_and_hold_nothing(self, run, ref):
        async def go(plane):
            with pytest.raises(InputRefused):
                await ask(plane, "double", {"x": X}, inputs=(ref,))
            assert plane.held_bytes == 0

        run(go)

    def test_an_output_that_the_model_has_not_is_refused(self, run):
        async def go(plane):
            with pytest.raises(InputRefused, match="no output"):
                await ask(plane, "double", {"x": X}, outputs=(Wanted("q"),))

        run(go)

    def test_one_bad_call_fails_alone(self, run):
        async def go(plane):
            asked = [np.full((1, 4), -1 if i == 7 else i, np.float32) for i in range(16)]
            found = await asyncio.gather(*(ask(plane, "picky", {"x": x}) for x in asked), return_exceptions=True)
            assert [i for i, answer in enumerate(found) if isinstance(answer, ModelFailed)] == [7]
            assert all(np.array_equal(found[i]["y"], asked[i] + 1) for i in range(16) if i != 7)

        run(go)

    def test_text_whose_lengths_lie_is_refused_alone(self, run):
        async def go(plane):
            good = np.array([b"ab"], dtype=object)
            calls = [make_call(plane, "upper", {"t": good}) for _ in range(4)]
            calls[2][0].buffer.view[:4] = b"\xff\xff\xff\x7f"
            for call, _ in calls:
                plane.submit(call)
            found = await asyncio.wait_for(asyncio.gather(*(f for _, f in calls), return_exceptions=True), LIMIT_S)
            assert [isinstance(answer, InputRefused) for answer in found] == [False, False, True, False]

        run(go)

    def test_models_and_versions_that_are_not_there_are_named(self, run):
        async def go(plane):
            for model, version in (("gone", ""), ("double", "9")):
                with pytest.raises(NotFound):
                    await ask(plane, model, {"x": X}, version=version)
                for look in (plane.metadata, plane.config, plane.model_ready, plane.statistics):
                    with pytest.raises(NotFound):
                        look(model, version)
            assert plane.held_bytes == 0

        run(go)

    def test_metadata_says_what_the_model_takes_and_gives(self, run):
        async def go(plane):
            found = plane.metadata("sums")
            assert (found.name, found.versions) == ("sums", ("1",))
            assert [(t.name, t.datatype, t.shape) for t in found.inputs] == [("a", "INT64", (2,)), ("b", "INT64", (2,))]
            assert [t.name for t in found.outputs] == ["sum", "difference"]
            assert plane.model_ready("sums")
            assert plane.config("sums")["name"] == "sums"

        run(go)

    def test_memory_for_requests_is_bounded_and_given_back(self, run):
        async def go(plane):
            with pytest.raises(TooLarge):
                plane.reserve(2 << 20, "http")
            held = [plane.reserve(300_000, "http") for _ in range(3)]
            with pytest.raises(Overloaded) as caught:
                plane.reserve(300_000, "grpc")
            assert caught.value.retry_after_s > 0
            assert all(len(buffer.view) == 300_000 and buffer.offset % 64 == 0 for buffer in held)
            for buffer in held:
                plane.release(buffer)
            assert plane.held_bytes == 0
            plane.release(plane.reserve(1 << 19, "grpc"))

        run(go)

    def test_a_cancelled_call_is_never_told_and_its_memory_comes_back(self, run):
        async def go(plane):
            calls = [make_call(plane, "double", {"x": X}) for _ in range(3)]
            for call, _ in calls:
                plane.submit(call)
            plane.cancel(calls[1][0])
            await asyncio.wait_for(asyncio.gather(calls[0][1], calls[2][1]), LIMIT_S)
            np.testing.assert_array_equal((await ask(plane, "double", {"x": X}))["y"], X * 2)
            assert not calls[1][1].done()
            assert plane.held_bytes == 0

        run(go)

    def test_an_unloaded_model_is_unavailable_until_it_is_loaded_again(self, run):
        async def go(plane):
            await plane.unload("double")
            assert not plane.model_ready("double")
            assert {e.name: e.state for e in plane.index()}["double"] == "UNAVAILABLE"
            assert "double" not in {e.name for e in plane.index(ready_only=True)}
            with pytest.raises((Unavailable, NotFound)):
                await ask(plane, "double", {"x": X})
            await plane.load("double")
            assert plane.model_ready("double")
            np.testing.assert_array_equal((await ask(plane, "double", {"x": X}))["y"], X * 2)
            for change in (plane.load, plane.unload):
                with pytest.raises(NotFound):
                    await change("gone")

        run(go)

    def test_requests_are_counted_by_how_they_end(self, run):
        async def go(plane):
            def counts():
                found = plane.statistics("picky")[("picky", "1")]
                outcomes = (found.outcomes.get("ok", 0), found.outcomes.get("failed", 0))
                return np.array([*outcomes, found.success.count, found.fail.count, found.inference_count])

            before = counts()
            await ask(plane, "picky", {"x": X[:1]})
            with pytest.raises(ModelFailed):
                await ask(plane, "picky", {"x": -X - 1})
            assert list(counts() - before) == [1, 1, 1, 1, 1]
            assert set(plane.statistics()) >= {("picky", "1"), ("sums", "1")}

        run(go)

    def test_a_draining_plane_is_not_ready_and_refuses(self, run):
        async def go(plane):
            assert plane.ready
            plane.draining = True
            assert not plane.ready
            with pytest.raises(Unavailable):
                await ask(plane, "double", {"x": X})
            assert plane.held_bytes == 0

        run(go)

    def test_tensors_travel_through_shared_memory(self, run, shared_memory):
        key = shared_memory(4096)

        async def go(plane):
            with open(f"/dev/shm/{key}", "r+b") as file:
                file.seek(64)
                file.write(X.tobytes())
            plane.register_region("in", f"/{key}", 64, 64)
            plane.register_region("out", f"/{key}", 1024, 64)
            assert [(r.name, r.key, r.offset, r.nbytes) for r in plane.regions("out")] == [("out", f"/{key}", 1024, 64)]
            ref = TensorRef("x", "FP32", X.shape, 0, 32, "in")
            found = await ask(plane, "double", {}, inputs=(ref,), outputs=(Wanted("y", "out", 8, 32),))
            assert (found["y"].region, found["y"].offset, found["y"].nbytes, found["y"].data) == ("out", 8, 32, None)
            with open(f"/dev/shm/{key}", "rb") as file:
                file.seek(1024 + 8)
                assert file.read(32) == (X * 2).tobytes()
            with pytest.raises(TenureError):
                await ask(plane, "double", {}, inputs=(ref,), outputs=(Wanted("y", "out", 0, 31),))
            plane.unregister_region("in")
            with pytest.raises(InputRefused):
                await ask(plane, "double", {}, inputs=(ref,))
            plane.unregister_region()
            assert list(plane.regions()) == []

        run(go)

    @pytest.mark.parametrize(
        ("key", "offset", "nbytes"),
        [("/tenure-none", 0, 1), ("KEY", 0, 4097), ("KEY", 4090, 7), ("KEY", -1, 5), ("KEY", 0, 0), ("/../dev/null", 0, 1)],
    )
    def test_regions_that_cannot_be_are_refused(self, run, shared_memory, key, offset, nbytes):
        name = shared_memory(4096)

        async def go(plane):
            with pytest.raises(InputRefused):
                plane.register_region("r", key.replace("KEY", f"/{name}"), offset, nbytes)
            plane.register_region("r", f"/{name}", 0, 4096)
            with pytest.raises(InputRefused):
                plane.register_region("r", f"/{name}", 0, 4096)
            with pytest.raises(NotFound):
                plane.regions("q")
            plane.unregister_region("q")

        run(go)


@pytest.fixture
def shared_memory():
    """Make shared-memory objects by size; they are removed with the test."""
    made = []

    def make(size_bytes):
        name = f"tenure-test-{os.getpid()}-{len(made)}"
        with open(f"/dev/shm/{name}", "wb") as file:
            file.truncate(size_bytes)
        made.append(name)
        return name

    yield make
    for name in made:
        os.unlink(f"/dev/shm/{name}")
