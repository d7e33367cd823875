"""The backward pass on Hopper in two kernels, seven products: dQ by blocks of queries, dK and dV by blocks of keys.

Scores are made again from the kept log-sum-exp (Dao et al. 2022). Nothing is added up in memory by several blocks, so
the bits are the same from run to run.

dK and dV of 64 keys, 256 wide, are 256 registers a thread of one warpgroup, one more than there are. So one warpgroup
makes the weights and dV, the other dK, and the weights go from the one to the other through shared memory: each does
two of the four products and holds one accumulator. With few key/value heads there are too few blocks of keys for the
chip: the rows of queries, which hold all heads of a key/value head, are shared out in parts, whose sums are added
afterwards.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_tile
from pallas_kernels.attention.gpu_plan import COMPUTE, ROWS, Plan, Ring, Stream
from pallas_kernels.attention.gpu_tile import COLUMN, MATRIX, ROW

DQ = "palmjax_attention_dq"
DKV = "palmjax_attention_dkv"


class Operands(NamedTuple):
    """Of both kernels. table: of `key_bounds` for dQ, of `row_bounds` for dK and dV; numbers: of rows, [N, R] each; q,
    do: [N, R, D]; k, v: [N, S, D]; R and S whole blocks and tiles.
    """

    table: jax.Array
    numbers: dict[str, jax.Array]
    q: jax.Array
    do: jax.Array
    k: jax.Array
    v: jax.Array


def _weights(
    plan: Plan, products: Any, key: Any, masked: bool, numbers: dict[str, jax.Array], layout: Any
) -> tuple[Any, Any]:
    """Weights of a tile, and what (dP - delta) is multiplied with: the weights, by the soft-cap's derivative."""
    z, tanh = gpu_tile.scores(plan, products, key, masked, numbers, layout)
    weights = jnp.exp2(z * plan.unit - gpu_tile.over(numbers["lse"], z.shape, layout))
    return weights, weights if tanh is None else weights * (1.0 - tanh * tanh)


def _dq_kernel(
    plan: Plan,
    ring: Ring,
    names: tuple[str, ...],
    table_ref: Any,
    places_ref: Any,
    numbers_ref: Any,
    q_ref: Any,
    do_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dq_ref: Any,
    q_smem: Any,
    do_smem: Any,
    tiles: Any,
    rows_full: Any,
    tile_full: Any,
    tile_empty: Any,
) -> None:
    at = gpu_tile.key_block(table_ref)
    gpu_tile.copy_keys_and_values(ring, at, k_ref, v_ref, tiles, tile_full, tile_empty)

    @pl.when(at.warpgroup < COMPUTE)
    def _computes() -> None:
        gpu_tile.most_registers()
        mine, full = q_smem.at[at.warpgroup], rows_full.at[at.warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[at.sequence, at.rows], mine, full)
        plgpu.copy_gmem_to_smem(do_ref.at[at.sequence, at.rows], do_smem.at[at.warpgroup], full)
        numbers = gpu_tile.numbers(plan, names, numbers_ref.at[at.sequence, :, at.rows], ROW)
        plgpu.barrier_wait(full)

        def tile(index: Any, masked: bool, dq: Any) -> Any:
            of_keys, of_values = at.slots(ring, index)
            k = tiles.at[of_keys]
            # Always the warpgroup, which the compiler cannot see: it would keep descriptors of q and dO, which do not
            # change from tile to tile, in registers that there are not.
            here = at.warpgroup + jnp.minimum(index - at.bounds[0], 0)
            q, do = q_smem.at[here], do_smem.at[here]
            plgpu.barrier_wait(tile_full.at[of_keys])
            # One product after the other: with both under way there would be too few registers at 256.
            [products] = gpu_tile.products(plan, (q, k))
            key = functools.partial(gpu_tile.keys_as_columns, plan, places_ref, index * ring.keys, products.shape)
            _, factor = _weights(plan, products, key, masked, numbers, ROW)
            plgpu.barrier_wait(tile_full.at[of_values])
            [d_weights] = gpu_tile.products(plan, (do, tiles.at[of_values]))
            plgpu.barrier_arrive(tile_empty.at[of_values])
            d_scores = factor * (d_weights - gpu_tile.over(numbers["delta"], factor.shape, ROW))
            dq = gpu_tile.add_product(plan, dq, d_scores.astype(k_ref.dtype), k)
            plgpu.barrier_arrive(tile_empty.at[of_keys])
            return dq

        zero = gpu_tile.full(plan, (ROWS, plan.width), 0.0, MATRIX)
        dq = gpu_tile.for_tiles(at.bounds, tile, zero, plan.ranged)
        mine[...] = (dq * plan.scale).astype(dq_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, dq_ref.at[at.sequence, at.rows])
        plgpu.wait_smem_to_gmem(0)


