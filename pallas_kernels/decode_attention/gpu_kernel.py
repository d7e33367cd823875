"""Attention against a cache on Hopper: parts of the rows' caches, softmax online, one result and log-sum-exp a part.

Reading the cache bounds it. With 16 query heads of 256, a key and its value are 1,024 bytes and 16,384 operations: an
H200's multiprocessor gets its share of those bytes in 49 cycles, in which it does 12,544 operations without the matrix
units and 200,704 with them; these take 65,536, as their products have 64 rows whatever there is to put into them. So
the query heads of a key/value head are such rows, be they few, and what matters is that the copies never stop: there
are as many blocks as multiprocessors, each goes from part to part, and one warpgroup copies tiles of keys and values
ahead of the two that compute, which take the tiles in turn and add up their sums at the end of a part.

A part is a number of tiles from the first that a row sees, so a row's bits do not depend on the other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_tile
from pallas_kernels.attention.gpu_plan import COMPUTE, ROWS, Plan
from pallas_kernels.attention.gpu_tile import ROW
from pallas_kernels.decode_attention.gpu_plan import Work

NAME = "palmjax_decode_attention_gpu"


class _Refs(NamedTuple):
    """Memory and barriers, in the order in which the kernel gets them.

    table: least and most entry that each row of the batch sees. sums, row_smem: values, and largest scores and sums of
    weights, of the warpgroup that gives them; then the result, and its log-sum-exp. sent: the former are there; taken:
    the latter are on their way out.
    """

    table: Any
    layer: Any
    page_table: Any
    numbers: Any
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    q_smem: Any
    number_smem: Any
    k_tiles: Any
    v_tiles: Any
    sums: Any
    row_smem: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any
    sent: Any
    taken: Any


class _Item(NamedTuple):
    """One part of a sequence for one block of query rows.

    place: [sequence, part] as one number. least, most: entries of the batch's row that are seen. first, last: tiles of
    the part, at least one. step: tiles that this block has had before, none if this is its first item.
    """

    sequence: Any
    place: Any
    row_block: Any
    least: Any
    most: Any
    first: Any
    last: Any
    step: Any


def _for_items(work: Work, of: _Refs, visit: Callable[[_Item], None]) -> Any:
    """Visits the items of this block that have a tile; how many tiles they have.

    All rows' first parts are visited first, then their second ones: blocks have as much to do as each other, however
    unevenly the rows are filled.
    """
    block = jax.lax.axis_index("block")

    def one(turn: Any, step: Any) -> Any:
        number = turn * work.blocks + block
        row_block = jax.lax.rem(number, work.row_blocks)
        number = number // work.row_blocks
        sequence, part = jax.lax.rem(number, work.sequences), number // work.sequences
        row = sequence // work.kv_heads
        least, most = of.table[row, 0], of.table[row, 1]
        first = least // work.tile + part * work.part
        last = jnp.minimum(first + work.part, (most + work.tile - 1) // work.tile)

        @pl.when(first < last)
        def _() -> None:
            visit(_Item(sequence, sequence * work.parts + part, row_block, least, most, first, last, step))

        return step + jnp.maximum(last - first, 0)

    turns = -(-work.items // work.blocks)
    return jax.lax.fori_loop(0, turns, one, jnp.int32(0))


def _slot(work: Work, step: Any) -> Any:
    return jax.lax.rem(step, jnp.int32(COMPUTE * work.stages))


def _copies(work: Work, of: _Refs) -> None:
    """The copying warpgroup: tiles of keys and values of each item in turn, and its queries when the slots are full.

    Not before: until the item before is done with its queries there is room for tiles, but not for queries.
    """
    slots = COMPUTE * work.stages

    def visit(item: _Item) -> None:
        def queries() -> None:
            @pl.when(item.step > 0)
            def _() -> None:
                plgpu.barrier_wait(of.q_empty)

            rows = pl.ds(item.row_block * ROWS, work.rows)
            plgpu.copy_gmem_to_smem(of.q.at[item.sequence, rows], of.q_smem.at[0, pl.ds(0, work.rows)], of.q_full)
            rows = pl.ds(item.row_block * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(of.numbers.at[item.sequence, :, rows], of.number_smem, of.q_full)

        def tile(index: Any, _: None) -> None:
            step = item.step + index - item.first
            slot = _slot(work, step)
            for ref, tiles, full, empty in (
                (of.k, of.k_tiles, of.k_full, of.k_empty),
                (of.v, of.v_tiles, of.v_full, of.v_empty),
            ):

                @pl.when(step >= slots)
                def _(empty: Any = empty) -> None:
                    plgpu.barrier_wait(empty.at[slot])

                _copy_tile(work, of, item, index, ref, tiles.at[slot], full.at[slot])

        full = jnp.minimum(item.first + slots, item.last)
        jax.lax.fori_loop(item.first, full, tile, None)
        queries()
        jax.lax.fori_loop(full, item.last, tile, None)

    steps = _for_items(work, of, visit)

    # Stays until the last tile is read, so that every phase of a barrier is seen by those who wait at it.
    def drain(step: Any, _: None) -> None:
        for empty in (of.k_empty, of.v_empty):
            plgpu.barrier_wait(empty.at[_slot(work, step)])

    jax.lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, None)

    @pl.when(steps > 0)
    def _() -> None:
        plgpu.barrier_wait(of.q_empty)


def _copy_tile(work: Work, of: _Refs, item: _Item, index: Any, ref: Any, tile: Any, full: Any) -> None:
    width = tile.shape[1]
    row = item.sequence // work.kv_heads
    head = jax.lax.rem(item.sequence, work.kv_heads)
    if work.page is None:
        place = of.layer[0] * (work.sequences // work.kv_heads) + row
        keys = pl.ds(_start(work, index), work.tile)
        plgpu.copy_gmem_to_smem(ref.at[place, keys, pl.ds(head * width, width)], tile, full)
        return
    size = min(work.tile, work.page)
    for piece in range(work.pieces):
        begin = index * work.tile + piece * size
        # Of pages that nobody sees the table may say anything.
        number = jnp.clip(begin // work.page, item.least // work.page, (item.most - 1) // work.page)
        place = (of.layer[0] * work.pages + of.page_table[row, number]) * work.kv_heads + head
        keys = pl.ds(jax.lax.rem(begin, work.page), size)
        plgpu.copy_gmem_to_smem(ref.at[place, keys], tile.at[pl.ds(piece * size, size)], full)


def _start(work: Work, index: Any) -> Any:
    """The first entry of a tile."""
    start = index * work.tile
    return jnp.minimum(start, work.entries - work.tile) if work.uneven else start


def _part(plan: Plan, work: Work, names: tuple[str, ...], of: _Refs, item: _Item, warpgroup: Any) -> gpu_tile.Sums:
    """Sums of every other tile of a part."""
    plgpu.barrier_wait(of.q_full)
    # Steps alternate throughout, over parts too, so a slot's tiles are always the same warpgroup's.
    mine = item.step + jax.lax.rem(warpgroup + item.step, jnp.int32(COMPUTE))
    ahead = item.first - item.step

    def tile(turn: Any, so_far: gpu_tile.Sums) -> gpu_tile.Sums:
        step = mine + COMPUTE * turn
        slot, index = _slot(work, step), step + ahead
        start = _start(work, index)
        edge = start + work.tile > item.most

        # Before there are scores, which take the registers.
        @pl.when(edge)
        def _() -> None:
            plgpu.barrier_wait(of.v_full.at[slot])
            _clear(plan, of.v_tiles.at[slot], item.most - start)

        plgpu.barrier_wait(of.k_full.at[slot])
        # Always 0, which the compiler cannot see: it would keep what describes q in registers that there are not.
        here = jnp.minimum(turn, 0)
        [products] = gpu_tile.products(plan, (of.q_smem.at[here], of.k_tiles.at[slot]))
        plgpu.barrier_arrive(of.k_empty.at[slot])
        key = functools.partial(gpu_tile.counted, plan, start, products.shape, 1)
        # For each tile anew: over the loop they would take registers that there are not.
        numbers = gpu_tile.numbers(plan, names, of.number_smem, ROW)
        if work.uneven:
            numbers["first"] = jnp.maximum(numbers["first"], index * work.tile)
        z = gpu_tile.scores(plan, products, key, True, numbers, ROW)[0]
        weights, (top, total, values) = gpu_tile.weigh(plan, z, so_far)
        weights = weights.astype(of.v.dtype)

        @pl.when(jnp.logical_not(edge))
        def _() -> None:
            plgpu.barrier_wait(of.v_full.at[slot])

        values = gpu_tile.add_product(plan, values, weights, of.v_tiles.at[slot])
        plgpu.barrier_arrive(of.v_empty.at[slot])
        return top, total, values

    turns = (item.last - ahead - mine + COMPUTE - 1) // COMPUTE
    sums = jax.lax.fori_loop(0, turns, tile, gpu_tile.no_sums(plan))
    # The numbers were read in the ordinary way, unlike q, before the next copy's write.
    plgpu.commit_smem()
    plgpu.barrier_arrive(of.q_empty)
    return sums


def _clear(plan: Plan, tile: Any, count: Any) -> None:
    """Zeros behind the first `count` values of a tile: what nobody has written may be NaN, which no zero weight takes
    away.
    """
    columns = min(tile.shape[1], ROWS)
    for rows in range(0, tile.shape[0], ROWS):
        for column in range(0, tile.shape[1], columns):
            part = tile.at[pl.ds(rows, ROWS), pl.ds(column, columns)]
            some = part[...]
            written = gpu_tile.counted(plan, rows, some.shape, 0) < count
            part[...] = jnp.where(written, some.astype(jnp.float32), 0.0).astype(some.dtype)
    plgpu.commit_smem()


def _kernel(plan: Plan, work: Work, names: tuple[str, ...], *refs: Any) -> None:
    of = _Refs(*refs)
    warpgroup = jax.lax.axis_index("warpgroup")

    def give(item: _Item) -> None:
        top, total, values = _part(plan, work, names, of, item, warpgroup)

        @pl.when(item.step > 0)
        def _() -> None:
            plgpu.barrier_wait(of.taken)

        of.row_smem[0] = top
        of.row_smem[1] = total
        of.sums[0] = values
        plgpu.barrier_arrive(of.sent)

    def take(item: _Item) -> None:
        top, total, values = _part(plan, work, names, of, item, warpgroup)
        plgpu.barrier_wait(of.sent)
        other, more = (gpu_tile.vector(plan, of.row_smem, index, ROW) for index in range(2))
        new = jnp.maximum(top, other)
        mine, its = (jnp.exp2((x - new) * plan.unit) for x in (top, other))
        share, lse = gpu_tile.finish(plan, new, total * mine + more * its)
        # Column by column: there are no registers for two warpgroups' values.
        for column in range(0, plan.width, ROWS):
            part = of.sums.at[0, :, pl.ds(column, ROWS)]
            own = values[:, column : column + ROWS]
            wide = functools.partial(gpu_tile.over, shape=own.shape, layout=ROW)
            part[...] = own * wide(mine * share) + part[...] * wide(its * share)
        of.row_smem[2] = lse
        plgpu.commit_smem()
        here, there = pl.ds(0, work.rows), pl.ds(item.row_block * ROWS, work.rows)
        plgpu.copy_smem_to_gmem(of.sums.at[0, here], of.out.at[item.place, there])
        plgpu.copy_smem_to_gmem(of.row_smem.at[2, here], of.lse.at[item.place, there])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(of.taken)

    @pl.when(warpgroup == 0)
    def _() -> None:
        gpu_tile.most_registers()
        _for_items(work, of, take)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def _() -> None:
        gpu_tile.most_registers()
        steps = _for_items(work, of, give)

        @pl.when(steps > 0)
        def _() -> None:
            plgpu.barrier_wait(of.taken)

    # Last: what is made before a branch and used behind it takes registers of the branch, and here there are few.
    @pl.when(warpgroup == COMPUTE)
    def _() -> None:
        gpu_tile.few_registers()
        _copies(work, of)


def parts(
    plan: Plan,
    work: Work,
    table: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    numbers: dict[str, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Float32 (out [N, parts, R, D], lse [N, parts, R]); of a part in which nothing is seen, anything.

    table: int32 [B, 2], least entry and the one behind the last that a row sees. layer: int32 [1]. page_table: int32
    [B, n], or [1, 1] where nothing is paged. numbers: of rows, [N, row_blocks ROWS] each. q: [N, R, D], R = rows where
    there is one block of them, else whole blocks. k, v: [L B, S, K D], paged [L P K, C, D].
    """
    N, R, D = q.shape
    slots = COMPUTE * work.stages
    memory = functools.partial(gpu_tile.tile_memory, plan, width=D)
    found = [jax.ShapeDtypeStruct((N * work.parts, R, *end), jnp.float32) for end in ((D,), ())]
    out, lse = plgpu.kernel(
        functools.partial(_kernel, plan, work, tuple(numbers)),
        out_type=tuple(found),
        scratch_types=(
            memory(1, ROWS, dtype=q.dtype),
            plgpu.SMEM((len(numbers), ROWS), jnp.int32),
            memory(slots, work.tile, dtype=k.dtype),
            memory(slots, work.tile, dtype=k.dtype),
            memory(1, ROWS, dtype=jnp.float32),
            plgpu.SMEM((3, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=COMPUTE),
            plgpu.Barrier(num_arrivals=work.pieces, num_barriers=slots),
            plgpu.Barrier(num_arrivals=work.pieces, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ),
        **gpu_tile.launch(NAME, (work.blocks,), ("block",), interpret),
    )(table, layer, page_table, gpu_tile.stacked(numbers), q, k, v)
    return out.reshape(N, work.parts, R, D), lse.reshape(N, work.parts, R)
