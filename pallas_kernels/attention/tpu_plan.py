"""How the TPU kernels cut attention up: values only, shared by the forward and the backward pass.

A block is `tokens` queries with all query heads of one key/value head, `rows` = tokens x heads of them, against keys in
chunks of CHUNK. What a block sees is a run of chunks: some masked, some whole, some masked.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.masks import Mask

CHUNK = 128
"""Keys of a masked tile, and the unit of bounds. A lane tile: no smaller one would be any faster."""

LANES = 128
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block sizes of one pass, from the tuned table.

    rows: query rows wanted in a block, tokens x heads. keys: of the largest unmasked tile, a power of two of CHUNKs.
    vmem_mib: the limit handed to the compiler; None is its own. cores: that share one device's memory (TPU v4 and v5p
    have two); a backward pass of one sequence gives each half of the queries.
    """

    rows: int
    keys: int
    vmem_mib: int | None = None
    cores: int = 1

    def __post_init__(self) -> None:
        if self.keys < CHUNK or self.keys & (self.keys - 1):
            raise ValueError(f"Blocks.keys = {self.keys}: must be a power of two, {CHUNK} or more")

    def tokens(self, heads: int) -> int:
        """Tokens of a block: a power of two, so that no block is cut by a chunk's edge, whose rows fill whole lane
        tiles and are at most `rows`, if that allows.
        """
        step = self.smallest(heads)
        return step << (max(1, self.rows // (step * heads)).bit_length() - 1)

    @staticmethod
    def smallest(heads: int) -> int:
        """The fewest tokens whose rows fill whole lane tiles."""
        return LANES // math.gcd(heads, LANES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One pass over N sequences of `length` queries against `keys` keys (padded), all static.

    mask: what the queries of a whole row see, when nothing but it says so; None when ranges are data.
    fields: names of the per-row numbers that are handed over, in their order.
    """

    length: int
    keys: int
    heads: int
    tokens: int
    largest: int
    cores: int
    mask: Mask | None
    fields: tuple[str, ...]
    scale: float
    soft_cap: float | None
    signed: bool

    @property
    def rows(self) -> int:
        """Query rows of a block."""
        return self.tokens * self.heads

    @property
    def blocks(self) -> int:
        """Query blocks of a sequence; a multiple of `cores`."""
        return -(-self.length // (self.tokens * self.cores)) * self.cores

    @property
    def tile(self) -> int:
        """Keys of a whole tile."""
        return min(self.largest, 1 << (self.keys.bit_length() - 1))

    @property
    def unit(self) -> float:
        """exp2(unit * z) is the weight of a score z as `scores` returns it."""
        return self.scale * LOG2E if self.soft_cap is None and "slope" not in self.fields else 1.0

    @property
    def from_below(self) -> bool:
        """Whether a key may be too far back."""
        return "first" in self.fields if self.mask is None else self.mask.window is not None

    @property
    def one_chunk_of_diagonal(self) -> bool:
        """Whether only one chunk a block is cut from above, so that the first tile is all of it."""
        if self.mask is None:
            return False
        return not self.mask.causal or CHUNK % self.tokens == 0

    def flops(self, products: int, width: int, sequences: int = 1) -> int:
        """Of `products` matrix products over the pairs that the mask leaves; data's masks count as causal."""
        mask = Mask() if self.mask is None else self.mask
        keys = min(self.length, self.keys)
        back = self.length if mask.window is None else min(mask.window, self.length)
        # Keys that as many queries see as the window is long, then those near the end, seen by all queries behind them.
        whole = min(self.length - back + 1, keys)
        pairs = whole * back + (keys - whole) * (2 * self.length - whole - keys + 1) // 2
        if not mask.causal:
            pairs += self.length * (self.keys - 1) // 2
        return 2 * products * sequences * self.heads * pairs * width

    def bounds(self, block: Any, table: Any = None, sequence: Any = 0) -> tuple[Any, Any, Any, Any]:
        """(low, full, high, end) of a block in chunks: [low, full) and [high, end) are masked, [full, high) is not."""
        if self.mask is None:
            at = (sequence * self.blocks + block) * 4
            return table[at], table[at + 1], table[at + 2], table[at + 3]
        begin = block * self.tokens
        last = jnp.minimum(begin + self.tokens, self.length) - 1
        stops = (begin + 1, last + 1) if self.mask.causal else (self.length, self.length)
        firsts: tuple[Any, Any] = (0, 0)
        if self.mask.window is not None:
            back = self.mask.window - 1
            firsts = (jnp.maximum(begin - back, 0), jnp.maximum(last - back, 0))
        return chunk_bounds(*firsts, *stops, self.keys)


def chunk_bounds(first_min: Any, first_max: Any, stop_min: Any, stop_max: Any, keys: int) -> tuple[Any, Any, Any, Any]:
    """`Plan.bounds` from the extremes of a block's ranges. There is always a last chunk: end > high."""
    shift = CHUNK.bit_length() - 1
    end = jnp.clip((stop_max + CHUNK - 1) >> shift, 1, keys // CHUNK)
    low = jnp.minimum(first_min >> shift, end - 1)
    full = jnp.minimum((first_max + CHUNK - 1) >> shift, end - 1)
    high = jnp.clip(stop_min >> shift, full, end - 1)
    return low, full, high, end


def bounds_table(plan: Plan, first: jax.Array, stop: jax.Array) -> jax.Array:
    """`Plan.bounds` of every block of ranges [N, T] that are data: int32 [N * blocks * 4]."""
    pad = plan.blocks * plan.tokens - plan.length

    def by_block(x: jax.Array, neutral: int) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, pad)), constant_values=neutral)
        return padded.reshape(x.shape[0], plan.blocks, plan.tokens)

    most = plan.keys
    low, full, high, end = chunk_bounds(
        jnp.min(by_block(first, most), axis=2),
        jnp.max(by_block(first, 0), axis=2),
        jnp.min(by_block(stop, most), axis=2),
        jnp.max(by_block(stop, 0), axis=2),
        plan.keys,
    )
    return jnp.stack([low, full, high, end], axis=-1).astype(jnp.int32).reshape(-1)


