"""Attention block by block in plain XLA: no [T, S] array is ever whole, in the backward pass either.

Forward, the softmax is accumulated online (Milakov and Gimelshein 2018); backward, scores are made again from the kept
log-sum-exp (Dao et al. 2022). Blocks that no query of a block of queries sees are not visited.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import merge, reference

QUERIES = 128
KEYS = 256
"""Block sizes: of pairs from 128 to 512, the fastest on CPU at 2048 tokens, forward and backward together."""


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    soft_cap: float | None
    queries: int
    keys: int


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    scale: float,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    offset: jax.Array | int = 0,
    queries: int = QUERIES,
    keys: int = KEYS,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, H, D], lse [B, T, H]); query i sees keys first[i] <= j < stop[i], int32 [B, T] each.

    offset: place of query 0 among the keys, for ALiBi. queries, keys: tokens of a block.
    """
    static = _Static(scale, soft_cap, min(queries, q.shape[1]), min(keys, k.shape[1]))
    return _attention(static, q, k, v, first, stop, alibi_slopes, jnp.asarray(offset, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    return _fwd(static, q, k, v, first, stop, slopes, offset)[0]


class _Blocks:
    """One call's operands in blocks: queries as [blocks, B, K, G, queries, ...], keys padded to whole blocks."""

    def __init__(self, static: _Static, q: Any, k: Any, first: Any, stop: Any, slopes: Any, offset: Any):
        self.static = static
        self.B, self.T, self.H, self.D = q.shape
        self.S, self.K = k.shape[1:3]
        self.real = jnp.promote_types(q.dtype, jnp.float32)
        self.first, self.stop = (self.queries(x) for x in (first, stop))
        self.slopes = None if slopes is None else slopes.reshape(self.K, self.H // self.K, 1, 1)
        self.offset = offset

    def queries(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] to [blocks, B, queries, ...]; with heads, [blocks, B, K, G, queries, ...]."""
        size = self.static.queries
        x = jnp.pad(x, ((0, 0), (0, -self.T % size)) + ((0, 0),) * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(self.B, -1, size, *x.shape[2:]), 1, 0)
        if x.ndim < 4:
            return x
        x = x.reshape(*x.shape[:3], self.K, self.H // self.K, *x.shape[4:])
        return jnp.moveaxis(x, 2, 4)

    def rows(self, x: jax.Array) -> jax.Array:
        """[blocks, B, K, G, queries, ...] to [B, T, H, ...]."""
        x = jnp.moveaxis(jnp.moveaxis(x, 4, 2), 0, 1)
        x = x.reshape(self.B, -1, self.H, *x.shape[5:])
        return x[:, : self.T]

    def keys(self, x: jax.Array) -> jax.Array:
        """[B, S, K, D] to [B, K, S padded, D]."""
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -self.S % self.static.keys), (0, 0), (0, 0))), 1, 2)

    def block(self, x: jax.Array, index: Any) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, index * self.static.keys, self.static.keys, axis=2)

    def visited(self, first: jax.Array, stop: jax.Array) -> tuple[Any, Any]:
        """Blocks of keys that ranges [B, queries] of a block of queries reach into: begin, end."""
        some = first < stop
        begin = jnp.min(jnp.where(some, first, self.S)) // self.static.keys
        return begin, (jnp.max(jnp.where(some, stop, 0)) + self.static.keys - 1) // self.static.keys

    def scores(self, q: Any, k: Any, first: Any, stop: Any, at: Any, index: Any) -> tuple[Any, Any, Any]:
        """Scores [B, K, G, queries, keys], which are seen [B, 1, 1, queries, keys], and the tanh of the soft-cap."""
        s = jnp.einsum("BKGQD,BKSD->BKGQS", q, k, preferred_element_type=self.real) * self.static.scale
        tanh = None
        if self.static.soft_cap is not None:
            tanh = jnp.tanh(s / self.static.soft_cap)
            s = tanh * self.static.soft_cap
        key = index * self.static.keys + jnp.arange(self.static.keys)
        if self.slopes is not None:
            query = self.offset + at * self.static.queries + jnp.arange(self.static.queries)
            s = s + reference.position_bias(self.slopes, query[:, None], key[None, :])
        seen = (key >= first[..., None]) & (key < stop[..., None])
        return s, seen[:, None, None], tanh


def _fwd(static: _Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    cut = _Blocks(static, q, k, first, stop, slopes, offset)
    k_all, v_all = cut.keys(k), cut.keys(v)

    def of_queries(block: tuple) -> tuple[jax.Array, jax.Array]:
        at, q, first, stop = block

        def add(index: Any, so_far: tuple) -> tuple:
            top, total, values = so_far
            s, seen, _ = cut.scores(q, cut.block(k_all, index), first, stop, at, index)
            s = jnp.where(seen, s, -1e30)
            new = jnp.maximum(top, jnp.max(s, axis=-1))
            weights = jnp.exp(s - new[..., None])
            keep = jnp.exp(top - new)
            v = cut.block(v_all, index)
            more = jnp.einsum("BKGQS,BKSD->BKGQD", weights.astype(v.dtype), v, preferred_element_type=cut.real)
            return new, total * keep + jnp.sum(weights, axis=-1), values * keep[..., None] + more

        # No row's top goes below this floor, so what is masked weighs nothing even in a row that sees nothing.
        begin = (
            jnp.full(q.shape[:-1], -1e29, cut.real),
            jnp.zeros(q.shape[:-1], cut.real),
            jnp.zeros(q.shape, cut.real),
        )
        top, total, values = jax.lax.fori_loop(*cut.visited(first, stop), add, begin)
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        return (values / total[..., None]).astype(q.dtype), jnp.where(empty, reference.EMPTY, top + jnp.log(total))

    q_blocks = cut.queries(q)
    out, lse = jax.lax.map(of_queries, (jnp.arange(q_blocks.shape[0]), q_blocks, cut.first, cut.stop))
    out, lse = merge.kept((cut.rows(out), cut.rows(lse)))
    return (out, lse), (q, k, v, first, stop, slopes, offset, out, lse)


def _bwd(static: _Static, kept: Any, cotangents: Any) -> Any:
    q, k, v, first, stop, slopes, offset, out, lse = kept
    do, dlse = cotangents
    cut = _Blocks(static, q, k, first, stop, slopes, offset)
    delta = jnp.sum(do.astype(cut.real) * out.astype(cut.real), axis=-1) - dlse
    k_all, v_all = cut.keys(k), cut.keys(v)

    def of_queries(sums: tuple, block: tuple) -> tuple[tuple, jax.Array]:
        at, q, do, lse, delta, first, stop = block

        def add(index: Any, carry: tuple) -> tuple:
            dq, dk_all, dv_all = carry
            k, v = cut.block(k_all, index), cut.block(v_all, index)
            s, seen, tanh = cut.scores(q, k, first, stop, at, index)
            weights = jnp.where(seen, jnp.exp(s - lse[..., None]), 0.0)
            d_weights = jnp.einsum("BKGQD,BKSD->BKGQS", do, v, preferred_element_type=cut.real)
            d_scores = weights * (d_weights - delta[..., None])
            if tanh is not None:
                d_scores = d_scores * (1.0 - tanh * tanh)
            d_scores = (d_scores * static.scale).astype(q.dtype)
            weights = weights.astype(q.dtype)
            dk = jnp.einsum("BKGQS,BKGQD->BKSD", d_scores, q, preferred_element_type=cut.real)
            dv = jnp.einsum("BKGQS,BKGQD->BKSD", weights, do, preferred_element_type=cut.real)
            dq = dq + jnp.einsum("BKGQS,BKSD->BKGQD", d_scores, k, preferred_element_type=cut.real)

            def put(whole: jax.Array, part: jax.Array) -> jax.Array:
                start = index * static.keys
                return jax.lax.dynamic_update_slice_in_dim(whole, cut.block(whole, index) + part, start, axis=2)

            return dq, put(dk_all, dk), put(dv_all, dv)

        begin = (jnp.zeros(q.shape, cut.real), *sums)
        dq, dk_all, dv_all = jax.lax.fori_loop(*cut.visited(first, stop), add, begin)
        return (dk_all, dv_all), dq.astype(q.dtype)

    parts = [cut.queries(x) for x in (q, do.astype(q.dtype), lse, delta)]
    blocks = (jnp.arange(parts[0].shape[0]), *parts, cut.first, cut.stop)
    zeros = jnp.zeros(k_all.shape, cut.real)
    (dk, dv), dq = jax.lax.scan(of_queries, (zeros, zeros), blocks)
    dk, dv = (jnp.swapaxes(x, 1, 2)[:, : cut.S].astype(k.dtype) for x in (dk, dv))
    return cut.rows(dq), dk, dv, None, None, None, None


_attention.defvjp(_fwd, _bwd)
