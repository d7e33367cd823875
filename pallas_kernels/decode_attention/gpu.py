"""Attention against a cache on Hopper through Mosaic GPU: what is shared out over the chip, and the sum of the parts.

The cache is read where it lies. Each row's is taken in parts (Dao et al. 2023, "Flash-Decoding"), whose results are
added by their log-sum-exp in a second step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_tile, reference
from pallas_kernels.attention.gpu_plan import ROWS, SEEN, Plan
from pallas_kernels.attention.gpu_rows import Rows
from pallas_kernels.attention.masks import Mask
from pallas_kernels.decode_attention import gpu_kernel
from pallas_kernels.decode_attention.gpu_plan import Tuning, shares
from pallas_kernels.decode_attention.tpu import seen_range


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    layer: jax.Array | int,
    *,
    mask: Mask,
    scale: float,
    tuning: Tuning,
    prefix: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    pages: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Arguments and result as in `api.decode_attention`; not differentiable. interpret: as in `attention.gpu`."""
    D = q.shape[3]
    entries, K = k.shape[2:4] if pages is None else (k.shape[3] * pages.shape[1], k.shape[2])
    first, stop = seen_range(mask, positions, entries, prefix)
    work = shares(tuning, q.shape, K, entries, None if pages is None else k.shape[3], k.shape[1])
    ranged = mask.window is not None or work.uneven
    interpret = gpu_tile.interpreter(interpret)
    plan = Plan(
        width=D,
        scale=scale,
        soft_cap=soft_cap,
        alibi=alibi_slopes is not None,
        ranged=ranged,
        interpret=bool(interpret),
    )
    pack = Rows(q.shape, K, work.rows if work.row_blocks == 1 else ROWS, D)
    of_numbers = Rows(q.shape, K, ROWS, D)
    numbers = of_numbers.numbers(first if ranged else None, stop, positions, alibi_slopes)
    some = first < stop
    most = jnp.max(jnp.where(some, stop, 0), axis=1)
    least = jnp.minimum(jnp.min(jnp.where(some, first, entries), axis=1), most)
    if pages is None:
        page_table = jnp.zeros((1, 1), jnp.int32)
        k, v = (x.reshape(-1, entries, K * D) for x in (k, v))
    else:
        page_table = pages.astype(jnp.int32)
        k, v = (x.reshape(-1, *x.shape[3:]) for x in (k, v))
    table, layer = jnp.stack([least, most], axis=1), jnp.asarray(layer, jnp.int32)[None]
    out, lse = gpu_kernel.parts(plan, work, table, layer, page_table, numbers, pack.rows(q), k, v, interpret=interpret)
    tiles = (most + work.tile - 1) // work.tile - least // work.tile
    found = _together(out, lse, jnp.repeat(-(-tiles // work.part), K))
    return pack.from_rows(found).astype(q.dtype)


def _together(out: jax.Array, lse: jax.Array, count: jax.Array) -> jax.Array:
    """[N, R, D] from the first `count` [N] parts, out [N, P, R, D] and lse [N, P, R]; zeros where all saw nothing."""
    written = jnp.arange(lse.shape[1]) < count[:, None]
    lse = jnp.where(written[:, :, None], lse, reference.EMPTY)
    share = jnp.where(lse > SEEN, jnp.exp(lse - jnp.max(lse, axis=1, keepdims=True)), 0.0)
    total = jnp.sum(share, axis=1)
    share = (share / jnp.where(total > 0.0, total, 1.0)[:, None])[..., None]
    # What was not written may be NaN.
    return jnp.sum(jnp.where(share > 0.0, share * out, 0.0), axis=1)
