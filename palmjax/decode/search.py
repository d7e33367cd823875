"""What a way to continue prompts is: pure functions over a state that holds the key/value cache.

R requests; each takes `width` rows of the cache, so B = R x width rows, those of a request side by side. V: padded
vocabulary. N: room for new tokens. S: entries of the cache.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import Part
from palmjax.models.api import Cache, LanguageModel
from palmjax.models.attention import CACHE


class Asked(NamedTuple):
    """What the requests of a batch ask for; arrays, so that no value compiles a program.

    ids: uint32 [R], names of the requests. key: uint32 [2], data of the key of all draws. stop: int32 [], the id that
    ends a row, -1 for none; least, most: int32 [], new tokens before it may come, and in all.
    """

    ids: Any
    key: Any
    stop: Any
    least: Any
    most: Any


class View(NamedTuple):
    """What the host sees of a state: the best continuation of each request so far.

    tokens: int32 [R, N]; log_probs: float32 [R, N]; lengths: int32 [R]; done: bool [R]; count: int32 [], steps made.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    done: jax.Array
    count: jax.Array


class Reader(NamedTuple):
    """A model with its parameters, inside a program."""

    model: LanguageModel
    params: Any

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`LanguageModel.extend`."""
        return self.model.extend(self.params, tokens, cache)


class Search(abc.ABC):
    """A way to continue. States are named tuples with `done` bool [R] and `count` int32 []."""

    width: int = 1

    def store(self, reader: Reader, rows: int, room: int) -> Any:
        """What is to be kept of the prompts' hidden states besides the cache: empty arrays, or nothing."""
        return ()

    def keep(self, store: Any, hidden: jax.Array, positions: jax.Array) -> Any:
        """`store` with hidden [R, T, D] of the prompts' tokens at positions [R, T]."""
        return store

    @abc.abstractmethod
    def begin(
        self,
        reader: Reader,
        asked: Asked,
        logits: jax.Array,
        cache: Cache,
        store: Any,
        done: jax.Array,
        new_length: int,
    ) -> Any:
        """The first state. logits: float32 [R, V] behind the prompts, which `cache` and `store` hold in R rows; done:
        bool [R], rows that ask for nothing.
        """

    @abc.abstractmethod
    def step(self, reader: Reader, asked: Asked, state: Any) -> Any:
        """The state one token later."""

    def view(self, state: Any) -> View:
        """What the host sees; of states with `tokens` and `log_probs`, those."""
        lengths = jnp.full_like(state.done, state.count, jnp.int32)
        return View(state.tokens, state.log_probs, lengths, state.done, state.count)


class SearchPart(Part):
    """A way to continue, as a value.

    reads_last: whether the last new token is read too, and needs a position. grows: whether tokens that a view shows
    stay as they are, so that a stop string in them is one.
    """

    reads_last: ClassVar[bool] = False
    grows: ClassVar[bool] = True

    @abc.abstractmethod
    def build(self) -> Search: ...


def empty(rows: int, new_length: int, dtype: Any) -> jax.Array:
    """Room for the new tokens of each row, [R, N]."""
    shape = (rows, new_length)
    return jnp.zeros(shape, dtype, out_sharding=sharding.out_spec(("batch", None), shape))


def put(array: jax.Array, column: jax.Array, count: jax.Array) -> jax.Array:
    """`array` [R, N] with `column` [R] at `count`."""
    return jax.lax.dynamic_update_slice_in_dim(array, column[:, None], count, axis=1)


def may_stop(logits: jax.Array, asked: Asked, count: jax.Array) -> jax.Array:
    """`logits` [..., V] without the stop token as long as fewer than `least` tokens came."""
    is_stop = jnp.arange(logits.shape[-1]) == asked.stop
    return jnp.where(sharding.constrain(is_stop, ("vocab",)) & (count < asked.least), -jnp.inf, logits)


def widened(cache: Cache, width: int) -> Cache:
    """The cache with each row `width` times."""
    return {name: _rows(values, lambda x, axis: jnp.repeat(x, width, axis), width) for name, values in cache.items()}


def _rows(values: jax.Array, change: Callable[[jax.Array, int], jax.Array], width: int) -> jax.Array:
    axis = 1 if values.ndim > 1 else 0
    axes = CACHE if axis else ("batch",)
    shape = (*values.shape[:axis], values.shape[axis] * width, *values.shape[axis + 1 :])
    return sharding.local_many(lambda x: (change(x, axis),), (axes,), ((axes, shape),), values)[0]
