"""Attention on Hopper through Mosaic GPU: layout, padding and the gradient."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_backward, gpu_forward, merge
from pallas_kernels.attention.gpu_plan import (
    COMPUTE,
    LOG2E,
    NOTHING,
    ROWS,
    SEEN,
    Plan,
    Tuning,
    key_bounds,
    parts_of,
    row_bounds,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    scale: float
    soft_cap: float | None
    alibi: bool
    ranged: bool
    tuning: Tuning
    interpret: Any


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    scale: float,
    tuning: Tuning,
    ranged: bool = True,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    offset: jax.Array | int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, H, D], lse [B, T, H]); query i sees keys first[i] <= j < stop[i], int32 [B, T] each.

    ranged: False where first is 0 throughout. offset: place of query 0 among the keys, for ALiBi. interpret:
    `InterpretGPUParams` of Mosaic GPU, or True for its defaults; False compiles for a GPU.
    """
    static = _Static(
        scale=scale,
        soft_cap=soft_cap,
        alibi=alibi_slopes is not None,
        ranged=ranged,
        tuning=tuning,
        interpret=_params(interpret),
    )
    return _attention(static, q, k, v, first, stop, alibi_slopes, jnp.asarray(offset, jnp.int32))


def _params(interpret: Any) -> Any:
    if interpret is not True:
        return interpret
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not public as of jax 0.11

    return InterpretGPUParams()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    return _forward(static, q, k, v, first, stop, slopes, offset)


