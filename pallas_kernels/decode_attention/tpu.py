"""Attention against a cache on TPUs through Mosaic: blocks of entries stream through VMEM once, and the softmax adds up
online. What it takes is the time to read what is filled: blocks that no query of a row sees are neither copied nor
computed, rows may be of any lengths, and a row's bits do not depend on the others.

A block is some entries with all their key/value heads, as they lie in memory: [keys, D], keys = entries x heads. All
query heads meet all of it, and a mask keeps each to its own: the matrix units load keys as slowly for few queries as
for many, and what is computed in vain hides behind the copies. Where rows do not share themselves out over a chip's
cores, each row's blocks are split among them and the parts merged by their log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import reference
from pallas_kernels.attention.masks import Mask
from pallas_kernels.attention.tpu_plan import LANES, LOG2E, dot

NAME = "palmjax_decode_attention"
SUBLANES = 16
"""Query rows are padded to whole tiles of bfloat16."""

MASKED, FLOOR = -1e30, -1e29
FIELDS = ("first", "stop", "index", "slope", "head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """rows: queries with all heads, padded. kv_heads, entries: of the cache. size: entries of a block. splits: parts of
    each row's blocks. paged: blocks are pages. filled: entries that all rows have, when no data says so; else None.
    """

    rows: int
    kv_heads: int
    entries: int
    size: int
    splits: int
    paged: bool
    alibi: bool
    scale: float
    soft_cap: float | None
    filled: int | None

    @property
    def keys(self) -> int:
        """Of a block."""
        return self.size * self.kv_heads

    def of_key(self, number: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Entry and head of a block's keys by their numbers, float32; no head where there is but one."""
        number = number.astype(jnp.float32)
        if self.kv_heads == 1:
            return number, None
        # A page keeps its heads apart. Floors of halves are exact: no vector unit divides whole numbers.
        inner = self.size if self.paged else self.kv_heads
        outer = jnp.floor((number + 0.5) * (1.0 / inner))
        within = number - outer * inner
        return (within, outer) if self.paged else (outer, within)

    @property
    def blocks(self) -> int:
        return -(-self.entries // self.size)

    @property
    def steps(self) -> int:
        return -(-self.blocks // self.splits)

    def run(self, table: Any, sequence: Any, split: Any) -> tuple[Any, Any]:
        """(begin, end) of a split's blocks. table: of `_table`."""
        if self.filled is not None:
            blocks = -(-self.filled // self.size)
            return split * blocks // self.splits, (split + 1) * blocks // self.splits
        begin, end = (table[self._at(sequence) + n] for n in range(2))
        count = end - begin
        return begin + split * count // self.splits, begin + (split + 1) * count // self.splits

    def edges(self, table: Any, sequence: Any) -> tuple[Any, Any, Any]:
        """(largest first, smallest stop, largest stop) of a sequence's queries."""
        if self.filled is not None:
            return 0, self.filled, self.filled
        at = self._at(sequence)
        return table[at + 2], table[at + 3], table[at + 4]

    def _at(self, sequence: Any) -> Any:
        return 1 + 5 * sequence


def _table(plan: _Plan, layer: Any, first: jax.Array, stop: jax.Array) -> jax.Array:
    """The layer, then of each row: first block, the one behind the last, largest first, smallest and largest stop."""
    some = first < stop
    low = jnp.min(jnp.where(some, first, plan.entries), axis=1) // plan.size
    most = jnp.max(jnp.where(some, stop, 0), axis=1)
    end = (most + plan.size - 1) // plan.size
    columns = jnp.stack([jnp.minimum(low, end), end, jnp.max(first, axis=1), jnp.min(stop, axis=1), most], axis=1)
    return jnp.concatenate([jnp.asarray(layer, jnp.int32)[None], columns.astype(jnp.int32).reshape(-1)])


def _kernel(plan: _Plan, table_ref: Any, *refs: Any) -> None:
    if plan.paged:
        refs = refs[1:]
    fields_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, top_ref, total_ref, sum_ref = refs
    sequence, split, step = (pl.program_id(axis) for axis in range(3))
    begin, end = plan.run(table_ref, sequence, split)
    after, before, behind = plan.edges(table_ref, sequence)
    start = (begin + step) * plan.size

    @pl.when(step == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def block(edge: bool) -> None:
        k, v = (ref[...].reshape(plan.keys, ref.shape[-1]) for ref in (k_ref, v_ref))
        z = dot(q_ref[0], k, (1, 1)) * plan.scale
        if plan.soft_cap is not None:
            z = plan.soft_cap * jnp.tanh(z / plan.soft_cap)
        entry, head = plan.of_key(jax.lax.broadcasted_iota(jnp.int32, (1, plan.keys), 1))
        entry = entry + start.astype(jnp.float32)
        fields = {name: fields_ref[0, :, n : n + 1] for n, name in enumerate(FIELDS)}
        if plan.alibi:
            z = z - fields["slope"] * jnp.abs(fields["index"] - entry)
        if head is not None:
            z = jnp.where(head == fields["head"], z, MASKED)
        if edge:
            z = jnp.where((entry >= fields["first"]) & (entry < fields["stop"]), z, MASKED)
            # What nobody has written may be NaN, which no zero weight takes away.
            entry, _ = plan.of_key(jax.lax.broadcasted_iota(jnp.int32, (plan.keys, 1), 0))
            v = jnp.where(entry + start.astype(jnp.float32) < behind, v, jnp.zeros_like(v))
        top = jnp.maximum(top_ref[...], jnp.max(z, axis=1, keepdims=True))
        weights = jnp.exp2((z - top[:, :1]) * LOG2E)
        keep = jnp.exp2((top_ref[...] - top) * LOG2E)
        total_ref[...] = total_ref[...] * keep + jnp.sum(weights, axis=1, keepdims=True)
        sum_ref[...] = sum_ref[...] * keep[:, :1] + dot(weights.astype(v.dtype), v, (1, 0))
        top_ref[...] = top

    mine = begin + step < end
    whole = (start >= after) & (start + plan.size <= before)
    pl.when(mine & whole)(functools.partial(block, False))
    pl.when(mine & jnp.logical_not(whole))(functools.partial(block, True))

    @pl.when(step == plan.steps - 1)
    def _() -> None:
        total = total_ref[...]
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        out_ref[0, 0] = (sum_ref[...] / total[:, :1]).astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(empty, reference.EMPTY, top_ref[...] + jnp.log(total))


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    layer: jax.Array | int,
    *,
    mask: Mask,
    scale: float,
    size: int,
    cores: int = 1,
    prefix: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    pages: jax.Array | None = None,
    filled: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Arguments and result as in `api.decode_attention`; not differentiable.

    size: entries of a block; of a paged cache a page is one. cores: of the chip. filled: what every row's cache has, if
    that is known when the program is built (a yardstick's case); else None.
    """
    B, Q, H, D = q.shape
    K = k.shape[3] if pages is None else k.shape[2]
    entries = k.shape[2] if pages is None else k.shape[3] * pages.shape[1]
    plan = _Plan(
        rows=-(-Q * H // SUBLANES) * SUBLANES,
        kv_heads=K,
        entries=entries,
        size=min(max(size // K, SUBLANES), entries) if pages is None else k.shape[3],
        splits=cores if B % cores else 1,
        paged=pages is not None,
        alibi=alibi_slopes is not None,
        scale=scale,
        soft_cap=soft_cap,
        filled=filled,
    )
    first, stop = seen_range(mask, positions, entries, prefix)
    slopes = jnp.zeros((H,)) if alibi_slopes is None else alibi_slopes
    of_queries = (x[:, :, None] for x in (first, stop, positions))
    fields = jnp.stack(
        [jnp.broadcast_to(x, (B, Q, H)).astype(jnp.float32) for x in (*of_queries, slopes, jnp.arange(H) // (H // K))],
        -1,
    )
    fields, q = (_to_rows(x, plan.rows) for x in (fields, q))
    out, lse = _call(plan, _table(plan, layer, first, stop), pages, fields, q, k, v, interpret)
    if plan.splits > 1:
        share = jax.nn.softmax(lse[..., :1], axis=1)
        out = jnp.sum(share * out, axis=1, keepdims=True)
    return out[:, 0, : Q * H].reshape(B, Q, H, D).astype(q.dtype)


def seen_range(mask: Mask, positions: jax.Array, entries: int, prefix: jax.Array | None) -> tuple[Any, Any]:
    """(first, stop), int32 [B, Q] each: the entries that `reference.seen_entries` lets see."""
    first = jnp.zeros_like(positions) if mask.window is None else jnp.maximum(positions - mask.window + 1, 0)
    stop = positions + 1 if mask.causal else jnp.full_like(positions, entries)
    if prefix is not None:
        stop = jnp.maximum(stop, prefix[:, None])
    return first, jnp.clip(stop, 0, entries)


def _to_rows(x: jax.Array, rows: int) -> jax.Array:
    """[B, Q, H, n] to [B, rows, n]; padding rows see nothing."""
    B, Q, H, n = x.shape
    return jnp.pad(x.reshape(B, Q * H, n), ((0, 0), (0, rows - Q * H), (0, 0)))


def _call(
    plan: _Plan, table: Any, pages: Any, fields: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Float32 (out [B, splits, rows, D], lse [B, splits, rows, LANES])."""
    B, rows, D = q.shape
    K = plan.kv_heads

    def block_of(n: Any, split: Any, step: Any, table: Any) -> Any:
        begin, end = plan.run(table, n, split)
        # A block that is already there is not copied again.
        return jnp.maximum(jnp.minimum(begin + step, end - 1), 0)

    def at(n: Any, split: Any, step: Any, table: Any, *pages: Any) -> tuple[Any, ...]:
        block = block_of(n, split, step, table)
        if plan.paged:
            return table[0], pages[0][n * plan.blocks + block], 0, 0, 0
        return table[0], n, block, 0

    if plan.paged:
        of_cache = pl.BlockSpec((1, 1, K, plan.size, D), at)
    else:
        # In place: heads fill whole tiles, or there is one.
        of_cache = pl.BlockSpec((1, 1, plan.keys, D), at)
        k, v = (x.reshape(*x.shape[:2], -1, D) for x in (k, v))
    whole = [pl.BlockSpec((1, rows, width), lambda n, *_: (n, 0, 0)) for width in (len(FIELDS), D)]
    outs = [pl.BlockSpec((1, 1, rows, width), lambda n, split, *_: (n, split, 0, 0)) for width in (D, LANES)]
    given = (table,) if pages is None else (table, pages.astype(jnp.int32).reshape(-1))
    read = 2 * B * (plan.filled or plan.entries) * K * D * k.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(given),
            grid=(B, plan.splits, plan.steps),
            in_specs=[*whole, of_cache, of_cache],
            out_specs=outs,
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, D)],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, plan.splits, rows, width), jnp.float32) for width in (D, LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * rows * plan.entries * K * D, transcendentals=B * rows * plan.entries * K, bytes_accessed=read
        ),
        interpret=interpret,
        name=NAME,
    )(*given, fields, q, k, v)
