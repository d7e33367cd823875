"""Attention over parts of the keys, put together by the log-sum-exp of each part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import reference

KEPT = ("attention_out", "attention_lse")
"""Names (`jax.ad_checkpoint.checkpoint_name`) of all that the backward pass of our kernels needs besides its operands:
a rematerialization policy that saves them never runs the forward pass twice.
"""

Found = tuple[jax.Array, jax.Array]
"""(out [B, T, H, D], lse float32 [B, T, H]) of some of the keys."""


def kept(found: Found) -> Found:
    """`found` under the names KEPT."""
    return checkpoint_name(found[0], KEPT[0]), checkpoint_name(found[1], KEPT[1])


def nothing(q: jax.Array) -> Found:
    """What queries find where there are no keys, float32."""
    return jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], reference.EMPTY, jnp.float32)


def merge(a: Found, b: Found) -> Found:
    """What queries find in the keys of `a` and `b` together, float32."""
    top = jnp.maximum(a[1], b[1])
    of_a, of_b = jnp.exp(a[1] - top), jnp.exp(b[1] - top)
    total = of_a + of_b
    share_a, share_b = ((x / total)[..., None] for x in (of_a, of_b))
    out = share_a * a[0].astype(jnp.float32) + share_b * b[0].astype(jnp.float32)
    return out, jnp.maximum(top + jnp.log(total), reference.EMPTY)


def merge_into(found: Found, begin: int, part: Found) -> Found:
    """`found` where the queries from `begin` on, as many as `part` has, find what is in `part` too."""
    rows = slice(begin, begin + part[1].shape[1])
    both = merge((found[0][:, rows], found[1][:, rows]), part)
    out, lse = (jax.lax.dynamic_update_slice_in_dim(x, y, begin, 1) for x, y in zip(found, both, strict=True))
    return out, lse