def dq(plan: Plan, ring: Ring, given: Operands, *, interpret: Any) -> jax.Array:
    """dQ [N, R, D] in q's dtype."""
    table, numbers, q, do, k, v = given
    D = q.shape[2]
    memory = functools.partial(gpu_tile.tile_memory, plan, width=D, dtype=q.dtype)
    return plgpu.kernel(
        functools.partial(_dq_kernel, plan, ring, tuple(numbers)),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            memory(COMPUTE, ROWS),
            memory(COMPUTE, ROWS),
            memory(ring.slots, ring.keys),
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            plgpu.Barrier(num_barriers=ring.slots),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=ring.slots),
        ),
        **gpu_tile.launch(DQ, (q.shape[0], table.shape[1]), ("sequence", "block"), interpret),
    )(table, jnp.arange(k.shape[1], dtype=jnp.int32), gpu_tile.stacked(numbers), q, do, k, v)


class _Dkv(NamedTuple):
    """Memory and barriers of the kernel of dK and dV, in the order in which it gets them.

    sent: the weights are in `weights`; taken: they have been read.
    """

    table: Any
    numbers: Any
    q: Any
    do: Any
    k: Any
    v: Any
    dk: Any
    dv: Any
    k_smem: Any
    v_smem: Any
    q_tiles: Any
    do_tiles: Any
    number_tiles: Any
    weights: Any
    keys_full: Any
    q_full: Any
    do_full: Any
    q_empty: Any
    do_empty: Any
    sent: Any
    taken: Any


def _dkv_kernel(plan: Plan, stream: Stream, names: tuple[str, ...], *refs: Any) -> None:
    of = _Dkv(*refs)
    sequence, block, part = (jax.lax.axis_index(x) for x in ("sequence", "block", "part"))
    warpgroup = jax.lax.axis_index("warpgroup")
    bounds = gpu_tile.bounds_of(of.table, sequence, block, part)
    keys = pl.ds(block * ROWS, ROWS)

    @pl.when(warpgroup == COMPUTE)
    def _copies() -> None:
        gpu_tile.few_registers()

        def copy(step: Any, slot: Any) -> None:
            tile = part + of.table.shape[2] * (bounds[0] + step)
            rows = pl.ds(tile * stream.queries, stream.queries)
            plgpu.copy_gmem_to_smem(of.numbers.at[sequence, :, rows], of.number_tiles.at[slot], of.q_full.at[slot])
            plgpu.copy_gmem_to_smem(of.q.at[sequence, rows], of.q_tiles.at[slot], of.q_full.at[slot])
            plgpu.copy_gmem_to_smem(of.do.at[sequence, rows], of.do_tiles.at[slot], of.do_full.at[slot])

        gpu_tile.copy_in_turn(bounds[3] - bounds[0], stream.stages, [of.q_empty, of.do_empty], copy)

    @pl.when(warpgroup == 0)
    def _makes_weights_and_dv() -> None:
        gpu_tile.most_registers()
        plgpu.copy_gmem_to_smem(of.k.at[sequence, keys], of.k_smem.at[0], of.keys_full.at[0])
        plgpu.barrier_wait(of.keys_full.at[0])
        dv = _weights_and_dv(plan, stream, names, of, bounds, block * ROWS)
        of.dv[sequence, part, keys] = dv.astype(of.dv.dtype)

    @pl.when(warpgroup == 1)
    def _makes_dk() -> None:
        gpu_tile.most_registers()
        plgpu.copy_gmem_to_smem(of.v.at[sequence, keys], of.v_smem.at[0], of.keys_full.at[1])
        plgpu.barrier_wait(of.keys_full.at[1])
        dk = _dk(plan, stream, names, of, bounds)
        of.dk[sequence, part, keys] = (dk * plan.scale).astype(of.dk.dtype)


