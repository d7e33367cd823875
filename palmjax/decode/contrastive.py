"""Contrastive search (Su et al. 2022, equation 5): a probable token whose hidden state is unlike those before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import ConfigError, require, section
from palmjax.decode.search import Asked, Reader, Search, SearchPart, empty, may_stop, put, widened
from palmjax.models.api import Cache
from palmjax.models.attention import CACHE
from palmjax.models.embeddings import RESIDUAL

CONTEXT: sharding.Axes = ("batch", None, None)
"""Of hidden states: whole where the row lies."""


@section
class ContrastiveSearch(SearchPart):
    """Of the `top_k` most probable tokens v the one with the largest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j).

    h: final hidden states (behind the last norm); j runs over all tokens before, the prompt's and BOS included. alpha 0
    is greedy. Each candidate is read, so a token costs `top_k` rows of the cache.
    """

    alpha: float = 0.6
    top_k: int = 4

    reads_last = True

    def __post_init__(self) -> None:
        require(0.0 <= self.alpha <= 1.0, self, "alpha", "from 0 to 1")
        require(self.top_k >= 1, self, "top_k", "1 or more")

    def build(self) -> Search:
        return _Search(self.alpha, self.top_k)


class State(NamedTuple):
    """The carry of the loop. All `count` tokens are in the cache, in each of a request's rows."""

    cache: Cache
    context: jax.Array  # float32 [R, S, D], hidden states of length one
    logits: jax.Array  # float32 [R, V]
    tokens: jax.Array  # int32 [R, N]
    log_probs: jax.Array  # float32 [R, N]
    done: jax.Array  # bool [R]
    count: jax.Array  # int32 []


class _Search(Search):
    """The search of ContrastiveSearch."""

    def __init__(self, alpha: float, top_k: int) -> None:
        self._alpha, self.width = alpha, top_k

    def store(self, reader: Reader, rows: int, room: int) -> jax.Array:
        config = reader.model.config
        if self.width > config.vocab_size:
            raise ConfigError(f"ContrastiveSearch.top_k = {self.width}: the model has {config.vocab_size} tokens")
        shape = (rows, room, config.d_model)
        return jnp.zeros(shape, jnp.float32, out_sharding=sharding.out_spec(CONTEXT, shape))

    def keep(self, store: jax.Array, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        def write(store: jax.Array, hidden: jax.Array, positions: jax.Array) -> jax.Array:
            return store.at[jnp.arange(len(store))[:, None], positions].set(_unit(hidden), mode="drop")

        return sharding.local(write, (CONTEXT, CONTEXT, ("batch", None)), CONTEXT, store, hidden, positions)

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
        rows = logits.shape[0]
        tokens, log_probs = empty(rows, new_length, jnp.int32), empty(rows, new_length, jnp.float32)
        return State(widened(cache, self.width), store, logits, tokens, log_probs, done, jnp.int32(0))

    def step(self, reader: Reader, asked: Asked, state: State) -> State:
        model, params = reader
        rows, width = state.done.shape[0], self.width
        many, one = (("batch", None), (rows, width)), (("batch",), (rows,))
        allowed = may_stop(state.logits, asked, state.count)
        inputs = (("batch", None),)
        p, candidates = sharding.local_many(self._candidates, inputs, (many, many), allowed)
        log_probs = jax.nn.log_softmax(state.logits, axis=-1)

        # Every candidate is read in a row of its own, at the same place.
        positions = state.cache["length"]
        flat = sharding.local_many(lambda x: (x.reshape(-1),), inputs, ((("batch",), (rows * width,)),), candidates)[0]
        hidden, cache = model.read(params, flat[:, None], positions[:, None], state.cache)
        inputs = (CONTEXT, CONTEXT, ("batch",), ("batch", None), ("batch", None), ("batch", None))
        width_of_model = hidden.shape[-1]
        outs = ((CONTEXT, state.context.shape), (CONTEXT, (rows, 1, width_of_model)), one, one, one)
        context, last, chosen, token, log_prob = sharding.local_many(
            self._choose, inputs, outs, state.context, hidden, positions, p, candidates, log_probs
        )
        written = {name: _agreed(cache[name], positions, chosen, width) for name in ("key", "value")}
        return State(
            cache={**written, "length": positions + 1},
            context=context,
            logits=model.logits(params, sharding.constrain(last, RESIDUAL))[:, 0],
            tokens=put(state.tokens, token, state.count),
            log_probs=put(state.log_probs, log_prob, state.count),
            done=state.done | (token == asked.stop),
            count=state.count + 1,
        )

    def _candidates(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Probabilities, float32 [R, k], and ids, int32 [R, k], of the most probable tokens."""
        p, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.width)
        return p, ids.astype(jnp.int32)

    def _choose(
        self,
        context: jax.Array,
        hidden: jax.Array,
        positions: jax.Array,
        p: jax.Array,
        candidates: jax.Array,
        log_probs: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """The context with the token chosen, its hidden state [R, 1, D], which candidate it is, and its log p.

        context: float32 [R, S, D]; hidden: [R k, 1, D], of the candidates; positions: int32 [R k].
        """
        rows, k = p.shape
        at = positions.reshape(rows, k)[:, 0]
        hidden = hidden.reshape(rows, k, -1)
        unit = _unit(hidden)
        cosine = jnp.einsum("RSD,RKD->RKS", context, unit, precision=jax.lax.Precision.HIGHEST)
        before = jnp.arange(context.shape[1])[None, None, :] < at[:, None, None]
        penalty = jnp.max(jnp.where(before, cosine, -1.0), axis=-1)
        chosen = jnp.argmax((1.0 - self._alpha) * p - self._alpha * penalty, axis=-1).astype(jnp.int32)
        row = jnp.arange(rows)
        token = candidates[row, chosen]
        context = context.at[row, at].set(unit[row, chosen], mode="drop")
        return context, hidden[row, chosen][:, None], chosen, token, log_probs[row, token]


def _unit(hidden: jax.Array) -> jax.Array:
    """float32, each of length one."""
    hidden = hidden.astype(jnp.float32)
    return hidden / jnp.maximum(jnp.linalg.norm(hidden, axis=-1, keepdims=True), 1e-30)


def _agreed(values: jax.Array, positions: jax.Array, chosen: jax.Array, width: int) -> jax.Array:
    """The cache's `values` [layers, R k, S, K, N], where all of a request's rows have the chosen one's newest entry.

    positions: int32 [R k], of that entry; chosen: int32 [R].
    """

    def copy(values: jax.Array, positions: jax.Array, chosen: jax.Array) -> jax.Array:
        row = jnp.arange(len(positions))
        source = row // width * width + chosen[row // width]
        return values.at[:, row, positions].set(values[:, source, positions], mode="drop")

    return sharding.local(copy, (CACHE, ("batch",), ("batch",)), CACHE, values, positions, chosen)
