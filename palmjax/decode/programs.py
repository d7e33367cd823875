"""What is compiled: prompts into the cache, then tokens, both in shapes that do not depend on who shares the batch.

A prompt is read in chunks of fixed width at fixed places, so a token is computed in the same product of matrices
whatever the lengths of the prompts beside it, and padding is never more than a chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import ShardingRules
from palmjax.decode.search import Asked, Reader, Search, SearchPart, View
from palmjax.models.api import Cache, LanguageModel
from palmjax.models.embeddings import RESIDUAL

STATIC = ("model", "search", "rules", "room", "new_length", "chunk", "as_prefix")


@functools.partial(jax.jit, static_argnames=STATIC)
def begin(
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    done: jax.Array,
    asked: Asked,
    *,
    model: LanguageModel,
    search: SearchPart,
    rules: ShardingRules,
    room: int,
    new_length: int,
    chunk: int,
    as_prefix: bool,
) -> tuple[Any, View]:
    """The first state behind the prompts. prompts: int32 [R, room], BOS first, padded; lengths: int32 [R], 1 or more.

    room: entries of the cache, a multiple of `chunk`. rules: the active ones, named so that a program is not used under
    others. as_prefix: all of a prompt's tokens see all of it; `chunk` must then hold each prompt.
    """
    method, reader = search.build(), Reader(model, params)
    logits, cache, store = _read(reader, method, prompts, lengths, room, chunk, as_prefix)
    state = method.begin(reader, asked, logits, cache, store, done, new_length)
    return state, _replicated(method.view(state))


@functools.partial(jax.jit, static_argnames=("model", "search", "rules"), donate_argnames=("state",))
def advance(
    params: Any,
    state: Any,
    stopped: jax.Array,
    upto: jax.Array,
    asked: Asked,
    *,
    model: LanguageModel,
    search: SearchPart,
    rules: ShardingRules,
) -> tuple[Any, View]:
    """The state after `upto` steps in all, or fewer if all rows are done. stopped: bool [R], rows to end now."""
    method, reader = search.build(), Reader(model, params)
    state = jax.lax.while_loop(
        lambda state: (state.count < upto) & ~jnp.all(state.done),
        lambda state: method.step(reader, asked, state),
        state._replace(done=state.done | stopped),
    )
    return state, _replicated(method.view(state))


def _read(
    reader: Reader, method: Search, prompts: jax.Array, lengths: jax.Array, room: int, chunk: int, as_prefix: bool
) -> tuple[jax.Array, Cache, Any]:
    """Logits [R, V] behind each prompt, the cache of R rows and what the search keeps."""
    model, params = reader
    rows = prompts.shape[0]
    shape = (rows, 1, model.config.d_model)
    last = jnp.zeros(shape, model.config.dtype, out_sharding=sharding.out_spec(RESIDUAL, shape))

    def read(carry: tuple[jax.Array, Cache, jax.Array, Any]) -> tuple[jax.Array, Cache, jax.Array, Any]:
        start, cache, last, store = carry
        tokens = jax.lax.dynamic_slice_in_dim(prompts, start, chunk, axis=1)
        # Padding is written behind its prompt, where each entry is written again before it is seen.
        positions = sharding.constrain(
            jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32), (rows, chunk)), ("batch", "length")
        )
        hidden, cache = model.read(params, tokens, positions, cache, lengths if as_prefix else None)

        def pick(last: jax.Array, hidden: jax.Array, lengths: jax.Array, start: jax.Array) -> jax.Array:
            index = (lengths - 1 - start)[:, None, None]
            found = jnp.take_along_axis(hidden, jnp.clip(index, 0, chunk - 1), axis=1)
            return jnp.where((index >= 0) & (index < chunk), found, last)

        last = sharding.local(pick, (RESIDUAL, RESIDUAL, ("batch",), ()), RESIDUAL, last, hidden, lengths, start)
        return start + chunk, cache, last, method.keep(store, hidden, positions)

    longest = jnp.max(lengths)
    begin = (jnp.int32(0), model.init_cache(rows, room), last, method.store(reader, rows, room))
    _, cache, last, store = jax.lax.while_loop(lambda carry: carry[0] < longest, read, begin)
    return model.logits(params, last)[:, 0], cache | {"length": lengths}, store


def _replicated(view: View) -> View:
    return View(*(sharding.constrain(x, (None,) * x.ndim) for x in view))
