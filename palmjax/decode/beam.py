"""Beam search: the continuation of the highest probability among those that a few unfinished ones at a time lead to.

The rules are those of Hugging Face's `generate(num_beams=K, do_sample=False)` (transformers 5, early_stopping=False),
so that its texts come out: of the 2K best continuations of the K beams, those among the first K that end are finished,
and the best K that do not end go on; a request is done when its best beam, were it to end now, would be worse than the
worst of K finished ones.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import Part, require, section
from palmjax.decode.search import Asked, Reader, Search, SearchPart, View, widened
from palmjax.models.api import Cache
from palmjax.models.attention import CACHE

NOTHING = -1e9
"""The score of what is not there."""

Divisor = Callable[[jax.Array], jax.Array]
"""Length n, int32, in new tokens with the stop token -> what a log-probability is divided by, float32."""


class LengthPart(Part):
    """How continuations of different lengths are compared: by log-probability / `build()(length)`."""

    @abc.abstractmethod
    def build(self) -> Divisor: ...


@section
class PowerOfLength(LengthPart):
    """n^alpha, as Hugging Face's `length_penalty`: 0 favours short texts, 1 compares means, more favours long ones."""

    alpha: float = 1.0

    def build(self) -> Divisor:
        return lambda length: length.astype(jnp.float32) ** self.alpha


@section
class GNMTLength(LengthPart):
    """((5 + n) / 6)^alpha (Wu et al. 2016, equation 14), as T5X's beam search has it; it uses 0.6."""

    alpha: float = 0.6

    def build(self) -> Divisor:
        return lambda length: ((5.0 + length.astype(jnp.float32)) / 6.0) ** self.alpha


@section
class BeamSearch(SearchPart):
    """Beam search over `beams` continuations a request. Its cache is as many times as large."""

    beams: int = 4
    length: LengthPart = PowerOfLength()

    grows = False

    def __post_init__(self) -> None:
        require(self.beams >= 1, self, "beams", "1 or more")

    def build(self) -> Search:
        return _Search(self.beams, self.length.build())


class Beams(NamedTuple):
    """Of R requests (those of a device, inside `_grow`) with K beams each, unfinished and finished, best first."""

    tokens: jax.Array  # int32 [R, K, N]
    log_probs: jax.Array  # float32 [R, K, N], of each token
    scores: jax.Array  # float32 [R, K], the sum over tokens
    ended_tokens: jax.Array  # int32 [R, K, N]
    ended_log_probs: jax.Array  # float32 [R, K, N]
    ended_scores: jax.Array  # float32 [R, K], divided by the length's divisor
    ended_lengths: jax.Array  # int32 [R, K], 0 where none has ended


class State(NamedTuple):
    """The carry of the loop over tokens."""

    cache: Cache
    beams: Beams
    done: jax.Array  # bool [R]
    last: jax.Array  # int32 [R K], tokens that are not in the cache yet
    count: jax.Array  # int32 []


