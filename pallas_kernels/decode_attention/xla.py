"""Attention against a cache, block by block up to the last filled entry: the cost follows what is filled, not what is
allocated, and no [Q, S] score matrix is ever whole. The softmax is accumulated online (Milakov and Gimelshein 2018).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.masks import Mask
from pallas_kernels.decode_attention.reference import added_to_scores, entries_of, seen_entries

BLOCK = 256
"""Entries a block. Smaller ones cost more calls, larger ones are read where little is filled: of 128, 256, 512 and 1024
this was the best on CPU (`benchmarks/decode.py`).
"""

BLOCK_PAGES = 4
"""Pages a block of a paged cache: pages are read whole, so that little is read beyond the last filled one."""

_Sums = tuple[jax.Array, jax.Array, jax.Array]
"""Online softmax, float32: largest score and sum of weights [B, K, G, Q], weighted values [B, K, G, Q, D]."""


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    layer: jax.Array,
    *,
    mask: Mask,
    scale: float,
    prefix: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    pages: jax.Array | None = None,
    block: int | None = None,
) -> jax.Array:
    """Arguments and result as in `api.decode_attention`. Not differentiable: the number of blocks depends on the
    data. A block of a paged cache is whole pages.
    """
    B, Q, H, D = q.shape
    if pages is None:
        (S, K), size, layout = k.shape[2:4], min(block or BLOCK, k.shape[2]), "BSKD"
    else:
        K, page = k.shape[2:4]
        S, layout = page * pages.shape[1], "BKSD"
        size = min(block or BLOCK_PAGES * page, S)
        if size % page:
            raise ValueError(f"decode_attention: blocks of {size} entries are not whole pages of {page}")
    q_BKGQD = jnp.moveaxis(q.reshape(B, Q, K, H // K, D), 1, 3)

    def entries_from(cache: jax.Array, start: jax.Array) -> jax.Array:
        """`size` entries of each row, laid out as `layout` says."""
        if pages is None:
            return jax.lax.dynamic_slice(cache, (layer, 0, start, 0, 0), (1, B, size, K, D))[0]
        return entries_of(cache, layer, jax.lax.dynamic_slice_in_dim(pages, start // page, size // page, axis=1))

    def scores(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Masked scores of one block [B, K, G, Q, size], which of them count, and the block's values."""
        # The last block begins early enough to be whole; what the one before had is not counted again.
        start = jnp.minimum(index * size, S - size)
        keys, values = (entries_from(x, start) for x in (k, v))
        entries = start + jnp.arange(size)
        seen = seen_entries(mask, positions, entries, prefix) & (entries >= index * size)
        seen = seen[:, None, None]
        s = jnp.einsum(f"BKGQD,{layout}->BKGQS", q_BKGQD, keys, preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        part = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, size, axis=3)
        added = added_to_scores(positions, entries, alibi_slopes, part)
        if added is not None:
            s += jnp.broadcast_to(added, (added.shape[0], H, *added.shape[2:])).reshape(-1, K, H // K, *added.shape[2:])
        return jnp.where(seen, s, -1e30), seen, values

    def summed(s: jax.Array, seen: jax.Array, values: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jnp.where(seen, jnp.exp(s - top[..., None]), 0.0)
        found = jnp.einsum(
            f"BKGQS,{layout}->BKGQD", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return jnp.sum(weights, axis=-1), found

    def begin(index: jax.Array) -> _Sums:
        s, seen, values = scores(index)
        top = jnp.max(s, axis=-1)
        return top, *summed(s, seen, values, top)

    def add(index: jax.Array, so_far: _Sums) -> _Sums:
        s, seen, values = scores(index)
        top = jnp.maximum(so_far[0], jnp.max(s, axis=-1))
        total, found = summed(s, seen, values, top)
        keep = jnp.exp(so_far[0] - top)
        return top, so_far[1] * keep + total, so_far[2] * keep[..., None] + found

    first, stop = _blocks(positions, mask, size, S, prefix)
    sums = begin(first)
    if size < S:
        sums = jax.lax.fori_loop(first + 1, stop, add, sums)
    _, total, out = sums
    # A query that sees nothing gives zeros, as in the reference.
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(B, Q, H, D).astype(q.dtype)


def _blocks(
    positions: jax.Array, mask: Mask, size: int, length: int, prefix: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The first block that any query may see and the one behind the last; positions beyond the cache count as its
    end.
    """
    blocks = -(-length // size)
    first = jnp.int32(0)
    if mask.window is not None:
        first = jnp.clip((jnp.min(positions) - mask.window + 1) // size, 0, blocks - 1)
    stop = jnp.minimum(jnp.max(positions) // size + 1, blocks) if mask.causal else jnp.int32(blocks)
    if prefix is not None:
        stop = jnp.clip((jnp.max(prefix) + size - 1) // size, stop, blocks)
    return first, stop
