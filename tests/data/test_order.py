"""The order of rows: exact sums, permutations and shares, for any seed, size and step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmjax.config import ConfigError
from palmjax.data.order import (
    MAX_ROW,
    WEIGHT_TOTAL,
    BatchRamp,
    FixedBatch,
    LinearBatchRamp,
    Order,
    Ramp,
    epoch_keys,
    integer_weights,
    permute,
    ramp_of,
    split,
)

PALM = ((0, 512), (50_000, 1024), (115_000, 2048))
PALM_MIXTURE = (50, 27, 13, 5, 4, 1)  # social media, web, books, code, Wikipedia, news: PaLM table 2, in percent

stages = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=6).map(
    lambda lengths: tuple((sum(length for length, _ in lengths[:i]), rows) for i, (_, rows) in enumerate(lengths))
)


def test_palm_ramp_reads_its_published_number_of_tokens() -> None:
    ramp = BatchRamp(stages=PALM).build()
    assert ramp.first_row(255_000) * 2048 == 775_946_240_000  # PaLM section 5: 255k steps, 780B tokens
    assert [ramp.rows(step) for step in (0, 49_999, 50_000, 114_999, 115_000)] == [512, 512, 1024, 1024, 2048]
    assert ramp.sizes == (512, 1024, 2048)


@given(stages, st.integers(0, 150))
def test_first_row_is_the_sum_of_the_steps_before(stages: tuple[tuple[int, int], ...], step: int) -> None:
    ramp = Ramp(stages)
    assert ramp.first_row(step) == sum(ramp.rows(before) for before in range(step))


@given(stages, st.lists(st.tuples(st.integers(0, 60), st.integers(0, 500)), max_size=4), st.integers(0, 80))
def test_skips_pass_over_rows_from_their_step_on(
    stages: tuple[tuple[int, int], ...], skips: list[tuple[int, int]], step: int
) -> None:
    ramp = Ramp(stages)
    cursor = 0
    for now in range(step + 1):  # a reader that skips when it comes to the step
        cursor += sum(rows for from_step, rows in skips if from_step == now)
        if now == step:
            assert ramp.first_row(step, tuple(skips)) == cursor
        cursor += ramp.rows(now)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5000))
def test_linear_ramp_is_megatrons(first: int, increment: int, increments: int, over_rows: int) -> None:
    last = first + increment * increments
    ramp = LinearBatchRamp(first=first, last=last, increment=increment, over_rows=over_rows).build()
    consumed = 0
    for step in range(300):
        rows = min(first + increment * (consumed * increments // over_rows), last)
        assert (ramp.rows(step), ramp.first_row(step)) == (rows, consumed)
        consumed += rows


def test_bloom_ramp() -> None:
    ramp = LinearBatchRamp(first=192, last=2048, increment=16, over_rows=9_765_625).build()
    assert ramp.sizes == tuple(range(192, 2049, 16))
    reached = ramp.stages[-1][0]
    assert ramp.first_row(reached - 1) < 9_765_625 <= ramp.first_row(reached)


@pytest.mark.parametrize("stages", [(), ((1, 8),), ((0, 8), (0, 16)), ((0, 8), (9, 4), (5, 2)), ((0, 0),), ((0, -8),)])
def test_impossible_stages_are_refused(stages: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigError, match="batch stages"):
        BatchRamp(stages=stages).build()


def test_batch_size_is_a_number_or_a_part() -> None:
    assert ramp_of(8).stages == FixedBatch(rows=8).build().stages == ((0, 8),)
    assert ramp_of(BatchRamp(stages=PALM)).stages == PALM
    with pytest.raises(ConfigError, match="increment must divide"):
        LinearBatchRamp(first=192, last=2048, increment=100, over_rows=10).build()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 97, 1000, 4096, 12_345])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in epoch_keys(seed=3, source=5, epoch=np.arange(4)):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(st.integers(1, 1 << 41), st.integers(-(2**70), 2**70), st.integers(0, 9))
def test_permutation_of_any_size_stays_in_range_and_keeps_rows_apart(size: int, seed: int, epoch: int) -> None:
    index = np.unique(np.linspace(0, size - 1, 50).astype(np.int64))
    rows = permute(index, size, epoch_keys(seed, 0, np.full(index.shape, epoch)))
    assert rows.min() >= 0 and rows.max() < size
    assert len(np.unique(rows)) == len(index)


def test_permutations_are_uniform() -> None:
    """All 6 orders of 3 rows, and each row first equally often: chi-squared below its 0.1 % quantile."""
    orders = [tuple(permute(np.arange(3), 3, epoch_keys(seed, 0, np.zeros(3, int)))) for seed in range(6000)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6 and ((counts - 1000) ** 2 / 1000).sum() < 20.5
    firsts = [permute(np.zeros(1, int), 100, epoch_keys(0, 0, np.array([epoch])))[0] for epoch in range(10_000)]
    assert ((np.bincount(firsts, minlength=100) - 100) ** 2 / 100).sum() < 148.2


def test_neighbours_do_not_stay_neighbours() -> None:
    rows = permute(np.arange(10_000), 10_000, epoch_keys(0, 0, np.zeros(10_000, int)))
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03
    assert (np.abs(np.diff(rows)) == 1).mean() < 0.002


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
def test_weights_keep_their_sum_and_every_source(rates: list[float]) -> None:
    weights = integer_weights(rates)
    assert sum(weights) == WEIGHT_TOTAL and min(weights) >= 1
    exact = np.array(rates) / sum(rates) * WEIGHT_TOTAL
    assert np.abs(np.array(weights) - exact).max() <= max(1, len(rates))


@pytest.mark.parametrize("rates", [[], [1.0, 0.0], [-1.0], [float("nan")], [float("inf"), 1.0]])
def test_impossible_rates_are_refused(rates: list[float]) -> None:
    with pytest.raises(ConfigError, match="mixture rates"):
        integer_weights(rates)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=8), st.integers(1, 4000))
def test_split_deals_every_source_its_rows_in_order_and_its_share_throughout(rates: list[float], length: int) -> None:
    weights = integer_weights(rates)
    source, nth = split(np.arange(length), weights)
    for index, weight in enumerate(weights):
        mine = source == index
        assert np.array_equal(nth[mine], np.arange(mine.sum()))
        ideal = np.arange(1, length + 1) * weight / WEIGHT_TOTAL
        assert np.abs(np.cumsum(mine) - ideal).max() < 2 + np.log(len(weights))


def test_palm_mixture_is_realised_within_half_a_percent() -> None:
    weights = integer_weights(PALM_MIXTURE)
    source, _ = split(np.arange(1_000_000), weights)
    for length in (300, 10_000, 1_000_000):
        shares = np.bincount(source[:length], minlength=6) / length
        assert np.abs(shares - np.array(PALM_MIXTURE) / 100).max() < 0.005
    shares = np.bincount(source) / len(source)
    assert np.abs(shares / (np.array(PALM_MIXTURE) / 100) - 1).max() < 0.005  # relative, the smallest source too


def test_split_works_up_to_the_last_row_and_not_beyond() -> None:
    weights = integer_weights([1, 2])
    rows = MAX_ROW - np.arange(3000, 0, -1)
    source, nth = split(rows, weights)
    assert abs((source == 0).mean() - 1 / 3) < 0.001
    assert np.array_equal(np.diff(nth[source == 0]), np.ones((source == 0).sum() - 1))
    with pytest.raises(ConfigError, match="out of range"):
        split(np.array([MAX_ROW]), weights)


def order(**changes: object) -> Order:
    values = {
        "ramp": Ramp(((0, 6), (10, 10))),
        "weights": integer_weights([3, 1]),
        "row_counts": (50, 7),
        "source_keys": (11, 22),
        "seed": 1,
        "shuffle": True,
    }
    return Order(**(values | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_row_once_and_a_shuffle_of_its_own(shuffle: bool) -> None:
    source, row = order(shuffle=shuffle).of_global(np.arange(400))
    for index, count in enumerate((50, 7)):
        rows = row[source == index]
        epochs = rows[: len(rows) // count * count].reshape(-1, count)
        assert len(epochs) >= 2
        assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (len(epochs), 1)))
        orders = {tuple(epoch) for epoch in epochs}
        assert (len(orders) == len(epochs)) if shuffle else (orders == {tuple(range(count))})


@given(st.integers(0, 40), st.integers(1, 6), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 90)), max_size=3))
def test_a_step_is_the_same_whoever_reads_which_part_of_it(
    step: int, readers: int, skips: list[tuple[int, int]]
) -> None:
    rows = order()
    whole = np.stack(rows.of_step(step, tuple(skips)))
    size = whole.shape[1]
    cuts = [size * reader // readers for reader in range(readers + 1)]
    parts = [np.stack(rows.of_step(step, tuple(skips), slice(a, b))) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_seed_and_source_change_the_shuffle_and_other_sources_do_not() -> None:
    rows = np.arange(200)
    source, row = order().of_global(rows)
    assert not np.array_equal(row, order(seed=2).of_global(rows)[1])
    changed = order(source_keys=(11, 33)).of_global(rows)[1]
    assert np.array_equal(row[source == 0], changed[source == 0])
    assert not np.array_equal(row[source == 1], changed[source == 1])


def test_the_order_never_changes() -> None:
    """A run that is resumed with a later version must see the rows that it would have seen."""
    source, row = order().of_step(12, ((3, 100),))
    assert source.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert row.tolist() == [1, 14, 32, 10, 6, 28, 8, 27, 4, 45]
