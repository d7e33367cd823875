"""How attention against a cache is shared out over a Hopper chip, as values."""

from __future__ import annotations

import dataclasses

from pallas_kernels.attention.gpu_plan import COMPUTE, MULTIPROCESSORS, ROWS

EIGHT = 8
"""Rows that copies take at a time: caches, queries and results have whole eights of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """keys: of a tile. stages: tiles of keys, and as many of values, in shared memory for each computing warpgroup.
    rounds: parts that each of `blocks` blocks is to have where all caches are full; more of them share out better what
    is filled unevenly, fewer write less.
    """

    keys: int
    stages: int
    rounds: int
    blocks: int = MULTIPROCESSORS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is shared out over `blocks` blocks, all static.

    sequences: rows of the batch times key/value heads. kv_heads, entries: of a row's cache. row_blocks: of ROWS query
    rows, of which `rows` are read and written. tile: keys of a tile. stages: tiles of keys, and as many of values, in
    shared memory for each computing warpgroup. part: tiles of a part; parts: of the whole cache. page: entries of a
    page where the cache is paged, which divide a tile or are divided by it. pages: in the cache.
    """

    sequences: int
    kv_heads: int
    entries: int
    row_blocks: int
    rows: int
    tile: int
    stages: int
    part: int
    parts: int
    page: int | None
    pages: int
    blocks: int

    @property
    def items(self) -> int:
        """Parts of all sequences and blocks of query rows."""
        return self.parts * self.sequences * self.row_blocks

    @property
    def pieces(self) -> int:
        """Copies that make a tile."""
        return 1 if self.page is None else max(1, self.tile // self.page)

    @property
    def uneven(self) -> bool:
        """Whether the last tile begins early, so that it is whole: what the one before had is not counted again."""
        return self.page is None and self.entries % self.tile > 0


def tile_of(tuning: Tuning, entries: int) -> int:
    """Keys of a tile of a cache of `entries`, at least ROWS."""
    return tuning.keys if entries >= tuning.keys else ROWS


def shares(tuning: Tuning, shape: tuple[int, ...], kv_heads: int, entries: int, page: int | None, pages: int) -> Work:
    """How queries of `shape` [B, Q, H, D] against `entries` a row are shared out. pages: in the whole cache."""
    B, Q, H, _ = shape
    rows = Q * H // kv_heads
    tile = tile_of(tuning, entries)
    row_blocks, tiles = -(-rows // ROWS), -(-entries // tile)
    sequences = B * kv_heads
    padded = ROWS if row_blocks > 1 else -(-rows // EIGHT) * EIGHT

    def keys_of_a_block(part: int) -> int:
        """That a block reads, and what it writes of them and is read again, all caches full."""
        items = -(-tiles // part) * sequences * row_blocks
        return -(-items // tuning.blocks) * (part * tile + 2 * padded)

    # A part keeps all computing warpgroups at work. Up to eight keys a query row, what is written of it is much beside
    # what is read; so far parts may grow even if there are fewer of them than `rounds` wants.
    most = max(-(-tiles * sequences * row_blocks // (tuning.rounds * tuning.blocks)), -(-8 * padded // tile), COMPUTE)
    part = min(range(COMPUTE, most + 1), key=keys_of_a_block)
    work = Work(
        sequences=sequences,
        kv_heads=kv_heads,
        entries=entries,
        row_blocks=row_blocks,
        rows=padded,
        tile=tile,
        stages=tuning.stages,
        part=part,
        parts=-(-tiles // part),
        page=page,
        pages=pages,
        blocks=tuning.blocks,
    )
    return dataclasses.replace(work, blocks=min(tuning.blocks, work.items))
