"""Attention on TPUs through Mosaic: layout, padding, the gradient, and keys that do not all fit in VMEM.

Heads are packed with tokens: with one key/value head, q [B, T, H, D] is [B, T H, D] in place, and a block of tokens
with all heads is one contiguous copy and one tall matrix against the keys. More key/value heads are more sequences.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import merge, tpu_backward, tpu_forward
from pallas_kernels.attention.masks import Mask
from pallas_kernels.attention.tpu_plan import CHUNK, LANES, LOG2E, Blocks, Plan, bounds_table

NOTHING = 1e30
"""The "lse" of a padding row: every weight is exp2(score - it) = 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Block sizes of both passes; the most keys that a pass holds in VMEM (more are taken one part after the other)."""

    forward: Blocks
    backward: Blocks
    forward_keys: int
    backward_keys: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What is no array, of `attention`'s arguments. signed: whether ALiBi's distances may be negative."""

    mask: Mask | None
    reach: Mask
    scale: float
    soft_cap: float | None
    signed: bool
    tuning: Tuning
    interpret: Any


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    mask: Mask | None,
    reach: Mask | None = None,
    scale: float,
    tuning: Tuning,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    offset: jax.Array | int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, H, D], lse [B, T, H]); query i sees keys first[i] <= j < stop[i], int32 [B, T] each.

    mask: when the ranges are no more than `masks.fixed_ranges(mask, T)`, so that bounds need no data; else None.
    reach: a mask that the ranges stay within, if one is known: keys that are taken in parts then meet only the queries
    that may see them.
    offset: place of query 0 among the keys, for ALiBi. interpret: of `pallas_call`; False compiles for a TPU.
    """
    signed = alibi_slopes is not None and (mask is None or not mask.causal)
    static = Static(
        mask=mask,
        reach=mask or reach or Mask(causal=False),
        scale=scale,
        soft_cap=soft_cap,
        signed=signed,
        tuning=tuning,
        interpret=_hashable(interpret),
    )
    return _attention(static, q, k, v, first, stop, alibi_slopes, jnp.asarray(offset, jnp.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class _ByIdentity:
    value: Any


def _hashable(interpret: Any) -> Any:
    return interpret if isinstance(interpret, bool) else _ByIdentity(interpret)


def _given(interpret: Any) -> Any:
    return interpret.value if isinstance(interpret, _ByIdentity) else interpret


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    return _forward(static, q, k, v, first, stop, slopes, offset)


def _attention_fwd(static: Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    out, lse = merge.kept(_forward(static, q, k, v, first, stop, slopes, offset))
    return (out, lse), (q, k, v, first, stop, slopes, offset, out, lse)


@dataclasses.dataclass(frozen=True)
class Part:
    """The keys [begin, end), held at a time, and the queries [low, high) that may see some of them.

    mask: of these queries and keys, counted from the first of each; None when ranges are data.
    """

    begin: int
    end: int
    low: int
    high: int
    mask: Mask | None

    @property
    def keys(self) -> slice:
        return slice(self.begin, self.end)

    @property
    def queries(self) -> slice:
        return slice(self.low, self.high)

    def bounds(self, first: Any, stop: Any) -> tuple[Any, Any]:
        """Of ranges [B, T] those of these queries, counted from the first of these keys."""
        begin, end = (jnp.clip(x[:, self.queries] - self.begin, 0, self.end - self.begin) for x in (first, stop))
        return begin, end


def parts(mask: Mask | None, reach: Mask, limit: int, queries: int, keys: int) -> list[Part]:
    """`queries` against `keys` of which at most `limit` are held at a time. mask, reach: as in `attention`."""
    if keys <= limit:
        return [Part(0, keys, 0, queries, mask)]
    found = []
    for begin in range(0, keys, limit):
        end = min(begin + limit, keys)
        low = begin if reach.causal else 0
        high = queries if reach.window is None else min(queries, end + reach.window - 1)
        # Where the first query is the first key's own, they see each other as whole rows do.
        found.append(Part(begin, end, low, high, mask if mask is not None and mask.causal else None))
    return found


def _forward(static: Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any) -> Any:
    pieces = parts(static.mask, static.reach, static.tuning.forward_keys, q.shape[1], k.shape[1])
    if len(pieces) == 1:
        return _forward_part(static, q, k, v, first, stop, slopes, offset, q.dtype)
    found = merge.nothing(q)
    for part in pieces:
        some = dataclasses.replace(static, mask=part.mask)
        ahead = offset + (part.low - part.begin)
        mine, keys, values = q[:, part.queries], k[:, part.keys], v[:, part.keys]
        of_mine = part.bounds(first, stop)
        new = _forward_part(some, mine, keys, values, *of_mine, slopes, ahead, jnp.float32)
        found = merge.merge_into(found, part.low, new)
    return found[0].astype(q.dtype), found[1]


def _forward_part(
    static: Static, q: Any, k: Any, v: Any, first: Any, stop: Any, slopes: Any, offset: Any, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    pack = Packing(q, k, static, static.tuning.forward)
    plan = pack.plan(fields_of(static, slopes))
    table = bounds_table(plan, *pack.per_sequence(first, stop)) if plan.mask is None else None
    fields = pack.fields(plan.fields, first, stop, slopes, offset)
    out, lse = tpu_forward.forward(
        plan,
        table,
        jnp.stack(fields, axis=1) if fields else None,
        pack.rows(q),
        pack.keys(k),
        pack.keys(v),
        out_dtype=dtype,
        vmem_mib=static.tuning.forward.vmem_mib,
        interpret=_given(static.interpret),
    )
    return pack.from_rows(out), pack.from_lanes(lse[:, 0])


def _attention_bwd(static: Static, kept: Any, cotangents: Any) -> Any:
    q, k, v, first, stop, slopes, offset, out, lse = kept
    do, dlse = cotangents
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse
    pieces = parts(static.mask, static.reach, static.tuning.backward_keys, q.shape[1], k.shape[1])
    if len(pieces) == 1:
        dq, dk, dv = _backward_part(static, q, k, v, first, stop, slopes, offset, do, lse, delta, q.dtype)
        return dq, dk.astype(k.dtype), dv.astype(k.dtype), None, None, None, None
    dq, dks, dvs = jnp.zeros(q.shape, jnp.float32), [], []
    for part in pieces:
        some = dataclasses.replace(static, mask=part.mask)
        ahead = offset + (part.low - part.begin)
        mine, do_mine, lse_mine, delta_mine = (x[:, part.queries] for x in (q, do, lse, delta))
        keys, values = k[:, part.keys], v[:, part.keys]
        bounds = part.bounds(first, stop)
        new, dk, dv = _backward_part(
            some, mine, keys, values, *bounds, slopes, ahead, do_mine, lse_mine, delta_mine, jnp.float32
        )
        dq = jax.lax.dynamic_update_slice_in_dim(dq, dq[:, part.queries] + new, part.low, 1)
        dks.append(dk)
        dvs.append(dv)
    dk, dv = (jnp.concatenate(x, axis=1).astype(k.dtype) for x in (dks, dvs))
    return dq.astype(q.dtype), dk, dv, None, None, None, None


def _backward_part(
    static: Static,
    q: Any,
    k: Any,
    v: Any,
    first: Any,
    stop: Any,
    slopes: Any,
    offset: Any,
    do: Any,
    lse: Any,
    delta: Any,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    pack = Packing(q, k, static, static.tuning.backward, by_core=True)
    plan = pack.plan((*fields_of(static, slopes), "lse", "delta"))
    table = bounds_table(plan, *pack.per_sequence(first, stop)) if plan.mask is None else None
    fields = pack.fields(plan.fields[:-2], first, stop, slopes, offset)
    fields += [pack.lanes(lse * LOG2E, NOTHING), pack.lanes(delta, 0.0)]
    dq, dk, dv = tpu_backward.backward(
        plan,
        table,
        jnp.stack(fields, axis=1),
        pack.rows(q),
        pack.rows(do.astype(q.dtype)),
        pack.keys(k),
        pack.keys(v),
        dq_dtype=dtype,
        vmem_mib=static.tuning.backward.vmem_mib,
        interpret=_given(static.interpret),
    )
    return pack.from_rows(dq), pack.from_keys(dk), pack.from_keys(dv)


_attention.defvjp(_attention_fwd, _attention_bwd)


def fields_of(static: Static, slopes: Any) -> tuple[str, ...]:
    """Names of the per-row numbers that a forward pass is handed."""
    # What a mask alone decides, a kernel knows from its indices.
    bounds = ("stop", "first") if static.mask is None else ()
    return (*bounds, *(("index", "slope") if slopes is not None else ()))


class Packing:
    """[B, T, H, D] and [B, S, K, D] to the kernels' [N, R, D] and [N, S, D] and back; N = B K, R = T H / K, padded."""

    def __init__(self, q: jax.Array, k: jax.Array, static: Static, blocks: Blocks, by_core: bool = False):
        self.B, self.T, self.H, self.D = q.shape
        self.S, self.K = k.shape[1:3]
        self.G = self.H // self.K
        self.static = static
        self.largest = blocks.keys
        # An even number of sequences is shared out whole; the queries of an odd one are.
        self.cores = blocks.cores if by_core and self.B * self.K % blocks.cores else 1
        tokens = blocks.tokens(self.G)
        self.tokens = min(tokens, -(-self.T // (step := blocks.smallest(self.G))) * step)

    def plan(self, fields: tuple[str, ...]) -> Plan:
        self._plan = Plan(
            length=self.T,
            keys=-(-self.S // CHUNK) * CHUNK,
            heads=self.G,
            tokens=self.tokens,
            largest=self.largest,
            cores=self.cores,
            mask=self.static.mask,
            fields=fields,
            scale=self.static.scale,
            soft_cap=self.static.soft_cap,
            signed=self.static.signed,
        )
        return self._plan

    @property
    def padded(self) -> int:
        return self._plan.blocks * self._plan.tokens

    def rows(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, self.padded - self.T), (0, 0), (0, -self.D % LANES)))
        if self.K > 1:
            x = jnp.swapaxes(x.reshape(self.B, self.padded, self.K, self.G, x.shape[3]), 1, 2)
        return x.reshape(self.B * self.K, self.padded * self.G, x.shape[-1])

    def from_rows(self, x: jax.Array) -> jax.Array:
        if self.K > 1:
            x = jnp.swapaxes(x.reshape(self.B, self.K, self.padded, self.G, x.shape[2]), 1, 2)
        return x.reshape(self.B, self.padded, self.H, x.shape[-1])[:, : self.T, :, : self.D]

    def keys(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, self._plan.keys - self.S), (0, 0), (0, -self.D % LANES)))
        return jnp.swapaxes(x, 1, 2).reshape(self.B * self.K, self._plan.keys, x.shape[3])

    def from_keys(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.B, self.K, self._plan.keys, x.shape[2])[:, :, : self.S, : self.D]
        return jnp.swapaxes(x, 1, 2)

    def lanes(self, x: jax.Array, filler: float) -> jax.Array:
        """[B, T, H] to [N, R]."""
        x = jnp.pad(x, ((0, 0), (0, self.padded - self.T), (0, 0)), constant_values=filler)
        x = jnp.swapaxes(x.reshape(self.B, self.padded, self.K, self.G), 1, 2)
        return x.reshape(self.B * self.K, self.padded * self.G)

    def from_lanes(self, x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(self.B, self.K, self.padded, self.G), 1, 2)
        return x.reshape(self.B, self.padded, self.H)[:, : self.T]

    def per_sequence(self, *ranges: jax.Array) -> list[jax.Array]:
        return [jnp.repeat(x, self.K, axis=0) for x in ranges]

    def fields(
        self, names: tuple[str, ...], first: jax.Array, stop: jax.Array, slopes: jax.Array | None, offset: jax.Array
    ) -> list[jax.Array]:
        """Each float32 [N, R]; padding rows see nothing."""
        shape = (self.B, self.T, self.H)
        index = jnp.arange(self.T)[None, :, None] + offset
        values: dict[str, Any] = {"stop": stop[:, :, None], "first": first[:, :, None], "index": index}
        if slopes is not None:
            values["slope"] = slopes * LOG2E
        return [self.lanes(jnp.broadcast_to(values[name].astype(jnp.float32), shape), 0.0) for name in names]
