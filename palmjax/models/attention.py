"""Attention with any number of key/value heads: over whole rows, and against a key/value cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.attention import KEPT, Mask, attention, check_name
from pallas_kernels.decode_attention import decode_attention
from palmjax import sharding
from palmjax.config import ConfigError, Part, require, section
from palmjax.models.parameters import Context, Dense, is_declaring
from palmjax.models.positions import PositionsPart, RoPE
from palmjax.sharding import Axes

QUERIES: Axes = ("batch", "length", "heads", "head_dim")
KEYS: Axes = ("batch", "length", "kv_heads", "head_dim")
CACHE: Axes = ("layers", "batch", "length", "kv_heads", "head_dim")
PAGED_CACHE: Axes = ("layers", "batch", "kv_heads", None, "head_dim")
TOKENS: Axes = ("batch", "length")
PAGES: Axes = ("batch", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a layer needs to know of its rows besides their hidden states.

    positions: int32 [B, T]. segments: int32 [B, T], 0 on padding, or None for one segment a row. prefix: int32 [B, T],
    1 on tokens that all of their segment's tokens see (the inputs of a prefix language model), or None; against a cache
    int32 [B], how many of a row's first tokens those are. shared: the positions' parameter that all layers share.
    pages: int32 [B, n], of a paged cache: where each row's entries lie (`decode_attention`), numbered on each device
    from its own first page. T is then whole pages, and rows begin where a page does.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    prefix: jax.Array | None = None
    shared: jax.Array | None = None
    pages: jax.Array | None = None


class AttentionPart(Part):
    """An attention layer: `build(name, context)` returns a module (x, rows, cache, layer) -> ([B, T, D], cache)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    causal: bool
    positions: PositionsPart


