"""Batch, and how a stream of tokens becomes rows of fixed length. Imports config, numpy and jax only.

A store is one flat stream of tokens: documents, each ended by EOS, one behind the other. A row is a contiguous range
of that stream, padded to the sequence length T. A `PackingPart` says where the rows begin; its `build` gives a
`RowLayout`, which finds any row by its number and turns the tokens read there into a `Batch`.

Conventions are T5X's: pad = 0, BOS = 0, EOS = 1, where a vocabulary does not bring its own; decoder inputs are the
targets shifted right by one.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np

from palmjax.config import ConfigError, PackingPart, section


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows for one step. Every field is [rows, length]; the leaves are numpy arrays or (global) `jax.Array`s.

    tokens: int32, decoder inputs: targets shifted right, BOS where a row or a packed segment starts, 0 on padding.
    targets: int32, 0 on padding.
    weights: float32, the weight of each target in the loss: 0 on padding and on tokens that are only conditioned on.
    segments: int32, 1, 2, ... for the documents packed in a row, 0 on padding. Attention stays inside a segment.
    positions: int32, counted from each segment's start; 0 on padding.
    """

    tokens: Any
    targets: Any
    weights: Any
    segments: Any
    positions: Any
    # Behind the fields: dataclasses keeps their places for the fields of these names in MarkedBatch.
    prefix: ClassVar[Any] = None
    token_types: ClassVar[Any] = None

    def marked(self, *, prefix: Any = None, token_types: Any = None) -> MarkedBatch:
        """The batch with marks on its tokens."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Batch)}
        return MarkedBatch(**fields, prefix=prefix, token_types=token_types)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MarkedBatch(Batch):
    """A batch whose tokens are marked; None where there is no such mark.

    prefix: int32 [rows, length], 1 on inputs that all of their segment's tokens see (prefix language models).
    token_types: int32 [rows, length], kinds of tokens (BERT's first and second sentence), all 0 if None.
    """

    prefix: Any = None  # pyright: ignore[reportIncompatibleVariableOverride]
    token_types: Any = None  # pyright: ignore[reportIncompatibleVariableOverride]


class RowLayout(abc.ABC):
    """Rows of `length` tokens over a stream. Row r of the first `num_rows` may be trained on, in any order.

    num_rows: rows for training. num_eval_rows: rows for evaluation, which covers every token of the stream exactly
    once: at most one more, partly padding.
    """

    length: int
    num_rows: int
    num_eval_rows: int

    @property
    def stream_length(self) -> int:
        """The most tokens of the stream that one row takes."""
        return self.length

    @abc.abstractmethod
    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stream positions (start, stop), int64 [n] each, of rows int64 [n]; 0 < stop - start <= stream_length."""

    @abc.abstractmethod
    def boundaries(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(row, column) pairs, int [k] each, at which a new segment begins inside the rows; None if none ever does."""

    def batch(
        self, targets: np.ndarray, weights: np.ndarray | None, starts: np.ndarray, stops: np.ndarray, bos: int = 0
    ) -> Batch:
        """The Batch of n rows that were read at [starts, stops).

        targets: int32 [n, stream_length], zero behind each row's last token. weights: uint8 [n, stream_length] or None
        for all ones. bos: the id that rows and segments begin with.
        """
        column = np.arange(self.length, dtype=np.int32)
        real = column < (stops - starts)[:, None]
        inner = self.boundaries(starts, stops)
        if inner is None:
            segments = real.astype(np.int32)
            positions = column * segments
        else:
            begins = np.zeros(targets.shape, np.int32)
            begins[inner] = 1
            segments = (1 + np.cumsum(begins, axis=1, dtype=np.int32)) * real
            positions = (column - np.maximum.accumulate(column * begins, axis=1)) * real
        tokens = np.zeros_like(targets)
        tokens[:, 1:] = targets[:, :-1]
        tokens[positions == 0] = bos
        tokens[~real] = 0
        loss_weights = real.astype(np.float32)
        if weights is not None:
            loss_weights *= weights
        return Batch(tokens=tokens, targets=targets, weights=loss_weights, segments=segments, positions=positions)


@section
class ConcatenateAndCut(PackingPart):
    """PaLM's packing: documents one behind the other, cut to exactly T, so that no token is padding (PaLM section 5).

    Documents may be split between rows, and attention is not masked where one ends and the next begins: the EOS between
    them tells. A rest shorter than T at the end of the stream is left out of training and padded in evaluation.
    """

    def build(self, num_tokens: int, document_ends: Callable[[], np.ndarray], length: int) -> RowLayout:
        """A RowLayout over a stream of num_tokens. Raises ConfigError if there is not one whole row in it."""
        if num_tokens < length:
            raise ConfigError(
                f"a row of {length:,} tokens cannot be cut from {num_tokens:,} tokens: "
                f"set task_feature_lengths to {{'targets': {num_tokens}}} or less, or add text"
            )
        return _CutRows(num_tokens, length)


class _CutRows(RowLayout):
    def __init__(self, num_tokens: int, length: int):
        self.length = length
        self.num_rows = num_tokens // length
        self.num_eval_rows = -(-num_tokens // length)
        self._num_tokens = num_tokens

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = rows.astype(np.int64) * self.length
        return starts, np.minimum(starts + self.length, self._num_tokens)

    def boundaries(self, starts: np.ndarray, stops: np.ndarray) -> None:
        return None


@section
class PackDocuments(PackingPart):
    """Whole documents, as many as fit a row (next-fit, as seqio packs), each its own segment; the rest is padding.

    A document longer than T starts a row, is cut every T tokens, and its last piece is packed like a document. A cut
    piece begins like a document, with BOS and position 0.
    """

    def build(self, num_tokens: int, document_ends: Callable[[], np.ndarray], length: int) -> RowLayout:
        """A RowLayout over documents that end (exclusively) at document_ends(), int64 [documents], ascending."""
        return _DocumentRows(document_ends(), length)


class _DocumentRows(RowLayout):
    def __init__(self, ends: np.ndarray, length: int):
        self.length = length
        self._ends = ends
        self._starts = next_fit(ends, length)
        self.num_rows = self.num_eval_rows = len(self._starts) - 1

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._starts[rows], self._starts[rows + 1]

    def boundaries(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = np.searchsorted(self._ends, starts, side="right")
        count = np.searchsorted(self._ends, stops, side="left") - first
        row = np.repeat(np.arange(len(starts)), count)
        nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return row, self._ends[first[row] + nth] - starts[row]


@section
class PackPrefixes(PackDocuments):
    """PackDocuments for prefix language models: a document's inputs, its leading tokens without loss, are seen by the
    whole document (Raffel et al. 2020, section 3.2.1). As in T5X the last input, which predicts the first target, is.
    """

    batch_fields = ("prefix",)

    def build(self, num_tokens: int, document_ends: Callable[[], np.ndarray], length: int) -> RowLayout:
        """As PackDocuments, and batches have a `prefix`."""
        return _PrefixRows(document_ends(), length)


class _PrefixRows(_DocumentRows):
    def batch(
        self, targets: np.ndarray, weights: np.ndarray | None, starts: np.ndarray, stops: np.ndarray, bos: int = 0
    ) -> Batch:
        batch = super().batch(targets, weights, starts, stops, bos)
        # How many targets with loss there are in a row up to each, and how many before its segment began.
        counted = np.cumsum(batch.weights > 0, axis=1, dtype=np.int32)
        earlier = np.pad(counted, ((0, 0), (1, 0)))[:, :-1]
        begins = np.maximum.accumulate(np.where(batch.positions == 0, earlier, 0), axis=1)
        is_input = (counted == begins) & (batch.segments > 0)
        # What is read at a place is the target before it; the first place of a segment reads BOS.
        read = np.pad(is_input, ((0, 0), (1, 0)))[:, :-1]
        prefix = np.where(batch.positions == 0, is_input, read) & (batch.segments > 0)
        return batch.marked(prefix=prefix.astype(np.int32))


@section
class PackPairs(PackingPart):
    """Documents of two aligned halves, packed next-fit: what is read, without loss, and what is predicted, 0 where
    nothing is (`tasks.objectives.MaskedLM`). Nothing is shifted: a place predicts its own target.
    """

    shifted = False

    def build(self, num_tokens: int, document_ends: Callable[[], np.ndarray], length: int) -> RowLayout:
        """As PackDocuments. Raises ConfigError for documents that are no pairs, or longer than a row."""
        return _PairRows(document_ends(), length)


class _PairRows(RowLayout):
    def __init__(self, ends: np.ndarray, length: int):
        self.length = length
        whole = np.diff(ends, prepend=np.int64(0))
        if np.any(whole % 2 == 0):  # two halves and EOS
            raise ConfigError("PackPairs needs documents of two aligned halves, as the objective MaskedLM makes them")
        halves = whole // 2
        if halves.size and halves.max() > length:
            raise ConfigError(
                f"PackPairs: a document of {halves.max():,} tokens is longer than a row of {length:,}: "
                "set the objective's length to the row's"
            )
        self._ends, self._half_ends = ends, np.cumsum(halves)
        starts = next_fit(self._half_ends, length)
        self._first = np.searchsorted(np.concatenate([[0], self._half_ends]), starts)
        self.num_rows = self.num_eval_rows = len(starts) - 1
        self._stream_starts = np.concatenate([np.zeros(1, np.int64), ends])[self._first]

    @property
    def stream_length(self) -> int:
        return int(np.diff(self._stream_starts).max(initial=1))

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._stream_starts[rows], self._stream_starts[rows + 1]

    def boundaries(self, starts: np.ndarray, stops: np.ndarray) -> None:
        return None

    def batch(
        self, targets: np.ndarray, weights: np.ndarray | None, starts: np.ndarray, stops: np.ndarray, bos: int = 0
    ) -> Batch:
        shape = (len(targets), self.length)
        read, wanted, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            inside = slice(*np.searchsorted(self._ends, [start, stop - 1], side="right") + [0, 1])
            begin = place = 0
            for number, end in enumerate(self._ends[inside] - start, start=1):
                half = (end - begin) // 2
                here = slice(place, place + half)
                read[row, here] = targets[row, begin : begin + half]
                wanted[row, here] = targets[row, begin + half : begin + 2 * half]
                segments[row, here], positions[row, here] = number, np.arange(half)
                begin, place = end, place + half
        return Batch(
            tokens=read,
            targets=wanted,
            weights=(wanted != 0).astype(np.float32),
            segments=segments,
            positions=positions,
        )


def abstract_batch(packing: PackingPart, rows: int, length: int, sharding: Any) -> Batch:
    """Shapes of a packing's batches, ShapeDtypeStructs laid out by `sharding`."""
    ids, weights = (jax.ShapeDtypeStruct((rows, length), t, sharding=sharding) for t in (np.int32, np.float32))
    batch = Batch(tokens=ids, targets=ids, weights=weights, segments=ids, positions=ids)
    return batch.marked(**dict.fromkeys(packing.batch_fields, ids)) if packing.batch_fields else batch


def next_fit(ends: np.ndarray, length: int) -> np.ndarray:
    """Where rows start when documents are packed next-fit: int64 [rows + 1], the last being the end of the stream.

    From a row's start s the next row starts at the largest document end <= s + length, or at s + length if the document
    at s is longer than a row. Seconds for 10^7 documents: a row's successor is found for all documents at once,
    and only the walk from row to row is a loop.

    ends: int64 [documents], ascending, the stream position behind each document.
    """
    if len(ends) == 0:
        return np.zeros(1, np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    full_pieces = np.maximum(-(-(ends - begins) // length) - 1, 0)
    # A row that begins with document i (or with its last piece, when it is long) ends before document after[i].
    after = np.searchsorted(ends, begins + (full_pieces + 1) * length, side="right")
    walk, document, successor = [], 0, after.tolist()
    while document < len(successor):
        walk.append(document)
        document = successor[document]
    heads = np.asarray(walk, np.int64)
    rows = full_pieces[heads] + 1
    piece = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    return np.append(np.repeat(begins[heads], rows) + piece * length, ends[-1])
