"""Ring attention (Liu et al. 2023): rows sharded over their length, keys and values passed round from device to device.

Each device attends to one device's keys at a time and puts the parts together by their log-sum-exp; the gradient goes
the same way round. To be called inside `shard_map`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import merge, others
from pallas_kernels.attention.api import over_ranges
from pallas_kernels.attention.case import Case
from pallas_kernels.attention.choice import choose
from pallas_kernels.attention.masks import Mask, ranges


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str,
    mask: Mask,
    segments: jax.Array | None = None,
    prefix: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
    chip: str | None = None,
    interpret: Any = False,
) -> jax.Array:
    """This device's part [B, T / n, H, D] of `attention` over rows of T tokens sharded over the n devices of mesh axis
    `axis`. All arguments as there, of this device's tokens.

    Raises ValueError as `attention` does, and for an implementation that gives no log-sum-exp.
    """
    B, T, H, D = q.shape
    devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    given = {"segments": segments is not None, "prefix": prefix is not None, "alibi": alibi_slopes is not None}
    case = Case(
        rows=B,
        length=T,
        heads=H,
        kv_heads=k.shape[2],
        head_dim=D,
        dtype=str(q.dtype),
        mask=mask,
        soft_cap=soft_cap is not None,
        lse=True,
        **given,
    )
    choice = choose(impl, case, chip)
    assert choice.name not in others.NAMES
    # Ids are small: every device works out the ranges of whole rows and keeps those of its queries.
    whole = [None if x is None else jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (segments, prefix)]
    bounds = ranges(mask, B, T * devices, *whole)
    first, stop = (jax.lax.dynamic_slice_in_dim(x, me * T, T, axis=1) for x in bounds)
    onward = [(device, (device + 1) % devices) for device in range(devices)]
    found = merge.nothing(q)
    for step in range(devices):
        begin = (me - step) % devices * T
        part = over_ranges(
            choice,
            q,
            k,
            v,
            jnp.clip(first - begin, 0, T),
            jnp.clip(stop - begin, 0, T),
            mask=None,
            scale=D**-0.5 if scale is None else scale,
            alibi_slopes=alibi_slopes,
            soft_cap=soft_cap,
            offset=me * T - begin,
            interpret=interpret,
        )
        found = merge.merge(found, part)
        if step + 1 < devices:
            k, v = (jax.lax.ppermute(x, axis, onward) for x in (k, v))
    return found[0].astype(q.dtype)