def for_each_tile(plan: Plan, bounds: tuple[Any, Any, Any, Any], tile: Any) -> None:
    """Calls tile(start, size, masked, first) for what a block sees; masked: how many of its last keys are.

    The tile with `first` comes before all others. It has the last chunk and as many before it as make the rest whole
    tiles of the largest size: small tiles cost nearly what large ones do, so there is never more than one.
    """
    from jax.experimental import pallas as pl

    low, full, high, end = bounds
    shift = CHUNK.bit_length() - 1
    most, largest = plan.tile // CHUNK, plan.tile
    steps = most.bit_length() - 1
    rest = (end - 1 - full) & (most - 1)

    def at(chunk: Any) -> Any:
        return pl.multiple_of(chunk << shift, CHUNK)

    for more in range(most):

        @pl.when(rest == more)
        def _(more: int = more) -> None:
            size = (more + 1) * CHUNK
            tile(at(end - 1 - more), size, CHUNK if plan.one_chunk_of_diagonal else size, True)

    if plan.keys == CHUNK:
        return

    def masked_chunk(index: Any, carry: None) -> None:
        tile(at(index), CHUNK, CHUNK, False)

    def masked_tile(index: Any, carry: None) -> None:
        tile(at(full + (index << steps)), largest, largest, False)

    def whole_tile(index: Any, carry: None) -> None:
        tile(at(full + (index << steps)), largest, 0, False)

    if plan.from_below:
        jax.lax.fori_loop(low, full, masked_chunk, None)
    count = (end - 1 - rest - full) >> steps
    whole = count
    if not plan.one_chunk_of_diagonal:
        whole = jnp.minimum((high - full) >> steps, count)
        jax.lax.fori_loop(whole, count, masked_tile, None)
    jax.lax.fori_loop(0, whole, whole_tile, None)


def split(plan: Plan, refs: tuple[Any, ...]) -> tuple[Any, Any, tuple[Any, ...]]:
    """A kernel's refs as (table or None, fields or None, the rest): no operand is handed over that nobody reads."""
    table, refs = (refs[0], refs[1:]) if plan.mask is None else (None, refs)
    fields, refs = (refs[0], refs[1:]) if plan.fields else (None, refs)
    return table, fields, refs


def columns(plan: Plan, fields_ref: Any, columns_ref: Any) -> None:
    """Per-row numbers from lanes [1, F, rows] to columns [F, rows, LANES], each lane the same."""
    for index in range(len(plan.fields)):
        for begin in range(0, plan.rows, LANES):
            part = fields_ref[0, index : index + 1, begin : begin + LANES]
            columns_ref[index, begin : begin + LANES] = jnp.broadcast_to(part, (LANES, LANES)).T


def column(plan: Plan, columns_ref: Any, name: str, size: int) -> jax.Array:
    """The field `name` of each row, [rows, size]."""
    return jnp.tile(columns_ref[plan.fields.index(name)], (1, size // LANES))


def scores(
    plan: Plan, q: jax.Array, k: jax.Array, block: Any, start: Any, masked: int, columns_ref: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Scores z of a tile [rows, size] (a weight is exp2(unit z)), where the last `masked` keys are seen [rows, masked]
    (None: all are), and the tanh of the soft-cap.
    """
    size = k.shape[0]
    z = dot(q, k, (1, 1))
    key = (start + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)).astype(jnp.float32)
    tanh = None
    if plan.soft_cap is not None:
        tanh = jnp.tanh(z * (plan.scale / plan.soft_cap))
        z = tanh * (plan.soft_cap * LOG2E)
    elif "slope" in plan.fields:
        z = z * (plan.scale * LOG2E)
    if "slope" in plan.fields:
        back = column(plan, columns_ref, "index", size) - key
        z = z - column(plan, columns_ref, "slope", size) * (jnp.abs(back) if plan.signed else back)
    if not masked:
        return z, None, tanh
    if plan.mask is not None:
        return z, _seen_by_mask(plan, block, start + size - masked, masked), tanh
    key = key[:, size - masked :]
    seen = key < column(plan, columns_ref, "stop", masked)
    if plan.from_below:
        seen = seen & (key >= column(plan, columns_ref, "first", masked))
    return z, seen, tanh


def where_seen(seen: jax.Array | None, x: jax.Array, filler: float) -> jax.Array:
    """`x` [rows, size] with `filler` where the last keys are not seen."""
    if seen is None:
        return x
    whole = x.shape[1] - seen.shape[1]
    last = jnp.where(seen, x[:, whole:], filler)
    return jnp.concatenate([x[:, :whole], last], axis=1) if whole else last


def _seen_by_mask(plan: Plan, block: Any, start: Any, size: int) -> jax.Array:
    """What a mask that no data changes shows of a tile, by its indices alone: bool [rows, size].

    Row r of a block is its token r // heads; a key is at most that token where heads * key <= r, without a division.
    """
    mask, heads = plan.mask, plan.heads
    assert mask is not None
    shape = (plan.rows, size)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    ahead = start - block * plan.tokens
    seen = key * heads <= row - ahead * heads if mask.causal else key < plan.length - start
    if mask.window is not None:
        seen = seen & ((key + mask.window) * heads > row - ahead * heads)
    return seen


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Float32 product of matrices; float32 operands are multiplied as such."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
