"""The meaning of attention against a cache, in plain jnp: scores against every entry, filled or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.attention.masks import Mask


def decode_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, layer: jax.Array, *, mask: Mask, scale: float
) -> jax.Array:
    """Arguments and result as in `api.decode_attention`."""
    seen = mask.allowed(positions[:, :, None], jnp.arange(k.shape[2])[None, None, :])
    return reference.masked_softmax_attention(q, k[layer], v[layer], seen, scale=scale)
