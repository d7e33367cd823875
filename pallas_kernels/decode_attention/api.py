"""Attention of new tokens against a cache: one op, implementations chosen loudly."""

from __future__ import annotations

import jax

from pallas_kernels.attention.masks import Mask
from pallas_kernels.decode_attention import reference, xla

IMPLEMENTATIONS = {"xla": xla.decode_attention, "reference": reference.decode_attention}


def explain(impl: str = "auto") -> str:
    """The name of the implementation that `decode_attention(impl=...)` runs. Raises ValueError for an unknown one."""
    if impl == "auto":
        return "xla"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"decode_attention: unknown implementation {impl!r}; there is auto, {', '.join(IMPLEMENTATIONS)}"
        )
    return impl


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    layer: jax.Array | int = 0,
    *,
    mask: Mask,
    prefix: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> jax.Array:
    """New queries against the cached keys of one layer; entry j of a row's cache is its token at position j.

    q: [B, Q, H, D]; k, v: [L, B, S, K, D], the caches of all layers, of which `layer` is read, with K dividing H;
    entries beyond a row's own position are ignored; positions: int32 [B, Q]; prefix: int32 [B], how many of a row's
    first entries all its queries see; alibi_slopes, soft_cap: as in `attention`; bias: [B or 1, H or 1, Q or 1, S],
    added to the scores; scale: of the scores, 1/sqrt(D) by default. Returns [B, Q, H, D] in q's dtype; the softmax is
    float32. Raises ValueError for shapes that do not fit or
    an unknown `impl`.
    """
    fits = k.shape == v.shape and k.ndim == 5 and q.shape[0] == k.shape[1] and q.shape[3] == k.shape[4]
    if not fits or q.shape[2] % k.shape[3] or positions.shape != q.shape[:2]:
        raise ValueError(
            f"decode_attention: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}, positions {positions.shape}; "
            "need [B,Q,H,D], [L,B,S,K,D] twice with K dividing H, [B,Q]"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[explain(impl)](
        q,
        k,
        v,
        positions,
        layer,
        mask=mask,
        prefix=prefix,
        alibi_slopes=alibi_slopes,
        soft_cap=soft_cap,
        bias=bias,
        scale=scale,
    )
