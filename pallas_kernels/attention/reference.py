"""The meaning of attention, in plain jnp. Also the implementation wherever a whole [T, S] score matrix fits.

Shapes: B rows, T queries, S keys, H query heads, K key/value heads (H = G K), D head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

EMPTY = -1e30
"""The log-sum-exp of a query that sees nothing: finite, so that neither it nor a gradient through it becomes NaN."""


def position_bias(slopes: jax.Array, q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
    """ALiBi (Press et al. 2022): -slope |i - j|, float32; slopes, indices and result of any shapes that broadcast."""
    return -slopes * jnp.abs(q_index - kv_index).astype(jnp.float32)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    scale: float,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    offset: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Query i attends to the keys first[i] <= j < stop[i] (int32 [B, T] each). Returns (out, lse).

    offset: place of query 0 among the keys, for ALiBi.
    """
    index, other = jnp.arange(k.shape[1]), jnp.arange(q.shape[1]) + offset
    seen = (index >= first[..., None]) & (index < stop[..., None])
    if alibi_slopes is not None:
        slopes = jax.lax.stop_gradient(alibi_slopes)[:, None, None]
        distance = position_bias(slopes, other[:, None], index[None, :])[None]
        bias = distance if bias is None else bias + distance
    return masked_softmax_attention(q, k, v, seen, scale=scale, soft_cap=soft_cap, bias=bias)


def masked_softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(cap(scale q k^T) + bias, where `seen`) v, the softmax in float32 (float64 where the inputs are).

    q: [B, T, H, D]; k, v: [B, S, K, D], K dividing H; seen: bool, broadcastable to [B, T, S]; cap(x) = c tanh(x / c)
    with c = soft_cap; bias: [B or 1, H or 1, T or 1, S]. Returns (out [B, T, H, D] in q's dtype, log-sum-exp of the
    scores [B, T, H]). A query that sees nothing gives zeros and EMPTY, with zero gradient.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    if H % K:
        raise ValueError(f"attention: {H} query heads are not a multiple of {K} key/value heads")
    real = jnp.promote_types(q.dtype, jnp.float32)
    q_BTKGD = q.reshape(B, T, K, H // K, D)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q_BTKGD, k, preferred_element_type=real) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        per_head = jnp.broadcast_to(bias, (bias.shape[0], H, *bias.shape[2:]))
        scores += per_head.astype(real).reshape(bias.shape[0], K, H // K, *bias.shape[2:])
    seen = jnp.broadcast_to(seen, (B, T, S))[:, None, None]
    scores = jnp.where(seen, scores, -1e30)
    # exp and sum written out, so that a row which sees nothing divides 0 by 1 and not 0 by 0.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out = jnp.einsum("BKGTS,BSKD->BTKGD", weights.astype(v.dtype), v, preferred_element_type=real)
    lse = jnp.moveaxis(jnp.where(empty, EMPTY, jnp.log(total) + top[..., 0]), 3, 1).reshape(B, T, H)
    out = (out / jnp.moveaxis(total, 3, 1)[..., None]).reshape(B, T, H, D).astype(q.dtype)
    return out, lse
