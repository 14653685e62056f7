"""Batches: pure in (seed, step), whole over an epoch, the same on any number of hosts."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdecoder.config import DataConfig
from jaxdecoder.data import batches
from jaxdecoder.data.batches import Batch, Feed
from jaxdecoder.data.tokens import Split
from jaxdecoder.errors import UserError

MODES = list(itertools.product(["packed", "padded"], ["random", "shuffled"]))
END = 999


def config(mode: str = "packed", sampling: str = "shuffled", **fields: Any) -> DataConfig:
    return DataConfig(mode=mode, sampling=sampling, **fields)  # type: ignore[arg-type]


def counting(n: int) -> Split:
    """A split whose every token is its own position, so that windows tell where they are from."""
    return Split(np.arange(n, dtype=np.uint16), np.array([0]), n)


def documents(*lengths: int) -> Split:
    """Documents of these lengths, without their end tokens; token = 10 document + place."""
    parts = [[*(10 * d + i for i in range(length)), END] for d, length in enumerate(lengths)]
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return Split(np.concatenate(parts).astype(np.uint16), starts, sum(lengths))


def take(split: Split, data: DataConfig, step: int, **fields: Any) -> Batch:
    defaults: dict[str, Any] = {"batch_size": 8, "context_length": 4, "seed": 0, "end_token": END}
    given = defaults | fields
    rows = given.pop("rows", slice(None))
    return Batch(*(array[0] for array in Feed(split, data, **given).at(step, rows=rows)))


def assert_same(a: Batch, b: Batch) -> None:
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.fixture(params=MODES, ids="-".join)
def data(request: pytest.FixtureRequest) -> DataConfig:
    return config(*request.param)


@pytest.fixture
def split() -> Split:
    return documents(*(3 + i % 6 for i in range(50)))


class TestEveryMode:
    def test_shapes_and_types(self, split: Split, data: DataConfig) -> None:
        taken = take(split, data, 3)
        assert [array.shape for array in taken] == [(8, 4)] * 3
        assert [array.dtype for array in taken] == [np.int32, np.int32, np.float32]

    def test_it_is_a_function_of_seed_and_step(self, split: Split, data: DataConfig) -> None:
        assert_same(take(split, data, 5), take(split, data, 5))
        assert not np.array_equal(take(split, data, 5).inputs, take(split, data, 6).inputs)
        assert not np.array_equal(take(split, data, 5).inputs, take(split, data, 5, seed=1).inputs)

    def test_any_seed_will_do(self, split: Split, data: DataConfig) -> None:
        take(split, data, 10**9, seed=2**64 - 1)
        take(split, data, 0, seed=10**30)

    @pytest.mark.parametrize("hosts", [1, 2, 4, 8])
    def test_hosts_together_have_the_global_batch(
        self, split: Split, data: DataConfig, hosts: int
    ) -> None:
        share = 8 // hosts
        parts = [
            take(split, data, 7, rows=slice(host * share, (host + 1) * share))
            for host in range(hosts)
        ]
        joined = Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        assert_same(joined, take(split, data, 7))

    @pytest.mark.parametrize("rows", [slice(None), slice(2, 5)])
    def test_a_stack_is_its_steps(self, split: Split, data: DataConfig, rows: slice) -> None:
        stacked = Feed(split, data, 8, 4, 0, END).at(11, 9, rows)
        for number in range(9):
            step = Batch(*(array[number] for array in stacked))
            assert_same(step, take(split, data, 11 + number, rows=rows))

    def test_targets_are_the_next_inputs(self, split: Split, data: DataConfig) -> None:
        taken = take(split, data, 2)
        inside = taken.weights[:, 1:] == 1
        np.testing.assert_array_equal(taken.targets[:, :-1][inside], taken.inputs[:, 1:][inside])


class TestPacked:
    @pytest.mark.parametrize("sampling", ["random", "shuffled"])
    def test_rows_are_slices_of_the_stream(self, sampling: str) -> None:
        rng = np.random.default_rng(0)
        split = Split(rng.integers(0, 60_000, 500).astype(np.uint16), np.array([0]), 500)
        windows = {
            tuple(split.tokens[i : i + 8].tolist()): split.tokens[i + 1 : i + 9].tolist()
            for i in range(492)
        }
        taken = take(split, config(sampling=sampling), 1, batch_size=64, context_length=8)
        for inputs, targets in zip(taken.inputs.tolist(), taken.targets.tolist(), strict=True):
            assert windows[tuple(inputs)] == targets
        assert taken.weights.all()

    @pytest.mark.parametrize("sampling", ["random", "shuffled"])
    def test_every_token_can_be_a_target_and_none_is_past_the_end(self, sampling: str) -> None:
        data = config(sampling=sampling)
        split = counting(21)
        seen = [take(split, data, step, batch_size=16).targets for step in range(200)]
        assert set(np.unique(seen)) == set(range(1, 21))

    def test_random_windows_are_uniform(self) -> None:
        starts = [
            take(counting(20), config(sampling="random"), step, batch_size=64).inputs[:, 0]
            for step in range(250)
        ]
        counts = np.bincount(np.concatenate(starts), minlength=16)
        assert len(counts) == 16
        assert abs(counts - 1000).max() < 5 * np.sqrt(1000)

    @pytest.mark.parametrize(("n", "batch_size"), [(81, 4), (83, 7), (403, 8), (9, 3), (5, 6)])
    def test_an_epoch_visits_every_window_once(self, n: int, batch_size: int) -> None:
        windows = max(1, (n - 4) // 4)
        steps = -(-5 * windows // batch_size)
        taken = [take(counting(n), config(), step, batch_size=batch_size) for step in range(steps)]
        starts = np.concatenate([one.inputs[:, 0] for one in taken])
        orders, phases = [], set()
        for epoch in range(5):
            visited = starts[epoch * windows : (epoch + 1) * windows]
            phases.add(min(visited))
            assert sorted(visited) == [4 * i + min(visited) for i in range(windows)]
            assert min(visited) < n - 4 * windows
            assert max(visited) + 4 < n
            orders.append(tuple(visited // 4))
        if windows > 5:
            assert len(set(orders)) == 5
        if n == 403:
            assert len(phases) > 1

    @pytest.mark.parametrize("sampling", ["random", "shuffled"])
    def test_a_split_shorter_than_a_window_is_refused(self, sampling: str) -> None:
        data = config(sampling=sampling)
        assert take(counting(5), data, 0).targets[:, -1].tolist() == [4] * 8
        with pytest.raises(UserError, match=r"model.context_length = 4: .* has only 4; .*most 3"):
            take(counting(4), data, 0)


class TestPermutation:
    @given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**62))
    def test_it_is_one(self, size: int, seed: int, epoch: int) -> None:
        keys = batches._epoch_keys(seed, np.full(size, epoch))[: batches.ROUNDS]
        image = batches.permute(np.arange(size), size, keys)
        np.testing.assert_array_equal(np.sort(image), np.arange(size))

    def test_each_index_treats_its_own_keys(self) -> None:
        epochs = np.array([3, 1, 3, 2])
        keys = batches._epoch_keys(0, epochs)[: batches.ROUNDS]
        together = batches.permute(np.arange(4), 1000, keys)
        alone = [batches.permute(np.array([i]), 1000, keys[:, i : i + 1])[0] for i in range(4)]
        assert together.tolist() == alone

    @pytest.mark.parametrize("size", [4, 7])
    def test_every_image_is_equally_likely(self, size: int) -> None:
        epochs = np.repeat(np.arange(4000), size)
        keys = batches._epoch_keys(0, epochs)[: batches.ROUNDS]
        image = batches.permute(np.tile(np.arange(size), 4000), size, keys).reshape(4000, size)
        counts = np.stack([np.bincount(column, minlength=size) for column in image.T])
        assert abs(counts - 4000 / size).max() < 5 * np.sqrt(4000 / size)

    def test_neighbours_part(self) -> None:
        """Windows that follow each other in the text do not follow each other in training."""
        size = 10_000
        keys = batches._epoch_keys(0, np.zeros(size, np.int64))[: batches.ROUNDS]
        image = batches.permute(np.arange(size), size, keys)
        close = (abs(np.diff(image)) < 100).mean()
        assert close < 3 * 2 * 100 / size

    def test_it_needs_no_table(self) -> None:
        size = 10**15
        keys = batches._epoch_keys(0, np.zeros(1000, np.int64))[: batches.ROUNDS]
        image = batches.permute(np.arange(size - 1000, size), size, keys)
        assert len(np.unique(image)) == 1000
        assert image.min() >= 0
        assert image.max() < size


class TestPadded:
    def test_a_row_is_a_document_between_end_tokens(self) -> None:
        taken = take(documents(2), config("padded"), 0, batch_size=1, context_length=5)
        assert taken.inputs[0, :3].tolist() == [END, 0, 1]
        assert taken.targets[0, :3].tolist() == [0, 1, END]
        assert taken.weights[0].tolist() == [1, 1, 1, 0, 0]

    def test_padding_is_end_tokens_not_the_next_document(self) -> None:
        taken = take(documents(1, 1), config("padded"), 0, batch_size=2, context_length=6)
        assert set(taken.targets[:, 2:].ravel()) == {END}

    def test_a_long_document_is_cut_to_the_context(self) -> None:
        taken = take(documents(9), config("padded"), 0, batch_size=1)
        assert taken.inputs[0].tolist() == [END, 0, 1, 2]
        assert taken.targets[0].tolist() == [0, 1, 2, 3]
        assert taken.weights.all()

    def test_without_end_tokens_a_row_starts_on_the_document(self) -> None:
        split = Split(np.array([0, 1, 2, 10, 11], np.uint16), np.array([0, 3]), 5)
        data = config("padded", end_of_text=False)
        rows = {
            tuple(taken[0].tolist()): (taken[1].tolist(), taken[2].tolist())
            for taken in zip(*take(split, data, 0, batch_size=2), strict=True)
        }
        assert rows == {
            (0, 1, 2, 0): ([1, 2, 0, 0], [1, 1, 0, 0]),
            (10, 11, 0, 0): ([11, 0, 0, 0], [1, 0, 0, 0]),
        }

    def test_an_epoch_visits_every_document_once(self, split: Split) -> None:
        firsts = [take(split, config("padded"), step).targets[:, 0] for step in range(25)]
        visited = np.concatenate(firsts).reshape(4, 50)
        for epoch in visited:
            assert sorted(epoch) == [10 * i for i in range(50)]
        assert not np.array_equal(visited[0], visited[1])


def evaluate(split: Split, data: DataConfig, count: int | None, **fields: Any) -> list[Batch]:
    feed = Feed(split, data, batch_size=3, context_length=4, seed=0, end_token=END)
    return list(feed.fixed(count, **fields))


class TestEvaluation:
    @pytest.mark.parametrize("n", [2, 4, 5, 6, 13, 25, 26, 27, 100])
    def test_the_whole_split_counts_every_target_once_in_order(self, n: int) -> None:
        found = evaluate(counting(n), config(), None)
        assert {array.shape for one in found for array in one} == {(3, 4)}
        targets = [one.targets[one.weights == 1] for one in found]
        assert np.concatenate(targets).tolist() == list(range(1, n))
        for one in found:
            np.testing.assert_array_equal(
                one.inputs[one.weights == 1] + 1, one.targets[one.weights == 1]
            )

    def test_a_count_spreads_full_windows_evenly(self) -> None:
        found = evaluate(counting(1001), config(), 2)
        starts = np.concatenate([one.inputs[:, 0] for one in found])
        assert len(found) == 2
        assert all(one.weights.all() for one in found)
        assert (starts % 4 == 0).all()
        gaps = np.diff(starts)
        assert gaps.min() >= 4
        assert gaps.max() - gaps.min() <= 4
        assert starts[-1] > 800

    def test_a_count_beyond_the_split_gives_all_of_it(self) -> None:
        for ours, whole in zip(
            evaluate(counting(30), config(), 50),
            evaluate(counting(30), config(), None),
            strict=True,
        ):
            assert_same(ours, whole)

    def test_they_do_not_change_between_calls_or_hosts(self, split: Split) -> None:
        for data in (config(), config("padded", "random")):
            whole = evaluate(split, data, 2)
            again = evaluate(split, data, 2)
            hosts = [evaluate(split, data, 2, rows=slice(i, i + 1)) for i in range(3)]
            for number, one in enumerate(whole):
                assert_same(one, again[number])
                parts = zip(*(host[number] for host in hosts), strict=True)
                assert_same(one, Batch(*(np.concatenate(arrays) for arrays in parts)))

    def test_padded_evaluation_takes_each_document_once(self) -> None:
        found = evaluate(documents(2, 1, 3, 2), config("padded"), None)
        targets = np.concatenate([one.targets[one.weights == 1] for one in found])
        assert targets.tolist() == [0, 1, END, 10, END, 20, 21, 22, END, 30, 31, END]
        assert [one.weights.any(1).tolist() for one in found] == [[True] * 3, [True, False, False]]

    def test_one_token_cannot_be_evaluated(self) -> None:
        with pytest.raises(UserError, match=r"1 token\(s\).*data.validation_fraction"):
            evaluate(counting(1), config(), None)


def test_a_real_memory_map_serves(tmp_path: Any) -> None:
    split = counting(100)
    np.asarray(split.tokens).tofile(tmp_path / "t.bin")
    mapped = dataclasses.replace(split, tokens=np.memmap(tmp_path / "t.bin", np.uint16, "r"))
    assert_same(take(mapped, config(), 3), take(split, config(), 3))
    assert type(take(mapped, config(), 3).inputs) is np.ndarray
