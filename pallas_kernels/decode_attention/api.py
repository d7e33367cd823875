"""Attention of new tokens against a cache: the meaning, and the XLA implementation."""

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
    *,
    mask: Mask,
    scale: float | None = None,
) -> jax.Array:
    """New queries against cached keys; entry j of a row's cache is its token at position j.

    q: [B, Q, H, D]; k, v: [B, S, K, D], entries beyond a row's own position are ignored; positions: int32 [B, Q];
    scale: of the scores, 1/sqrt(D) by default. Returns [B, Q, H, D] in q's dtype.
    """
    seen = mask.allowed(positions[:, :, None], jnp.arange(k.shape[1])[None, None, :])
    return reference.masked_softmax_attention(q, k, v, seen, scale=q.shape[-1] ** -0.5 if scale is None else scale)
