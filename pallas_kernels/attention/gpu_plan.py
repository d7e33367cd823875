"""Block sizes and order of work of the Hopper kernels, as values.

Heads are packed with tokens, as on TPUs: the query heads of one key/value head are rows of one tall matrix, q [B, T, H,
D] seen as [N, R, D] with N = B K sequences and R = T G rows, in place where K = 1. Two warpgroups of a block compute,
64 rows of a `wgmma` each; a third copies.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

ROWS = 64
"""Rows of a warpgroup's matrix products: the hardware's."""

COMPUTE = 2
"""Warpgroups of a block that compute. One more copies."""

MULTIPROCESSORS = 132
"""Of an H100 SXM or an H200: how many blocks can run at once."""

MASKED = -1e30
FLOOR = -1e29
"""No row's largest score goes below it, so that masked scores weigh nothing even where a row sees nothing."""

SEEN = -1e20
"""A log-sum-exp below it is that of a row which saw nothing."""

NOTHING = 1e30
"""The "lse" of such a row, and of a padding row, in the backward pass: every weight is exp2(score - it) = 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Tiles of `keys` keys and values in turn, `slots` of them in shared memory."""

    keys: int
    slots: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Tiles of `queries` rows of q and dO, `stages` pairs of them in shared memory, against a block's ROWS keys. On a
    GPU, queries is a multiple of 64.
    """

    queries: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Block sizes of the three kernels."""

    forward: Ring
    dq: Ring
    dkv: Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a kernel is made of, all static.

    width: head dimension, padded. ranged: whether some key may be too far back. interpret: whether the tiles' own
    operations are plain ones (`gpu_tile`).
    """

    width: int
    scale: float
    soft_cap: float | None
    alibi: bool
    ranged: bool
    interpret: bool

    @property
    def unit(self) -> float:
        """exp2(unit * z) is the weight of a score z as `gpu_tile.scores` returns it."""
        return self.scale * LOG2E if self.soft_cap is None and not self.alibi else 1.0


def key_bounds(first: jax.Array, stop: jax.Array, rows: int, tile: int, keys: int) -> jax.Array:
    """[low, full), [full, high), [high, end) of each block of `rows` rows, in tiles of keys: int32 [N, blocks, 4].

    first, stop: int32 [N, R], R a multiple of `rows`. All rows of a block see all of its tiles of the middle range; of
    the outer two, what they see is masked.
    """
    N, R = first.shape
    shape = (N, R // rows, rows)
    some = (first < stop).reshape(shape)
    low_first = jnp.min(jnp.where(some, first.reshape(shape), keys), axis=2)
    last_stop = jnp.max(jnp.where(some, stop.reshape(shape), 0), axis=2)
    end = (last_stop + tile - 1) // tile
    low = jnp.minimum(low_first // tile, end)
    full = jnp.clip((jnp.max(first.reshape(shape), axis=2) + tile - 1) // tile, low, end)
    high = jnp.clip(jnp.min(stop.reshape(shape), axis=2) // tile, full, end)
    return jnp.stack([low, full, high, end], axis=-1).astype(jnp.int32)


def row_bounds(first: jax.Array, stop: jax.Array, rows: int, tile: int, keys: int, parts: int) -> jax.Array:
    """`key_bounds` the other way round: of each block of `tile` keys, in tiles of `rows` rows: int32 [N, blocks, parts,
    4].

    Part p of `parts` takes the tiles p, p + parts, ...; its bounds count those.
    """
    N, R = first.shape
    shape = (N, 1, R // rows, rows)
    begin = (jnp.arange(keys // tile, dtype=jnp.int32) * tile)[None, :, None]
    some = (first < stop).reshape(shape)
    low, high = (f(jnp.where(some, x.reshape(shape), n), axis=3) for f, x, n in _extremes(first, stop, keys))
    seen = (low < begin + tile) & (high > begin)
    whole = (jnp.max(first.reshape(shape), axis=3) <= begin) & (jnp.min(stop.reshape(shape), axis=3) >= begin + tile)
    tiles = jnp.arange(R // rows, dtype=jnp.int32)
    least = jnp.min(jnp.where(seen, tiles, R // rows), axis=2)
    end = jnp.max(jnp.where(seen, tiles + 1, 0), axis=2)
    least = jnp.minimum(least, end)
    # The first run of tiles without a mask; any further one is masked for nothing.
    full = jnp.minimum(jnp.min(jnp.where(whole, tiles, R // rows), axis=2), end)
    high = jnp.min(jnp.where(~whole & (tiles >= full[..., None]), tiles, R // rows), axis=2)
    bounds = jnp.stack([least, full, jnp.clip(high, full, end), end], axis=-1)
    part = jnp.arange(parts, dtype=jnp.int32)[:, None]
    return jnp.maximum(bounds[:, :, None] - part + parts - 1, 0).astype(jnp.int32) // parts


def _extremes(first: jax.Array, stop: jax.Array, keys: int) -> list[tuple[Any, jax.Array, int]]:
    return [(jnp.min, first, keys), (jnp.max, stop, 0)]


def parts_of(blocks: int, tiles: int) -> int:
    """Into how many parts the rows are shared out so that `blocks` blocks of keys keep the whole chip at work, twice
    over; the sums of parts are added afterwards.
    """
    wanted = -(-2 * MULTIPROCESSORS // blocks)
    return max(1, min(wanted, tiles // 4))
