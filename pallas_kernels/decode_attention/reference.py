"""The meaning of attention against a cache, in plain jnp: scores against every entry, filled or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.attention.masks import Mask


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    layer: jax.Array,
    *,
    mask: Mask,
    scale: float,
    prefix: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    pages: jax.Array | None = None,
) -> jax.Array:
    """Arguments and result as in `api.decode_attention`."""
    k, v = (x[layer] if pages is None else jnp.moveaxis(entries_of(x, layer, pages), 1, 2) for x in (k, v))
    entries = jnp.arange(k.shape[1])
    added = added_to_scores(positions, entries, alibi_slopes, bias)
    seen = seen_entries(mask, positions, entries, prefix)
    return reference.masked_softmax_attention(q, k, v, seen, scale=scale, soft_cap=soft_cap, bias=added)[0]


def entries_of(paged: jax.Array, layer: jax.Array | int, pages: jax.Array) -> jax.Array:
    """The entries [B, K, n C, D] of `pages` [B, n] of one layer of a paged cache [L, P, K, C, D]."""
    L, P, K, C, D = paged.shape
    # A page's heads are taken apart: what is gathered then lies as the products need it.
    place = pages[:, None, :] * K + jnp.arange(K)[:, None]
    return paged.reshape(L, P * K, C, D)[layer, place].reshape(len(pages), K, -1, D)


def seen_entries(mask: Mask, positions: jax.Array, entries: jax.Array, prefix: jax.Array | None) -> jax.Array:
    """Whether queries at `positions` [B, Q] see `entries` [S] of their row's cache: bool [B, Q, S]."""
    q_index, kv_index = positions[:, :, None], entries[None, None, :]
    if prefix is None:
        return mask.allowed(q_index, kv_index)
    back = Mask(causal=False, window=mask.window).allowed(q_index, kv_index)
    return back & (mask.allowed(q_index, kv_index) | (kv_index < prefix[:, None, None]))


def added_to_scores(
    positions: jax.Array, entries: jax.Array, alibi_slopes: jax.Array | None, bias: jax.Array | None
) -> jax.Array | None:
    """ALiBi and `bias`, of `entries` [S] alone, summed: [B or 1, H or 1, Q or 1, S], or None without either."""
    if alibi_slopes is not None:
        distance = reference.position_bias(
            alibi_slopes[None, :, None, None], positions[:, None, :, None], entries[None, None, None, :]
        )
        bias = distance if bias is None else bias + distance
    return bias