def _attention_fwd(static: _Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    out, lse = merge.kept(_forward(static, q, k, v, first, stop, slopes, offset))
    return (out, lse), (q, k, v, first, stop, slopes, offset, out, lse)


def _forward(static: _Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    ring = static.tuning.forward
    pack = _Packing(q, k, static, COMPUTE * ROWS, ring.keys)
    numbers = pack.numbers(first, stop, slopes, offset)
    table = key_bounds(*pack.ranges(first, stop), pack.block, ring.keys, pack.padded_keys)
    out, lse = gpu_forward.forward(
        pack.plan, ring, table, numbers, pack.rows(q), pack.keys(k), pack.keys(v), interpret=static.interpret
    )
    return pack.from_rows(out), pack.from_numbers(lse)


def _attention_bwd(static: _Static, kept: Any, cotangents: Any) -> Any:
    q, k, v, first, stop, slopes, offset, out, lse = kept
    do, dlse = cotangents
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse
    do = do.astype(q.dtype)
    given: Any = (q, do, k, v, first, stop, slopes, offset, lse, delta)
    return _dq(static, *given), *_dkv(static, *given), None, None, None, None


def _dq(static: _Static, q: Any, do: Any, k: Any, v: Any, first: Any, stop: Any, *rest: Any) -> jax.Array:
    ring = static.tuning.dq
    pack = _Packing(q, k, static, COMPUTE * ROWS, ring.keys)
    table = key_bounds(*pack.ranges(first, stop), pack.block, ring.keys, pack.padded_keys)
    operands = (pack.rows(q), pack.rows(do), pack.keys(k), pack.keys(v))
    numbers = pack.numbers(first, stop, *rest)
    dq = gpu_backward.dq(pack.plan, ring, table, numbers, *operands, interpret=static.interpret)
    return pack.from_rows(dq)


def _dkv(static: _Static, q: Any, do: Any, k: Any, v: Any, first: Any, stop: Any, *rest: Any) -> tuple[jax.Array, ...]:
    stream = static.tuning.dkv
    pack = _Packing(q, k, static, stream.queries, ROWS)
    parts = parts_of(pack.N * pack.padded_keys // ROWS, pack.R // stream.queries)
    table = row_bounds(*pack.ranges(first, stop), stream.queries, ROWS, pack.padded_keys, parts)
    operands = (pack.rows(q), pack.rows(do), pack.keys(k), pack.keys(v))
    numbers = pack.numbers(first, stop, *rest)
    found = gpu_backward.dkv(pack.plan, stream, table, numbers, *operands, interpret=static.interpret)
    return tuple(pack.from_keys(jnp.sum(x, axis=1) if parts > 1 else x[:, 0]).astype(k.dtype) for x in found)


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Packing:
    """[B, T, H, D] and [B, S, K, D] to the kernels' [N, R, D] and [N, S, D] and back, padded to whole blocks.

    N = B K sequences, R = T G rows.
    """

    def __init__(self, q: jax.Array, k: jax.Array, static: _Static, rows: int, tile: int):
        self.B, self.T, self.H, self.D = q.shape
        self.S, self.K = k.shape[1:3]
        self.N, self.G = self.B * self.K, self.H // self.K
        self.R = -(-self.T * self.G // rows) * rows
        self.padded_keys = -(-self.S // tile) * tile
        self.width = next(size for size in (64, 128, 256) if size >= self.D)
        self.static = static
        self.block = rows
        self.plan = Plan(
            width=self.width,
            scale=static.scale,
            soft_cap=static.soft_cap,
            alibi=static.alibi,
            ranged=static.ranged,
            interpret=bool(static.interpret),
        )

    def rows(self, x: jax.Array) -> jax.Array:
        """[B, T, H, D] to [N, R, D]."""
        x = x.reshape(self.B, self.T, self.K, self.G, self.D)
        x = jnp.swapaxes(x, 1, 2).reshape(self.N, self.T * self.G, self.D)
        return jnp.pad(x, ((0, 0), (0, self.R - self.T * self.G), (0, self.width - self.D)))

    def from_rows(self, x: jax.Array) -> jax.Array:
        x = x[:, : self.T * self.G, : self.D].reshape(self.B, self.K, self.T, self.G, self.D)
        return jnp.swapaxes(x, 1, 2).reshape(self.B, self.T, self.H, self.D)

    def keys(self, x: jax.Array) -> jax.Array:
        """[B, S, K, D] to [N, S, D]."""
        x = jnp.swapaxes(x, 1, 2).reshape(self.N, self.S, self.D)
        return jnp.pad(x, ((0, 0), (0, self.padded_keys - self.S), (0, self.width - self.D)))

    def from_keys(self, x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x[:, : self.S, : self.D].reshape(self.B, self.K, self.S, self.D), 1, 2)

    def per_row(self, x: jax.Array, filler: Any) -> jax.Array:
        """[B, T, H] (or what broadcasts to it) to [N, R]."""
        x = jnp.broadcast_to(x, (self.B, self.T, self.H)).reshape(self.B, self.T, self.K, self.G)
        x = jnp.swapaxes(x, 1, 2).reshape(self.N, self.T * self.G)
        return jnp.pad(x, ((0, 0), (0, self.R - self.T * self.G)), constant_values=filler)

    def from_numbers(self, x: jax.Array) -> jax.Array:
        """[N, R] to [B, T, H]."""
        x = x[:, : self.T * self.G].reshape(self.B, self.K, self.T, self.G)
        return jnp.swapaxes(x, 1, 2).reshape(self.B, self.T, self.H)

    def numbers(
        self, first: Any, stop: Any, slopes: Any, offset: Any, lse: Any = None, delta: Any = None
    ) -> dict[str, jax.Array]:
        """What the kernels must know of rows, [N, R] each."""
        found = {"stop": self.per_row(stop[:, :, None], 0)}
        if self.static.ranged:
            found["first"] = self.per_row(first[:, :, None], 0)
        if slopes is not None:
            index = jnp.arange(self.T, dtype=jnp.int32) + offset
            found |= {"index": self.per_row(index[None, :, None], 0), "slope": self.per_row(slopes * LOG2E, 0.0)}
        if lse is not None:
            # Of a row that saw nothing too.
            lse = jnp.where(lse > SEEN, lse * LOG2E, NOTHING)
            found |= {"lse": self.per_row(lse, NOTHING), "delta": self.per_row(delta, 0.0)}
        return found

    def ranges(self, first: Any, stop: Any) -> tuple[jax.Array, jax.Array]:
        """[N, R] of both, where padding rows are like the last one, so that they cut no tile."""
        pad = ((0, 0), (0, self.R - self.T * self.G))
        first, stop = (self.per_row(x[:, :, None], 0)[:, : self.T * self.G] for x in (first, stop))
        return jnp.pad(first, pad, mode="edge"), jnp.pad(stop, pad, mode="edge")