@section
class Attention(AttentionPart):
    """Attention over the keys that a mask lets through.

    num_kv_heads: 1 is multi-query (PaLM section 2), num_heads is multi-head, a divisor between is grouped-query.
    window: how many keys back a query sees, itself included; None for all (a causal band, as in Mistral and in GPT-3's
    locally banded layers). causal: whether a query sees only what precedes it (BERT: False).
    qkv_bias, out_bias: biases of the projections. scale: of the scores, None for 1/sqrt(head_dim) (T5: 1).
    soft_cap: c tanh(scores / c), None for none (Gemma 2). impl: of `pallas_kernels.attention`.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int = 1
    positions: PositionsPart = RoPE()
    window: int | None = None
    causal: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            require(getattr(self, field) >= 1, self, field, "1 or more")
        require(self.window is None or self.window >= 1, self, "window", "1 or more, or None for all keys")
        for field in ("scale", "soft_cap"):
            value = getattr(self, field)
            require(value is None or value > 0.0, self, field, "above 0, or None")
        try:
            check_name(self.impl)
        except ValueError as error:
            raise ConfigError(f"Attention.impl = {self.impl!r}: {error}") from error
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"Attention.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        self.positions.check(self.head_dim)

    def build(self, name: str, context: Context) -> nn.Module:
        return AttentionModule(self, context, name=name)


class AttentionModule(nn.Module):
    """The attention layer."""

    config: Attention
    context: Context

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rows: Rows, cache: dict[str, jax.Array] | None, layer: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """With a cache of {"key", "value"} [layers, B, S, K, N], or [layers, P, K, C, N] in pages, the new keys are
        written at `rows.positions` of this `layer`, and queries see the cache; without one they see the row itself.
        """
        c, D = self.config, x_BTD.shape[-1]
        H, K, N = c.num_heads, c.num_kv_heads, c.head_dim
        stddev = self.context.kernel_stddev(D)

        def project(name: str, count: int, heads: str, out: Axes) -> jax.Array:
            shape, axes = (D, count, N), ("embed", heads, "head_dim")
            return Dense("BTD,DHN->BTHN", shape, axes, stddev, out, c.qkv_bias, name=name)(x_BTD)

        # The queries last: backward, their part of the input's gradient then follows the feed-forward layer's, and a
        # parallel block sums both before it reduces them over the mesh, once.
        k, v = (project(name, K, "kv_heads", KEYS) for name in ("key", "value"))
        q = project("query", H, "heads", QUERIES)
        q, k = c.positions.rotate(q, rows.positions), c.positions.rotate(k, rows.positions)
        if cache is None:
            out = self._over_rows(q, k, v, rows)
        else:
            cache = {
                "key": _write(cache["key"], k, rows, layer),
                "value": _write(cache["value"], v, rows, layer),
            }
            out = self._over_cache(q, cache, rows, layer)
        residual: Axes = ("batch", "length", "residual")
        stddev = self.context.residual_stddev(H * N)
        y = Dense(
            "BTHN,HND->BTD",
            (H, N, D),
            ("heads", "head_dim", "embed"),
            stddev,
            residual,
            c.out_bias,
            partial=True,
            name="out",
        )(out)
        return y, cache

    @property
    def _mask(self) -> Mask:
        return Mask(causal=self.config.causal, window=self.config.window)

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5 if self.config.scale is None else self.config.scale

    def _over_rows(self, q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows) -> jax.Array:
        c, mask, scale, length = self.config, self._mask, self._scale, q.shape[1]
        operands = c.positions.operands(q, length, rows.shared, self.context)
        chip = sharding.device_kind()
        if is_declaring():
            return q  # of the result's shape

        def op(
            q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, prefix: jax.Array | None, *given: Any
        ) -> jax.Array:
            index = jnp.arange(length)
            scores = c.positions.scores(q, index[None], index, scale, *given)
            return attention(
                scores.q,
                k,
                v,
                mask=mask,
                segments=segments,
                prefix=prefix,
                alibi_slopes=scores.alibi_slopes,
                soft_cap=c.soft_cap,
                bias=scores.bias,
                scale=scale,
                impl=c.impl,
                chip=chip,
            )

        if self.context.recompute_attention:
            # Scores and biases are made again; what a kernel keeps of them, a number a query, is kept.
            op = jax.checkpoint(op, policy=jax.checkpoint_policies.save_only_these_names(*KEPT))
        inputs = (QUERIES, KEYS, KEYS, TOKENS, TOKENS, *[axes for _, axes in operands])
        arrays = (q, k, v, rows.segments, rows.prefix, *[array for array, _ in operands])
        return sharding.local(op, inputs, QUERIES, *arrays)

    def _over_cache(self, q: jax.Array, cache: dict[str, jax.Array], rows: Rows, layer: jax.Array) -> jax.Array:
        c, mask, scale, length = self.config, self._mask, self._scale, cache["key"].shape[2]
        if rows.pages is not None:
            length = rows.pages.shape[1] * cache["key"].shape[3]
        operands = c.positions.operands(q, length, rows.shared, self.context)
        chip = sharding.device_kind()

        def op(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            positions: jax.Array,
            layer: jax.Array,
            prefix: jax.Array | None,
            pages: jax.Array | None,
            *given: Any,
        ) -> jax.Array:
            scores = c.positions.scores(q, positions, jnp.arange(length), scale, *given)
            return decode_attention(
                scores.q,
                k,
                v,
                positions,
                layer,
                mask=mask,
                prefix=prefix,
                alibi_slopes=scores.alibi_slopes,
                soft_cap=c.soft_cap,
                bias=scores.bias,
                scale=scale,
                pages=pages,
                chip=chip,
            )

        # The caches of all layers, so that only what the op reads of this one is ever copied.
        store = CACHE if rows.pages is None else PAGED_CACHE
        inputs = (QUERIES, store, store, TOKENS, (), ("batch",), PAGES, *[axes for _, axes in operands])
        marks = (rows.positions, layer, rows.prefix, rows.pages)
        arrays = (q, cache["key"], cache["value"], *marks, *[a for a, _ in operands])
        return sharding.local(op, inputs, QUERIES, *arrays)


def _write(cache: jax.Array, new: jax.Array, rows: Rows, layer: jax.Array) -> jax.Array:
    """`cache` [layers, B, S, K, N] with `new` [B, T, K, N] at each row's positions [B, T] of one layer, in place
    under jit; a paged one [layers, P, K, C, N] at those of the rows' pages.

    Positions beyond the cache are dropped, which is how padding of a ragged prompt is kept out.
    """

    def put(
        cache: jax.Array, new: jax.Array, positions: jax.Array, layer: jax.Array, pages: jax.Array | None
    ) -> jax.Array:
        new = new.astype(cache.dtype)
        if pages is not None:
            size = cache.shape[3]
            number = jnp.take_along_axis(pages, positions[:, ::size] // size, axis=1)
            whole = new.reshape(*number.shape, size, *new.shape[2:])
            return cache.at[layer, number].set(jnp.swapaxes(whole, 2, 3), mode="drop")
        index = jnp.arange(new.shape[0])[:, None]
        return cache.at[layer, index, positions].set(new, mode="drop")

    store = CACHE if rows.pages is None else PAGED_CACHE
    inputs = (store, KEYS, TOKENS, (), PAGES)
    return sharding.local(put, inputs, store, cache, new, rows.positions, layer, rows.pages)
