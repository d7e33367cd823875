"""Packing against its meaning written out in plain Python, and Batches of known rows."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmjax.config import ConfigError
from palmjax.data.batch import Batch, ConcatenateAndCut, PackDocuments, RowLayout, next_fit

documents = st.lists(st.integers(1, 30), max_size=40)  # lengths


def next_fit_one_by_one(lengths: list[int], length: int) -> list[list[tuple[int, int]]]:
    """Rows as lists of pieces (start, stop): a document at a time, as a person would pack."""
    rows: list[list[tuple[int, int]]] = []
    start, room = 0, 0
    for size in lengths:
        if size > room:  # it does not fit: a new row, and if need be several full ones
            while size > length:
                rows.append([(start, start + length)])
                start, size = start + length, size - length
            rows.append([])
            room = length
        rows[-1].append((start, start + size))
        start, room = start + size, room - size
    return rows


def pack_one_by_one(stream: np.ndarray, rows: list[list[tuple[int, int]]], length: int) -> Batch:
    fields = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    weights = np.zeros((len(rows), length), np.float32)
    for row, pieces in enumerate(rows):
        column = 0
        for segment, (start, stop) in enumerate(pieces, start=1):
            previous = 0
            for position, token in enumerate(stream[start:stop]):
                fields["tokens"][row, column], fields["targets"][row, column] = previous, token
                fields["segments"][row, column], fields["positions"][row, column] = segment, position
                weights[row, column] = 1
                previous, column = token, column + 1
    return Batch(weights=weights, **fields)


def batch_of(layout: RowLayout, stream: np.ndarray, rows: np.ndarray, weights: np.ndarray | None = None) -> Batch:
    starts, stops = layout.spans(rows)
    targets = np.zeros((len(rows), layout.length), np.int32)
    read = None if weights is None else np.zeros(targets.shape, np.uint8)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        targets[row, : stop - start] = stream[start:stop]
        if read is not None and weights is not None:
            read[row, : stop - start] = weights[start:stop]
    return layout.batch(targets, read, starts, stops)


def assert_equal(batch: Batch, expected: Batch) -> None:
    for name in ("tokens", "targets", "weights", "segments", "positions"):
        value, wanted = np.asarray(getattr(batch, name)), np.asarray(getattr(expected, name))
        assert value.dtype == wanted.dtype and np.array_equal(value, wanted), name


@given(documents, st.integers(1, 12))
def test_packed_documents_are_what_packing_one_by_one_gives(lengths: list[int], length: int) -> None:
    ends = np.cumsum(lengths, dtype=np.int64)
    stream = np.random.default_rng(0).integers(2, 99, sum(lengths))
    rows = next_fit_one_by_one(lengths, length)
    layout = PackDocuments().build(len(stream), lambda: ends, length)
    assert layout.num_rows == layout.num_eval_rows == len(rows)
    if rows:
        assert_equal(batch_of(layout, stream, np.arange(len(rows))), pack_one_by_one(stream, rows, length))


@given(st.integers(1, 60), st.integers(1, 12))
def test_cut_rows_are_the_stream_cut(num_tokens: int, length: int) -> None:
    stream = np.random.default_rng(0).integers(1, 99, num_tokens)
    if num_tokens < length:
        with pytest.raises(ConfigError, match=f"cannot be cut from {num_tokens} tokens.*'targets': {num_tokens}"):
            ConcatenateAndCut().build(num_tokens, lambda: np.zeros(0, np.int64), length)
        return
    layout = ConcatenateAndCut().build(num_tokens, lambda: pytest.fail("documents are not needed"), length)
    assert (layout.num_rows, layout.num_eval_rows) == (num_tokens // length, -(-num_tokens // length))
    pieces = [[(start, min(start + length, num_tokens))] for start in range(0, num_tokens, length)]
    rows = np.arange(layout.num_eval_rows)
    assert_equal(batch_of(layout, stream, rows), pack_one_by_one(stream, pieces, length))
    training = batch_of(layout, stream, rows[: layout.num_rows])
    assert np.all(training.segments == 1) and np.all(training.weights == 1)  # no padding in training


def test_rows_are_found_in_any_order() -> None:
    lengths = [3, 4, 20, 2, 2, 9, 1]
    stream = np.arange(1, sum(lengths) + 1)
    layout = PackDocuments().build(len(stream), lambda: np.cumsum(lengths), 8)
    forward = batch_of(layout, stream, np.arange(layout.num_rows))
    some = np.array([4, 0, 4, 2])
    assert_equal(batch_of(layout, stream, some), jax.tree.map(lambda field: field[some], forward))


def test_a_row_written_out() -> None:
    """Two documents in a row of 8: 5 6 EOS, 7 EOS; the inputs of each begin with BOS 0; T5X's conventions."""
    stream = np.array([5, 6, 1, 7, 1])
    layout = PackDocuments().build(5, lambda: np.array([3, 5]), 8)
    batch = batch_of(layout, stream, np.array([0]))
    assert np.asarray(batch.tokens).tolist() == [[0, 5, 6, 0, 7, 0, 0, 0]]
    assert np.asarray(batch.targets).tolist() == [[5, 6, 1, 7, 1, 0, 0, 0]]
    assert np.asarray(batch.segments).tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert np.asarray(batch.positions).tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert np.asarray(batch.weights).tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    cut = batch_of(ConcatenateAndCut().build(5, lambda: np.zeros(0), 5), stream, np.array([0]))
    assert np.asarray(cut.tokens).tolist() == [[0, 5, 6, 1, 7]]  # attention goes on over the EOS


@pytest.mark.parametrize("packing", [ConcatenateAndCut(), PackDocuments()])
def test_masked_tokens_have_weight_zero(packing: ConcatenateAndCut | PackDocuments) -> None:
    stream = np.arange(1, 7)
    layout = packing.build(6, lambda: np.array([6]), 6)
    batch = batch_of(layout, stream, np.array([0]), weights=np.array([0, 0, 1, 1, 0, 1]))
    assert np.asarray(batch.weights).tolist() == [[0, 0, 1, 1, 0, 1]]
    assert np.all(batch.segments == 1)


@given(documents, st.integers(1, 12))
def test_no_row_start_is_wasteful(lengths: list[int], length: int) -> None:
    """Next-fit: a row is only closed when the next document would not have fitted."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = next_fit(ends, length)
    assert starts[0] == 0 and starts[-1] == sum(lengths)
    for start, stop in itertools.pairwise(starts):
        assert 0 < stop - start <= length
        following = ends[ends > stop]
        assert not len(following) or following[0] - start > length


def test_ten_million_documents_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 10_000_000)
    ends = np.cumsum(lengths)
    starts = next_fit(ends, 2048)
    sizes = np.diff(starts)
    assert sizes.min() > 0 and sizes.max() <= 2048
    assert np.array_equal(
        ends[np.searchsorted(ends, starts[1:])], starts[1:]
    )  # no document is longer than a row: every row ends with one
