"""Continuing prompts: prefill, then one token at a time in place in the key/value cache. `palmjax generate`.

Every row is its own request: it stops at its own EOS, and its random numbers depend on (seed, request, position) only,
so what it gets does not depend on which other prompts share its batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from palmjax import sharding
from palmjax.config import ConfigError, Part, ShardingRules, section
from palmjax.loss import token_losses
from palmjax.models.api import Cache, LanguageModel

BOS = 0
SMALLEST_BUCKET = 16

# --- sampling as values --------------------------------------------------------------------------------------------


class SamplingPart(Part):
    """How the next token is chosen. `build()` returns (logits float32 [V], key) -> int32 []."""

    def build(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        raise NotImplementedError


@section
class Greedy(SamplingPart):
    """The most probable token; of equals the one with the lowest id."""

    def build(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda logits, key: jnp.argmax(logits).astype(jnp.int32)


@section
class Temperature(SamplingPart):
    """A token drawn from softmax(logits / temperature), cut to its most probable tokens.

    top_k: the k most probable (Fan et al. 2018). top_p: the fewest whose probabilities, after the temperature and
    top_k, sum to at least top_p (nucleus sampling, Holtzman et al. 2020). None cuts nothing. Tokens as probable as the
    last one kept are kept too.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature = {self.temperature}: must be above 0; Greedy() is the limit at 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: must be above 0 and at most 1")

    def build(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda logits, key: jax.random.categorical(key, self.kept(logits)).astype(jnp.int32)

    def kept(self, logits: jax.Array) -> jax.Array:
        """logits / temperature, float32 [V], with -inf for what is cut away."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[0]:
            last = jax.lax.top_k(logits, self.top_k)[0][-1]
            logits = jnp.where(logits >= last, logits, -jnp.inf)
        if self.top_p is not None:
            falling = jnp.sort(logits, descending=True)
            probabilities = jax.nn.softmax(falling)
            before = jnp.cumsum(probabilities) - probabilities
            last = jnp.min(jnp.where(before < self.top_p, falling, jnp.inf))
            logits = jnp.where(logits >= last, logits, -jnp.inf)
        return logits


# --- decoding ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What followed a prompt. tokens: int32 [n], the stop token included if it came. finished: whether it came.

    log_probs: float32 [n], log p(token | all before it) of the model itself, before temperature and cuts (nats).
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    finished: bool


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: SamplingPart | None = None,
    seed: int = 0,
    requests: Sequence[int] | None = None,
    stop: int | None = 1,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> list[Continuation]:
    """Continues each prompt by at most `max_new_tokens` tokens, all prompts in one batch.

    prompts: token ids without BOS, which is put before each; an empty prompt is BOS alone. sampling: Greedy() by
    default.
    seed, requests: row i draws from the key of (seed, requests[i], position); requests are 0, 1, ... by default.
    stop: the id that ends a row (EOS), or None. mesh, rules: where `params` lie; None for one device. All processes of
    a job call it together with equal arguments.

    Rows, prompt length and new tokens are each rounded up to a power of two, so that few programs are compiled.
    Raises ConfigError for no prompts, ids outside the vocabulary and a `max_new_tokens` below one.
    """
    _check(model, prompts, max_new_tokens)
    sampling, rules = sampling or Greedy(), rules or ShardingRules()
    rows = _padded_rows(len(prompts), mesh, rules)
    tokens = np.zeros((rows, _bucket(max(map(len, prompts)) + 1)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, 1 : len(prompt) + 1] = prompt  # behind BOS, which is 0
    lengths, ids = np.ones(rows, np.int32), np.zeros(rows, np.int32)
    lengths[: len(prompts)] = [len(prompt) + 1 for prompt in prompts]
    ids[: len(prompts)] = np.arange(len(prompts)) if requests is None else requests
    # Rows that only fill the batch up are done before they begin.
    done = np.arange(rows) >= len(prompts)
    with contextlib.nullcontext() if mesh is None else sharding.activate(mesh, rules):
        result = _decode(
            params,
            _place(tokens, mesh, rules),
            *(_place(values, mesh, rules) for values in (lengths, ids, done)),
            np.asarray(jax.random.key_data(jax.random.key(seed))),
            np.int32(-1 if stop is None else stop),
            np.int32(max_new_tokens),
            model=model,
            sampling=sampling,
            rules=rules,
            new_length=_bucket(max_new_tokens),
        )
    out, log_probs, count = jax.device_get(result)
    return [_cut(out[row, :count], log_probs[row, :count], stop) for row in range(len(prompts))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The carry of the loop over tokens; B rows, `count` tokens chosen so far, the last of which is not in the cache
    yet.
    """

    cache: Cache
    tokens: jax.Array  # int32 [B, new_length]
    log_probs: jax.Array  # float32 [B, new_length]
    done: jax.Array  # bool [B]
    count: jax.Array  # int32 []


@functools.partial(jax.jit, static_argnames=("model", "sampling", "rules", "new_length"))
def _decode(
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    requests: jax.Array,
    done: jax.Array,
    key: jax.Array,
    stop: jax.Array,
    limit: jax.Array,
    *,
    model: LanguageModel,
    sampling: SamplingPart,
    rules: ShardingRules,
    new_length: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens and log-probabilities [B, new_length], and how many columns are filled. prompts: int32 [B, T], BOS first.

    rules: the active ones, named so that a program is not used under others.
    """
    rows, length = prompts.shape
    params = _in_compute_dtype(model, params)
    choose = functools.partial(_choose, sampling.build(), key, requests)

    def record(logits: jax.Array, cache: Cache, state: _State) -> _State:
        token = choose(cache["length"], logits)
        log_probs = -token_losses(logits[:, None], token[:, None])[0]
        return _State(
            cache=cache,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1),
            log_probs=jax.lax.dynamic_update_slice_in_dim(state.log_probs, log_probs, state.count, axis=1),
            done=state.done | (token == stop),
            count=state.count + 1,
        )

    def step(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)[:, 0]
        return record(*model.extend(params, last, state.cache), state)

    # The prompt is read against a cache of its own length, and only then given room for what follows.
    logits, cache = model.prefill(params, prompts, lengths, model.init_cache(rows, length))
    empty = functools.partial(
        jnp.zeros, (rows, new_length), out_sharding=sharding.out_spec(("batch", None), (rows, new_length))
    )
    begin = _State(cache, empty(jnp.int32), empty(jnp.float32), done, jnp.int32(0))
    state = record(logits, _grown(cache, length + new_length), begin)
    state = jax.lax.while_loop(lambda state: (state.count < limit) & ~jnp.all(state.done), step, state)
    whole = (sharding.constrain(x, (None, None)) for x in (state.tokens, state.log_probs))
    return *whole, state.count


def _choose(
    pick: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    requests: jax.Array,
    positions: jax.Array,
    logits: jax.Array,
) -> jax.Array:
    """The next token of each row, int32 [B]; each row's key is that of (request, position), on the device that has the
    row.
    """

    def rows(positions: jax.Array, requests: jax.Array, logits: jax.Array, key: jax.Array) -> jax.Array:
        def one(position: jax.Array, request: jax.Array, logits: jax.Array) -> jax.Array:
            return pick(logits, jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), request), position))

        return jax.vmap(one)(positions, requests, logits)

    inputs = (("batch",), ("batch",), ("batch", None), (None,))
    return sharding.local(rows, inputs, ("batch",), positions, requests, logits, key)


def _in_compute_dtype(model: LanguageModel, params: Any) -> Any:
    """Matrices in the dtype in which every product takes them, once and not once a token; norm scales stay as they
    are.
    """

    def cast(leaf: jax.Array, axes: sharding.Axes) -> jax.Array:
        is_matrix = sum(axis != "layers" for axis in axes) > 1
        return leaf.astype(model.config.dtype) if is_matrix else leaf

    return jax.tree.map(cast, params, model.axes)


def _grown(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` tokens a row."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0), (0, 0)))

    return {"key": pad(cache["key"]), "value": pad(cache["value"]), "length": cache["length"]}


def _check(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts:
        raise ConfigError("no prompts to continue")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    vocab_size = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"prompt {row} has token {token}; the model's ids are 0 to {vocab_size - 1}")


def _bucket(size: int) -> int:
    """The next power of two, at least SMALLEST_BUCKET."""
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def _padded_rows(prompts: int, mesh: Mesh | None, rules: ShardingRules) -> int:
    """The next power of two that the mesh axes of a batch divide, or else their next multiple."""
    ways = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in rules.batch)
    return -(-(1 << (prompts - 1).bit_length()) // ways) * ways


def _place(values: np.ndarray, mesh: Mesh | None, rules: ShardingRules) -> Any:
    """`values` [B, ...] over the devices by rows, the same on every process."""
    if mesh is None:
        return values
    axes: sharding.Axes = ("batch", *[None] * (values.ndim - 1))
    placed = sharding.named(mesh, rules, axes, values.shape, "prompts")
    return jax.make_array_from_callback(values.shape, placed, values.__getitem__)


def _cut(tokens: np.ndarray, log_probs: np.ndarray, stop: int | None) -> Continuation:
    """A row up to its first stop token, which it keeps."""
    ends = np.flatnonzero(tokens == stop) if stop is not None else np.zeros(0, int)
    count = int(ends[0]) + 1 if ends.size else len(tokens)
    return Continuation(tokens=tokens[:count], log_probs=log_probs[:count], finished=bool(ends.size))
