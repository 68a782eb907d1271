from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenure.errors import CorruptData, SpecError
from tenure.train import tree
from tenure.train.adder import Adder
from tenure.train.exchange import Exchange
from tenure.train.layout import Layout
from tenure.train.records import Arrays
from tenure.train.store import Store, node_name, sum_name

SHARDS = st.integers(1, 70)


@given(SHARDS, st.integers(1, 70))
def test_parts_are_consecutive_even_and_hold_every_shard_once(shards: int, workers: int) -> None:
    workers = min(workers, shards)
    parts = [tree.part(worker, workers, shards) for worker in range(workers)]
    assert [shard for part in parts for shard in range(*part)] == list(range(shards))
    assert {hi - lo for lo, hi in parts} <= {shards // workers, -(-shards // workers)}
    assert all(tree.owner(shard, workers, shards) == w for w, part in enumerate(parts) for shard in range(*part))


@given(SHARDS, st.data())
def test_the_largest_nodes_of_ranges_that_meet_cover_the_tree(shards: int, data: st.DataObject) -> None:
    cuts = sorted({0, shards, *data.draw(st.lists(st.integers(0, shards), max_size=5))})
    nodes = [node for lo, hi in itertools.pairwise(cuts) for node in tree.largest((lo, hi), shards)]
    found = tree.cover(nodes, shards)
    assert found == nodes
    assert tree.missing((0, shards), nodes) == []
    lost = data.draw(st.sampled_from(nodes))
    assert tree.cover([node for node in nodes if node != lost], shards) is None
    assert tree.runs(tree.missing((0, shards), [node for node in nodes if node != lost])) == [lost]


@pytest.mark.parametrize("shards", [1, 2, 3, 6, 8, 13])
def test_a_larger_node_stands_for_its_parts(shards: int) -> None:
    every = [(shard, shard + 1) for shard in range(shards)]
    assert tree.cover([*every, (0, shards)], shards) == [(0, shards)]


def gradients(shards: int, layout_seed: int = 0) -> list[Arrays]:
    rng = np.random.default_rng(layout_seed)
    return [
        {
            "w": rng.standard_normal((50, 61)).astype(np.float32),
            "b": rng.standard_normal(7).astype(np.float32),
            "t": rng.standard_normal(3),
        }
        for _ in range(shards)
    ]


def added_by(root: Path, workers: int, grads: list[Arrays], *, slices: int = 0) -> str:
    """Have each worker publish its nodes and add its slice; return the sum's hash."""
    shards = len(grads)
    exchanges = [Exchange(Store(root, worker=w), shards, slices or workers) for w in range(workers)]
    for worker, exchange in enumerate(exchanges):
        for node in tree.largest(tree.part(worker, workers, shards), shards):
            adder = Adder(shards)
            for shard in range(*node):
                layout = exchange.settle_layout(grads[shard])
                adder.push_shard(shard, grads[shard], layout, loss=0.1 * shard, n=shard + 1, shard_s=1.0)
            exchange.publish(0, adder.total())
    if not exchanges[0].complete(0):
        nodes = tree.cover(exchanges[0].nodes_there(0), shards)
        assert nodes is not None
        for number in exchanges[0].due(0):
            exchanges[number].add(0, number, nodes)
    sums = [exchange.gather(0, exchange.complete(0)) for exchange in exchanges]
    for total in sums:
        assert total.n == shards * (shards + 1) // 2
        assert len(total.shard_s) == shards
        assert total.finite
    texts = {hashlib.sha256(b"".join(t.arrays[k].tobytes() for k in "wbt") + repr(t.loss).encode()).hexdigest() for t in sums}
    (text,) = texts
    return text


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 17), st.integers(0, 5))
def test_a_sum_has_the_same_bits_for_any_number_of_workers_and_slices(
    tmp_path_factory: pytest.TempPathFactory, shards: int, seed: int
) -> None:
    grads = gradients(shards, seed)
    alone = added_by(tmp_path_factory.mktemp("one"), 1, grads)
    for workers in {2, 3, 5, 8, 16} & set(range(shards + 1)):
        assert added_by(tmp_path_factory.mktemp("many"), workers, grads) == alone
        assert added_by(tmp_path_factory.mktemp("central"), workers, grads, slices=1) == alone


def test_a_torn_node_is_put_into_quarantine_by_who_reads_it(tmp_path: Path) -> None:
    grads = gradients(4)
    exchanges = [Exchange(Store(tmp_path, worker=w), 4, 2) for w in range(2)]
    for worker, exchange in enumerate(exchanges):
        adder = Adder(4)
        for shard in range(2 * worker, 2 * worker + 2):
            adder.push_shard(shard, grads[shard], exchange.settle_layout(grads[shard]), loss=0.0, n=1, shard_s=0.0)
        exchange.publish(0, adder.total())
    victim = tmp_path / node_name(0, (2, 4))
    victim.write_bytes(victim.read_bytes()[:-9])
    with pytest.raises(CorruptData):
        exchanges[0].add(0, 1, [(0, 2), (2, 4)])
    assert exchanges[0].nodes_there(0) == {(0, 2)}
    assert not (tmp_path / sum_name(0, 2, 1)).exists()


def test_a_gradient_with_other_arrays_is_refused_by_name(tmp_path: Path) -> None:
    first, second = (Exchange(Store(tmp_path, worker=w), 4, 2) for w in range(2))
    first.settle_layout({"w": np.zeros(3, np.float32)})
    with pytest.raises(SpecError, match=r"'w' is \('<f8', \(3,\)\) here and was \('<f4', \(3,\)\) at first"):
        second.settle_layout({"w": np.zeros(3)})
    with pytest.raises(SpecError, match="'b'"):
        first.settle_layout({"w": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)})


def test_gradients_that_cannot_be_added_are_refused() -> None:
    with pytest.raises(SpecError, match="'mask' has dtype bool"):
        Layout.of({"mask": np.zeros(3, bool)})


@given(
    st.lists(st.tuples(st.sampled_from(["<f4", "<f8"]), st.integers(0, 9000)), min_size=1, max_size=4),
    st.integers(1, 70),
)
def test_slices_are_whole_blocks_and_hold_every_element_once(arrays: list[tuple[str, int]], slices: int) -> None:
    layout = Layout([(str(number), dtype, (size,)) for number, (dtype, size) in enumerate(arrays)])
    seen = {dtype: np.zeros(size, int) for dtype, size in layout.sizes.items()}
    for number in range(slices):
        for cut in layout.slice(number, slices):
            assert cut.first * np.dtype(cut.dtype).itemsize % layout.block_bytes == 0
            seen[cut.dtype][cut.first : cut.first + cut.count] += 1
    assert all((counts == 1).all() for counts in seen.values())


def test_the_sum_of_many_workers_is_as_exact_as_pairwise_summation(tmp_path: Path) -> None:
    shards = 64
    grads = gradients(shards)
    layout, adder = Layout.of(grads[0]), Adder(shards)
    for shard, arrays in enumerate(grads):
        adder.push_shard(shard, arrays, layout, loss=0.0, n=1, shard_s=0.0)
    total = layout.views(adder.total().flats)["w"]
    exact = np.sum([g["w"].astype(np.float64) for g in grads], axis=0)
    in_order = grads[0]["w"].copy()
    for arrays in grads[1:]:
        in_order += arrays["w"]
    assert np.abs(total - exact).mean() < np.abs(in_order - exact).mean()
