"""Attention: one op, implementations chosen loudly."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_table, others, reference, table, tpu, xla
from pallas_kernels.attention.case import Case
from pallas_kernels.attention.choice import Choice, choose
from pallas_kernels.attention.masks import Mask, ranges, run_ids

_CAUSAL = Mask()


def explain(impl: str, case: Case, chip: str | None = None) -> str:
    """What `attention(impl=...)` runs for `case` on `chip`, and why. Raises as `attention` does."""
    choice = choose(impl, case, chip)
    return f"attention: {choice.name} ({choice.reason}) for {case}"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask = _CAUSAL,
    segments: jax.Array | None = None,
    prefix: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    with_lse: bool = False,
    impl: str = "auto",
    chip: str | None = None,
    interpret: Any = False,
) -> Any:
    """Self-attention of whole rows: softmax(cap(scale q k^T) + ALiBi + bias, where the mask lets see) v.

    q: [B, T, H, D]; k, v: [B, T, K, D] with K dividing H (K = 1 is multi-query, Shazeer 2019).
    segments: int32 [B, T]; attention stays inside a run of equal ids. prefix: bool or int [B, T]: marks of a prefix-LM
    (Raffel et al. 2020); the first tokens of a segment, as many as it has marks, are seen by all its queries.
    alibi_slopes: float32 [H]; adds -slope |i - j| (Press et al. 2022); not differentiated. soft_cap: c of
    c tanh(x / c), put on the scaled scores before anything is added. bias: [B or 1, H or 1, T or 1, T], added and
    differentiated. scale: of q k^T, 1/sqrt(D) by default.
    impl: a name of `choice.NAMES`, or "auto". chip: the kind of device that the program is for, as jax names it ("TPU
    v4"); None is a CPU. It is a value because a program may be compiled where it does not run. interpret: of the Mosaic
    kernels, as `pallas_call` takes it: True runs them as plain operations on any device.

    Returns [B, T, H, D] in q's dtype, and with `with_lse` also the log-sum-exp of each query's scores, float32 [B, T,
    H], differentiable. The softmax is float32. A query that sees nothing gives zeros and `reference.EMPTY`.
    Raises ValueError for shapes that do not fit, an unknown `impl`, or one that cannot do this call, with the reasons.
    """
    _check(q, k, v, mask, segments, prefix, alibi_slopes, soft_cap, bias)
    B, T, H, D = q.shape
    case = Case(
        rows=B,
        length=T,
        heads=H,
        kv_heads=k.shape[2],
        head_dim=D,
        dtype=str(q.dtype),
        mask=mask,
        segments=segments is not None,
        prefix=prefix is not None,
        alibi=alibi_slopes is not None,
        soft_cap=soft_cap is not None,
        bias=bias is not None,
        lse=with_lse,
    )
    choice = choose(impl, case, chip)
    scale = D**-0.5 if scale is None else scale
    if choice.name in others.NAMES:
        ids = None if segments is None else run_ids(segments)
        return others.run(choice.name, q, k, v, case=case, scale=scale, soft_cap=soft_cap, segments=ids)
    first, stop = ranges(mask, B, T, segments, prefix)

    fixed = None if case.ranged else mask
    reach = mask if prefix is None else dataclasses.replace(mask, causal=False)
    shared: dict[str, Any] = dict(scale=scale, alibi_slopes=alibi_slopes, soft_cap=soft_cap, bias=bias)
    found = over_ranges(choice, q, k, v, first, stop, mask=fixed, reach=reach, interpret=interpret, **shared)
    return found if with_lse else found[0]


def over_ranges(
    choice: Choice,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    mask: Mask | None,
    reach: Mask | None = None,
    scale: float,
    alibi_slopes: jax.Array | None,
    soft_cap: float | None,
    bias: jax.Array | None = None,
    offset: jax.Array | int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) by one of our own implementations; query i sees the keys first[i] <= j < stop[i], int32 [B, T] each.

    mask: what says so if no data does, else None. reach: a mask that they stay within, if one is known. offset: place
    of query 0 among the keys, for ALiBi.
    """
    shared: dict[str, Any] = dict(scale=scale, alibi_slopes=alibi_slopes, soft_cap=soft_cap, offset=offset)
    if choice.name == "einsum":
        return reference.attention(q, k, v, first, stop, bias=bias, **shared)
    if choice.name == "xla":
        return xla.attention(q, k, v, first, stop, **shared)
    if isinstance(choice.row, gpu_table.Row):
        from pallas_kernels.attention import gpu  # Mosaic GPU is loaded where it is used

        ranged = mask is None or mask.window is not None
        tuning = choice.row.tuning
        return gpu.attention(q, k, v, first, stop, ranged=ranged, tuning=tuning, interpret=interpret, **shared)
    assert isinstance(choice.row, table.Row)
    tuning = choice.row.tuning
    return tpu.attention(q, k, v, first, stop, mask=mask, reach=reach, tuning=tuning, interpret=interpret, **shared)


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    segments: jax.Array | None,
    prefix: jax.Array | None,
    alibi_slopes: jax.Array | None,
    soft_cap: float | None,
    bias: jax.Array | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}; need [B,T,H,D], [B,T,K,D] twice"
        )
    B, T, H, _ = q.shape
    if H % k.shape[2]:
        raise ValueError(f"attention: {H} query heads are not a multiple of {k.shape[2]} key/value heads")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; need one floating dtype")
    for name, marks in (("segments", segments), ("prefix", prefix)):
        if marks is not None and marks.shape != (B, T):
            raise ValueError(f"attention: {name} {marks.shape} for q {q.shape}; need [B,T] = {(B, T)}")
    if alibi_slopes is not None and alibi_slopes.shape != (H,):
        raise ValueError(f"attention: alibi_slopes {alibi_slopes.shape} for {H} query heads; need one slope a head")
    if soft_cap is not None and not soft_cap > 0.0:
        raise ValueError(f"attention: soft_cap = {soft_cap}: must be above 0; None for no cap")
    if bias is not None and (
        bias.ndim != 4 or any(have not in (1, want) for have, want in zip(bias.shape, (B, H, T, T), strict=True))
    ):
        raise ValueError(f"attention: bias {bias.shape} does not broadcast to [B,H,T,S] = {(B, H, T, T)}")
    if bias is not None and bias.shape[3] != T:
        raise ValueError(f"attention: bias {bias.shape} must have all {T} keys")
