"""Attention: one op, implementations chosen loudly. A named implementation works or raises; "auto" can explain
itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.attention.masks import Mask

IMPLEMENTATIONS = ("xla",)


def explain(impl: str = "auto") -> str:
    """The name of the implementation that `attention(impl=...)` runs. Raises ValueError for an unknown one."""
    if impl == "auto":
        return "xla"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention: unknown implementation {impl!r}; there is auto, {', '.join(IMPLEMENTATIONS)}")
    return impl


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    segments: jax.Array | None = None,
    prefix: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Self-attention of whole rows.

    q: [B, T, H, D]; k, v: [B, T, K, D] with K dividing H (K = 1 is multi-query, Shazeer 2019); segments: int32 [B, T],
    attention stays within equal ids; prefix: int32 [B, T], marks of tokens that all queries of their segment see;
    alibi_slopes: float32 [H], each head's scores fall by slope |i - j|; soft_cap: cap tanh(scores / cap), before
    ALiBi and bias; bias: [B or 1, H or 1, T, T], added to the scores; scale: of the scores, 1/sqrt(D) by default.
    Returns [B, T, H, D] in q's dtype; the softmax is float32.
    Raises ValueError for shapes that do not fit or an unknown `impl`.
    """
    explain(impl)
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"attention: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}; need [B,T,H,D], [B,T,K,D] twice"
        )
    index = jnp.arange(q.shape[1])
    seen = mask.allowed(index[:, None], index[None, :])[None]
    if prefix is not None:
        seen = seen | (prefix != 0)[:, None, :]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    if alibi_slopes is not None:
        distance = jnp.abs(index[:, None] - index[None, :]).astype(jnp.float32)
        falling = -alibi_slopes[None, :, None, None] * distance
        bias = falling if bias is None else bias + falling
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.masked_softmax_attention(q, k, v, seen, scale=factor, soft_cap=soft_cap, bias=bias)
