"""The meaning of attention, in plain jnp. Also the XLA implementation wherever a [T, S] score matrix fits.

Shapes: B rows, T queries, S keys, H query heads, K key/value heads (H = G K), D head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T, capped, + bias, where `seen`) v with the softmax in float32.

    q: [B, T, H, D]; k, v: [B, S, K, D], K dividing H; seen: bool, broadcastable to [B, T, S]; bias: broadcastable to
    [B, H, T, S], added behind the cap. Returns [B, T, H, D] in
    q's dtype. A query that sees nothing gives zeros, with zero gradient.
    """
    B, T, H, D = q.shape
    K = k.shape[2]
    if H % K:
        raise ValueError(f"attention: {H} query heads are not a multiple of {K} key/value heads")
    q_BTKGD = q.reshape(B, T, K, H // K, D)
    scores = jnp.einsum("BTKGD,BSKD->BKGTS", q_BTKGD, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        heads = bias if bias.shape[1] == H else jnp.broadcast_to(bias, (bias.shape[0], H, *bias.shape[2:]))
        scores = scores + heads.reshape(bias.shape[0], K, H // K, *bias.shape[2:])
    seen = jnp.broadcast_to(seen, (B, T, k.shape[1]))[:, None, None]
    scores = jnp.where(seen, scores, -1e30)
    # exp and sum written out, so that a row which sees nothing divides 0 by 1 and not 0 by 0.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    total = jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("BKGTS,BSKD->BTKGD", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / jnp.moveaxis(total, 3, 1)[..., None]).reshape(B, T, H, D).astype(q.dtype)
