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
) -> jax.Array:
    """Arguments and result as in `api.decode_attention`."""
    entries = jnp.arange(k.shape[2])
    seen = mask.allowed(positions[:, :, None], entries[None, None, :])
    if prefix is not None:
        seen = seen | (entries[None, None, :] < prefix[:, None, None])
    if alibi_slopes is not None:
        distance = jnp.abs(positions[:, :, None] - entries).astype(jnp.float32)
        falling = -alibi_slopes[None, :, None, None] * distance[:, None]
        bias = falling if bias is None else bias + falling
    return reference.masked_softmax_attention(q, k[layer], v[layer], seen, scale=scale, soft_cap=soft_cap, bias=bias)
