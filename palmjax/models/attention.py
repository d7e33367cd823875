"""Attention with any number of key/value heads: over whole rows, and against a key/value cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.attention import Mask, attention, check_name
from pallas_kernels.decode_attention import decode_attention
from palmjax import sharding
from palmjax.config import ConfigError, Part, require, section
from palmjax.models.layers import Dense
from palmjax.models.positions import PositionsPart, RoPE
from palmjax.sharding import Axes

QUERIES: Axes = ("batch", "length", "heads", "head_dim")
KEYS: Axes = ("batch", "length", "kv_heads", "head_dim")
CACHE: Axes = ("layers", "batch", "length", "kv_heads", "head_dim")


class AttentionPart(Part):
    """An attention layer: `build(name)` returns a module (x, rows, cache, layer) -> ([B, T, D], cache)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@section
class Attention(AttentionPart):
    """Causal attention without biases, scores scaled by 1/sqrt(head_dim).

    num_kv_heads: 1 is multi-query (PaLM section 2), num_heads is multi-head, a divisor between is grouped-query.
    window: how many keys back a query sees, itself included; None for all. impl: of `pallas_kernels.attention`.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int = 1
    positions: PositionsPart = RoPE()
    window: int | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            require(getattr(self, field) >= 1, self, field, "1 or more")
        require(self.window is None or self.window >= 1, self, "window", "1 or more, or None for all keys")
        try:
            check_name(self.impl)
        except ValueError as error:
            raise ConfigError(f"Attention.impl = {self.impl!r}: {error}") from error
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"Attention.num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"Attention.head_dim = {self.head_dim} is odd; rotary positions pair dimensions")

    def build(self, name: str, recompute: bool = False) -> nn.Module:
        return AttentionModule(self, recompute, name=name)


class AttentionModule(nn.Module):
    """The attention layer. `recompute`: keep no score of the forward pass; the backward pass makes them again."""

    config: Attention
    recompute: bool

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rows: Any, cache: dict[str, jax.Array] | None, layer: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """rows: an object with `positions` and `segments` (int32 [B, T]; segments None for one segment a row).

        With a cache of {"key", "value"} [layers, B, S, K, N], the new keys are written at `positions` of this `layer`,
        and queries see the cache; without one they see the row itself.
        """
        c, D = self.config, x_BTD.shape[-1]
        H, K, N = c.num_heads, c.num_kv_heads, c.head_dim
        project, kv = "BTD,DHN->BTHN", ("embed", "kv_heads", "head_dim")
        q = Dense(project, (D, H, N), ("embed", "heads", "head_dim"), D, QUERIES, name="query")(x_BTD)
        k = Dense(project, (D, K, N), kv, D, KEYS, name="key")(x_BTD)
        v = Dense(project, (D, K, N), kv, D, KEYS, name="value")(x_BTD)
        q, k = c.positions.rotate(q, rows.positions), c.positions.rotate(k, rows.positions)
        mask, chip = Mask(causal=True, window=c.window), sharding.device_kind()
        if cache is None:

            def op(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
                return attention(
                    q, k, v, mask=mask, segments=segments, recompute=self.recompute, impl=c.impl, chip=chip
                )

            out = sharding.local(op, (QUERIES, KEYS, KEYS, ("batch", "length")), QUERIES, q, k, v, rows.segments)
        else:
            cache = {
                "key": _write(cache["key"], k, rows.positions, layer),
                "value": _write(cache["value"], v, rows.positions, layer),
            }

            def op_cached(
                q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, layer: jax.Array
            ) -> jax.Array:
                return decode_attention(q, k, v, positions, layer, mask=mask)

            # The caches of all layers, so that only what the op reads of this one is ever copied.
            inputs = (QUERIES, CACHE, CACHE, ("batch", "length"), ())
            out = sharding.local(op_cached, inputs, QUERIES, q, cache["key"], cache["value"], rows.positions, layer)
        residual: Axes = ("batch", "length", "residual")
        y = Dense("BTHN,HND->BTD", (H, N, D), ("heads", "head_dim", "embed"), H * N, residual, name="out")(out)
        return y, cache


def _write(cache: jax.Array, new: jax.Array, positions: jax.Array, layer: jax.Array) -> jax.Array:
    """`cache` [layers, B, S, K, N] with `new` [B, T, K, N] at each row's `positions` [B, T] of one layer, in place
    under jit.

    Positions beyond the cache are dropped, which is how padding of a ragged prompt is kept out.
    """

    def put(cache: jax.Array, new: jax.Array, positions: jax.Array, layer: jax.Array) -> jax.Array:
        rows = jnp.arange(new.shape[0])[:, None]
        return cache.at[layer, rows, positions].set(new.astype(cache.dtype), mode="drop")

    return sharding.local(put, (CACHE, KEYS, ("batch", "length"), ()), CACHE, cache, new, positions, layer)