class _Search(Search):
    """The search of BeamSearch."""

    def __init__(self, beams: int, divisor: Divisor) -> None:
        self.width, self._divisor = beams, divisor

    def begin(
        self,
        reader: Reader,
        asked: Asked,
        logits: jax.Array,
        cache: Cache,
        store: Any,
        done: jax.Array,
        new_length: int,
    ) -> State:
        rows, width = logits.shape[0], self.width

        def first(logits: jax.Array) -> tuple[jax.Array, ...]:
            """All beams alike, and only the first one counts."""
            rows = logits.shape[0]
            tokens, log_probs = (jnp.zeros((rows, width, new_length), dtype) for dtype in (jnp.int32, jnp.float32))
            scores = jnp.where(jnp.arange(width) == 0, 0.0, NOTHING) * jnp.ones((rows, 1))
            nothing, lengths = jnp.full((rows, width), NOTHING), jnp.zeros((rows, width), jnp.int32)
            beams = Beams(tokens, log_probs, scores, tokens, log_probs, nothing, lengths)
            return jnp.repeat(logits, width, axis=0), *beams

        outs = [(("batch", None), (rows * width, logits.shape[1])), *_layout(rows, width, new_length)]
        logits, *beams = sharding.local_many(first, (("batch", None),), outs, logits)
        begin = State(widened(cache, width), Beams(*beams), done, done, jnp.int32(0))
        return self._record(asked, logits, begin)

    def step(self, reader: Reader, asked: Asked, state: State) -> State:
        logits, cache = reader.extend(state.last, state.cache)
        return self._record(asked, logits, state._replace(cache=cache))

    def _record(self, asked: Asked, logits: jax.Array, state: State) -> State:
        """Every beam grown by one token, and the cache's rows in the order of the beams that they now belong to."""

        def grow(logits: Any, count: Any, stop: Any, least: Any, most: Any, done: Any, *beams: Any) -> tuple[Any, ...]:
            beams, *others = self._grow(logits, count, stop, least, most, done, Beams(*beams))
            return *beams, *others

        rows, width, new_length = state.beams.tokens.shape
        layout, flat = _layout(rows, width, new_length), (("batch",), (rows * width,))
        inputs = (("batch", None), (), (), (), (), ("batch",), *[axes for axes, _ in layout])
        limits = (jnp.asarray(value) for value in (state.count, asked.stop, asked.least, asked.most))
        arrays, outs = (logits, *limits, state.done, *state.beams), (*layout, (("batch",), (rows,)), flat, flat)
        *beams, done, parents, last = sharding.local_many(grow, inputs, outs, *arrays)
        cache = {name: _reordered(values, parents) for name, values in state.cache.items()}
        return State(cache, Beams(*beams), done, last, state.count + 1)

    def _grow(
        self,
        logits: jax.Array,
        count: jax.Array,
        stop: jax.Array,
        least: jax.Array,
        most: jax.Array,
        done: jax.Array,
        beams: Beams,
    ) -> tuple[Beams, jax.Array, jax.Array, jax.Array]:
        """The beams with one token more, who is done, the row of the cache that each beam grew from, and that token.

        logits: float32 [R K, V]; count: tokens that each unfinished beam has.
        """
        rows, width, _ = beams.tokens.shape
        vocab = logits.shape[1]
        log_probs = jax.nn.log_softmax(logits, axis=-1).reshape(rows, width, vocab)
        early = (jnp.arange(vocab) == stop) & (count < least)
        totals = beams.scores[:, :, None] + jnp.where(early, -jnp.inf, log_probs)
        # Twice as many as there are beams: at most one in each can end, so as many as there are can go on.
        found, index = jax.lax.top_k(totals.reshape(rows, width * vocab), 2 * width)
        parent, token = index // vocab, (index % vocab).astype(jnp.int32)
        chosen = jnp.take_along_axis(log_probs.reshape(rows, width * vocab), index, axis=1)
        tokens, token_log_probs = (
            jax.lax.dynamic_update_slice_in_dim(_take(values, parent), new[:, :, None], count, axis=2)
            for values, new in ((beams.tokens, token), (beams.log_probs, chosen))
        )

        ends = (token == stop) | (count + 1 >= most)
        scores, going = jax.lax.top_k(jnp.where(ends, found + NOTHING, found), width)

        ending = ends & (jnp.arange(2 * width) < width) & ~done[:, None]
        scored = jnp.where(ending, found / self._divisor(count + 1), NOTHING)
        ended = (tokens, token_log_probs, scored, jnp.where(ending, count + 1, 0))
        before = (beams.ended_tokens, beams.ended_log_probs, beams.ended_scores, beams.ended_lengths)
        both = [jnp.concatenate(pair, axis=1) for pair in zip(before, ended, strict=True)]
        best = jax.lax.top_k(both[2], width)[1]
        kept, kept_log_probs, kept_scores, lengths = (_take(values, best) for values in both)

        hopeless = jnp.all(lengths > 0, axis=1) & (scores[:, 0] / self._divisor(count + 1) <= kept_scores[:, -1])
        rows_of_parents = (jnp.arange(rows)[:, None] * width + _take(parent, going)).reshape(-1)
        grown = Beams(
            tokens=_take(tokens, going),
            log_probs=_take(token_log_probs, going),
            scores=scores,
            ended_tokens=kept,
            ended_log_probs=kept_log_probs,
            ended_scores=kept_scores,
            ended_lengths=lengths,
        )
        return grown, done | hopeless, rows_of_parents, _take(token, going).reshape(-1)

    def view(self, state: State) -> View:
        """The best finished continuation, or the best unfinished one as long as none is."""
        beams = state.beams
        some = beams.ended_lengths[:, 0] > 0
        tokens = jnp.where(some[:, None], beams.ended_tokens[:, 0], beams.tokens[:, 0])
        log_probs = jnp.where(some[:, None], beams.ended_log_probs[:, 0], beams.log_probs[:, 0])
        lengths = jnp.where(some, beams.ended_lengths[:, 0], state.count)
        return View(tokens, log_probs, lengths, state.done, state.count)


def _layout(rows: int, width: int, new_length: int) -> list[tuple[sharding.Axes, tuple[int, ...]]]:
    """Logical axes and shape of each field of Beams."""
    of_tokens = (("batch", None, None), (rows, width, new_length))
    of_beams = (("batch", None), (rows, width))
    return [of_tokens, of_tokens, of_beams, of_tokens, of_tokens, of_beams, of_beams]


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    """values [R, C, ...] at index [R, K]: [R, K, ...]."""
    return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)


def _reordered(values: jax.Array, parents: jax.Array) -> jax.Array:
    """An array of the cache whose row i is row parents[i] of the device's own."""
    if values.ndim == 1:
        return sharding.local(lambda x, parents: x[parents], (("batch",), ("batch",)), ("batch",), values, parents)
    return sharding.local(lambda x, parents: x[:, parents], (CACHE, ("batch",)), CACHE, values, parents)
