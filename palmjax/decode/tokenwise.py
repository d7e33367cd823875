"""One token after the other, each chosen from the logits alone: greedily, or drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import section
from palmjax.decode.search import Asked, Reader, Search, SearchPart, empty, may_stop, put
from palmjax.loss import token_losses
from palmjax.models.api import Cache
from palmjax.sampling import Choose, Greedy, SamplingPart


@section
class TokenByToken(SearchPart):
    """Each token as `sampling` chooses it, with the key of (seed, request, position)."""

    sampling: SamplingPart = Greedy()

    def build(self) -> Search:
        return Tokenwise(self.sampling.build())


class State(NamedTuple):
    """The carry of the loop over tokens; the last of the `count` tokens chosen is not in the cache yet."""

    cache: Cache
    tokens: jax.Array  # int32 [R, N]
    log_probs: jax.Array  # float32 [R, N]
    done: jax.Array  # bool [R]
    count: jax.Array  # int32 []


class Tokenwise(Search):
    """The search of TokenByToken."""

    def __init__(self, pick: Choose) -> None:
        self._pick = pick

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
        return self._record(asked, logits, State(cache, tokens, log_probs, done, jnp.int32(0)))

    def step(self, reader: Reader, asked: Asked, state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)[:, 0]
        logits, cache = reader.extend(last, state.cache)
        return self._record(asked, logits, state._replace(cache=cache))

    def _record(self, asked: Asked, logits: jax.Array, state: State) -> State:
        allowed = may_stop(logits, asked, state.count)
        token = self._choose(asked, state.cache["length"], allowed)
        log_probs = -token_losses(logits[:, None], token[:, None])[0]
        return state._replace(
            tokens=put(state.tokens, token, state.count),
            log_probs=put(state.log_probs, log_probs[:, 0], state.count),
            done=state.done | (token == asked.stop),
            count=state.count + 1,
        )

    def _choose(self, asked: Asked, positions: jax.Array, logits: jax.Array) -> jax.Array:
        """The next token of each row, int32 [R], chosen where the row lies, with the key of (request, position)."""

        def rows(positions: jax.Array, ids: jax.Array, logits: jax.Array, key: jax.Array) -> jax.Array:
            def one(position: jax.Array, request: jax.Array, logits: jax.Array) -> jax.Array:
                of_request = jax.random.fold_in(jax.random.wrap_key_data(key), request)
                return self._pick(logits, jax.random.fold_in(of_request, position))

            return jax.vmap(one)(positions, ids, logits)

        inputs = (("batch",), ("batch",), ("batch", None), (None,))
        return sharding.local(rows, inputs, ("batch",), positions, asked.ids, logits, asked.key)
