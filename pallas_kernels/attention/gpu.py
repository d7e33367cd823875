"""Attention on Hopper through Mosaic GPU: layout, padding and the gradient."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_backward, gpu_forward, gpu_tile, merge
from pallas_kernels.attention.gpu_plan import COMPUTE, ROWS, Plan, Tuning, key_bounds, parts_of, row_bounds
from pallas_kernels.attention.gpu_rows import Rows


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
        interpret=gpu_tile.interpreter(interpret),
    )
    return _attention(static, q, k, v, first, stop, alibi_slopes, jnp.asarray(offset, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    return _forward(static, q, k, v, first, stop, slopes, offset)


def _attention_fwd(static: _Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    out, lse = merge.kept(_forward(static, q, k, v, first, stop, slopes, offset))
    return (out, lse), (q, k, v, first, stop, slopes, offset, out, lse)


def _forward(static: _Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    ring = static.tuning.forward
    pack = _Packing(q, k, static, COMPUTE * ROWS, ring.keys)
    numbers = pack.of_rows(first, stop, slopes, offset)
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
    given = pack.operands(table, q, do, k, v, first, stop, *rest)
    return pack.from_rows(gpu_backward.dq(pack.plan, ring, given, interpret=static.interpret))


def _dkv(static: _Static, q: Any, do: Any, k: Any, v: Any, first: Any, stop: Any, *rest: Any) -> tuple[jax.Array, ...]:
    stream = static.tuning.dkv
    pack = _Packing(q, k, static, stream.queries, ROWS)
    parts = parts_of(pack.N * pack.padded_keys // ROWS, pack.R // stream.queries)
    table = row_bounds(*pack.ranges(first, stop), stream.queries, ROWS, pack.padded_keys, parts)
    given = pack.operands(table, q, do, k, v, first, stop, *rest)
    found = gpu_backward.dkv(pack.plan, stream, given, interpret=static.interpret)
    return tuple(pack.from_keys(jnp.sum(x, axis=1) if parts > 1 else x[:, 0]).astype(k.dtype) for x in found)


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Packing(Rows):
    """`Rows` in whole blocks of `rows`, and keys and values [B, S, K, D] as [N, S, D] in whole tiles."""

    def __init__(self, q: jax.Array, k: jax.Array, static: _Static, rows: int, tile: int):
        width = next(size for size in (64, 128, 256) if size >= q.shape[3])
        super().__init__(q.shape, k.shape[2], rows, width)
        self.S = k.shape[1]
        self.padded_keys = -(-self.S // tile) * tile
        self.ranged = static.ranged
        self.block = rows
        self.plan = Plan(
            width=width,
            scale=static.scale,
            soft_cap=static.soft_cap,
            alibi=static.alibi,
            ranged=static.ranged,
            interpret=bool(static.interpret),
        )

    def keys(self, x: jax.Array) -> jax.Array:
        """[B, S, K, D] to [N, S, D]."""
        x = jnp.swapaxes(x, 1, 2).reshape(self.N, self.S, self.D)
        return jnp.pad(x, ((0, 0), (0, self.padded_keys - self.S), (0, self.width - self.D)))

    def from_keys(self, x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x[:, : self.S, : self.D].reshape(self.B, self.K, self.S, self.D), 1, 2)

    def of_rows(self, first: Any, stop: Any, slopes: Any, offset: Any, *kept: Any) -> dict[str, jax.Array]:
        """`numbers` of whole rows, whose query 0 is key `offset`."""
        index = (jnp.arange(self.T, dtype=jnp.int32) + offset)[None]
        return self.numbers(first if self.ranged else None, stop, index, slopes, *kept)

    def operands(self, table: jax.Array, q: Any, do: Any, k: Any, v: Any, *of_rows: Any) -> gpu_backward.Operands:
        """What both kernels of the backward pass take."""
        numbers = self.of_rows(*of_rows)
        return gpu_backward.Operands(table, numbers, self.rows(q), self.rows(do), self.keys(k), self.keys(v))