def _weights_and_dv(
    plan: Plan, stream: Stream, names: tuple[str, ...], of: _Dkv, bounds: Any, first_key: Any
) -> jax.Array:
    """dV [keys, D] of a block; sends the weights, one tile after the other."""
    begin, end = bounds[0], bounds[3]

    def tile(index: Any, masked: bool, dv: Any) -> Any:
        slot = jax.lax.rem(index - begin, jnp.int32(stream.stages))
        plgpu.barrier_wait(of.q_full.at[slot])
        [products] = gpu_tile.products(plan, (of.k_smem.at[0], of.q_tiles.at[slot]))
        numbers = gpu_tile.numbers(plan, names, of.number_tiles.at[slot], COLUMN)
        # Ordinary reads, unlike the products', before the next copy's write.
        plgpu.commit_smem()
        plgpu.barrier_arrive(of.q_empty.at[slot])
        key = functools.partial(gpu_tile.counted, plan, first_key, products.shape, 0)
        weights, factor = _weights(plan, products, key, masked, numbers, COLUMN)

        @pl.when(index > begin)
        def _() -> None:
            plgpu.barrier_wait(of.taken)

        of.weights[0] = factor
        plgpu.barrier_arrive(of.sent)
        plgpu.barrier_wait(of.do_full.at[slot])
        dv = gpu_tile.add_product(plan, dv, weights.astype(of.v.dtype), of.do_tiles.at[slot])
        plgpu.barrier_arrive(of.do_empty.at[slot])
        return dv

    dv = gpu_tile.for_tiles(bounds, tile, gpu_tile.full(plan, (ROWS, plan.width), 0.0, MATRIX), True)

    @pl.when(end > begin)
    def _() -> None:
        plgpu.barrier_wait(of.taken)

    return dv


def _dk(plan: Plan, stream: Stream, names: tuple[str, ...], of: _Dkv, bounds: Any) -> jax.Array:
    """dK [keys, D] of a block, without the scale; takes the weights, which are zero where they are masked."""
    begin, end = bounds[0], bounds[3]

    def tile(index: Any, dk: Any) -> Any:
        slot = jax.lax.rem(index - begin, jnp.int32(stream.stages))
        plgpu.barrier_wait(of.do_full.at[slot])
        [d_weights] = gpu_tile.products(plan, (of.v_smem.at[0], of.do_tiles.at[slot]))
        plgpu.barrier_arrive(of.do_empty.at[slot])
        plgpu.barrier_wait(of.q_full.at[slot])
        delta = gpu_tile.numbers(plan, names, of.number_tiles.at[slot], COLUMN)["delta"]
        plgpu.commit_smem()
        plgpu.barrier_wait(of.sent)
        factor = of.weights[0]
        plgpu.barrier_arrive(of.taken)
        d_scores = factor * (d_weights - gpu_tile.over(delta, factor.shape, COLUMN))
        dk = gpu_tile.add_product(plan, dk, d_scores.astype(of.k.dtype), of.q_tiles.at[slot])
        plgpu.barrier_arrive(of.q_empty.at[slot])
        return dk

    return jax.lax.fori_loop(begin, end, tile, gpu_tile.full(plan, (ROWS, plan.width), 0.0, MATRIX))


def dkv(plan: Plan, stream: Stream, given: Operands, *, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """(dK, dV), [N, P, S, D] each: sums of P parts of the rows, float32 unless P is 1."""
    table, numbers, q, do, k, v = given
    N, S, D = k.shape
    parts = table.shape[2]
    memory = functools.partial(gpu_tile.tile_memory, plan, width=D, dtype=k.dtype)
    sums = jax.ShapeDtypeStruct((N, parts, S, D), k.dtype if parts == 1 else jnp.float32)
    stages = stream.stages
    return plgpu.kernel(
        functools.partial(_dkv_kernel, plan, stream, tuple(numbers)),
        out_type=(sums, sums),
        scratch_types=(
            memory(1, ROWS),
            memory(1, ROWS),
            memory(stages, stream.queries),
            memory(stages, stream.queries),
            plgpu.SMEM((stages, len(numbers), stream.queries), jnp.int32),
            gpu_tile.tile_memory(plan, 1, ROWS, stream.queries, jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTE),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ),
        **gpu_tile.launch(DKV, table.shape[:3], ("sequence", "block", "part"), interpret),
    )(table, gpu_tile.stacked(numbers), q, do, k, v)
