"""Attention of new tokens against a cache: one op, implementations chosen loudly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_table
from pallas_kernels.attention.masks import Mask
from pallas_kernels.decode_attention import reference, tpu, xla
from pallas_kernels.decode_attention.case import Case
from pallas_kernels.decode_attention.choice import Row, choose


def explain(impl: str, case: Case, chip: str | None = None) -> str:
    """What `decode_attention(impl=...)` runs for `case` on `chip`, and why. Raises as `decode_attention` does."""
    choice = choose(impl, case, chip)
    return f"decode_attention: {choice.name} ({choice.reason}) for {case}"


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
    pages: jax.Array | None = None,
    impl: str = "auto",
    chip: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """New queries against the cached keys of one layer; entry j of a row's cache is its token at position j.

    q: [B, Q, H, D]; k, v: [L, B, S, K, D], the caches of all layers, of which `layer` is read, with K dividing H;
    entries beyond a row's own position are ignored, but for the first prefix[b] (int32 [B]), which all queries of a
    row see (a prefix-LM's prompt); positions: int32 [B, Q]; alibi_slopes, soft_cap: as in `attention`; bias:
    [B or 1, H or 1, Q or 1, S], added to the scores; scale: of the scores, 1/sqrt(D) by default.
    pages: int32 [B, n], of a paged cache (Kwon et al. 2023): k, v are [L, P, K, C, D], P pages of C entries that rows
    share, and entry j of row b is entry j mod C of page pages[b, j // C]; S is then n C.
    impl: a name of `choice.NAMES`, or "auto". chip, interpret: as in `attention`.
    Returns [B, Q, H, D] in q's dtype; the softmax is float32. Raises ValueError for shapes that do not fit, an unknown
    `impl`, or one that cannot do this call, with the reasons.
    """
    fits = k.shape == v.shape and k.ndim == 5 and q.shape[3] == k.shape[4]
    fits = fits and q.shape[0] == (k.shape[1] if pages is None else pages.shape[0])
    K = k.shape[3 if pages is None else 2] if fits else 1
    if not fits or q.shape[2] % K or positions.shape != q.shape[:2]:
        raise ValueError(
            f"decode_attention: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}, positions {positions.shape}"
            + ("" if pages is None else f", pages {pages.shape}")
            + "; need [B,Q,H,D], [L,B,S,K,D] twice with K dividing H, [B,Q]; with pages [B,n], [L,P,K,C,D] twice"
        )
    B, Q, H, D = q.shape
    entries = k.shape[2] if pages is None else k.shape[3] * pages.shape[1]
    _check_extras(B, Q, H, entries, prefix, alibi_slopes, soft_cap, bias)
    case = Case(
        rows=B,
        queries=Q,
        heads=H,
        kv_heads=K,
        entries=entries,
        head_dim=D,
        dtype=str(q.dtype),
        cache_dtype=str(k.dtype),
        page=None if pages is None else k.shape[3],
        bias=bias is not None,
    )
    choice = choose(impl, case, chip)
    shared: dict[str, Any] = dict(mask=mask, scale=D**-0.5 if scale is None else scale, prefix=prefix, pages=pages)
    shared |= dict(alibi_slopes=alibi_slopes, soft_cap=soft_cap)
    if isinstance(choice.row, gpu_table.Row):
        from pallas_kernels.decode_attention import gpu  # Mosaic GPU is loaded where it is used

        tuning = choice.row.tuning
        return gpu.decode_attention(q, k, v, positions, layer, tuning=tuning, interpret=interpret, **shared)
    if isinstance(choice.row, Row):
        sizes = {"size": choice.row.size, "cores": choice.row.cores}
        return tpu.decode_attention(q, k, v, positions, layer, **sizes, interpret=interpret, **shared)
    run = xla.decode_attention if choice.name == "xla" else reference.decode_attention
    return run(q, k, v, positions, jnp.asarray(layer), bias=bias, **shared)


def _check_extras(
    B: int,
    Q: int,
    H: int,
    S: int,
    prefix: jax.Array | None,
    alibi_slopes: jax.Array | None,
    soft_cap: float | None,
    bias: jax.Array | None,
) -> None:
    if prefix is not None and prefix.shape != (B,):
        raise ValueError(f"decode_attention: prefix {prefix.shape} for {B} rows; need a length a row")
    if alibi_slopes is not None and alibi_slopes.shape != (H,):
        raise ValueError(f"decode_attention: alibi_slopes {alibi_slopes.shape} for {H} heads; need one slope a head")
    if soft_cap is not None and not soft_cap > 0.0:
        raise ValueError(f"decode_attention: soft_cap = {soft_cap}: must be above 0; None for no cap")
    if bias is not None:
        fits = bias.ndim == 4 and all(a in (1, b) for a, b in zip(bias.shape[:3], (B, H, Q), strict=True))
        if not fits or bias.shape[3] != S:
            raise ValueError(f"decode_attention: bias {bias.shape} does not broadcast to [B,H,Q,S] = {(B, H, Q, S)}")
