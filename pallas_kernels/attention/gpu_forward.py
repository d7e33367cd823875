"""The forward pass on Hopper: 128 rows of queries a block, keys and values in turn through a ring, softmax online.

One warpgroup copies tiles with the tensor memory accelerator, two multiply (`wgmma`), 64 rows each. A block visits the
tiles that its rows' ranges reach, and masks only those that some row does not see whole.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_tile
from pallas_kernels.attention.gpu_plan import COMPUTE, ROWS, Plan, Ring
from pallas_kernels.attention.gpu_tile import ROW

NAME = "palmjax_attention_forward"


def _kernel(
    plan: Plan,
    ring: Ring,
    names: tuple[str, ...],
    table_ref: Any,
    places_ref: Any,
    numbers_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    q_smem: Any,
    tiles: Any,
    lse_smem: Any,
    q_full: Any,
    tile_full: Any,
    tile_empty: Any,
    turns: Any,
) -> None:
    at = gpu_tile.key_block(table_ref)
    gpu_tile.copy_keys_and_values(ring, at, k_ref, v_ref, tiles, tile_full, tile_empty)

    def next_turn() -> None:
        plgpu.barrier_arrive(turns)
        plgpu.barrier_wait(turns)

    @pl.when(at.warpgroup < COMPUTE)
    def _computes() -> None:
        gpu_tile.most_registers()
        mine = q_smem.at[at.warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[at.sequence, at.rows], mine, q_full.at[at.warpgroup])
        numbers = gpu_tile.numbers(plan, names, numbers_ref.at[at.sequence, :, at.rows], ROW)
        plgpu.barrier_wait(q_full.at[at.warpgroup])
        # The warpgroups take turns at the matrix units: a tile's values and the next one's scores of the one, while the
        # other weighs its scores (Shah et al. 2024, section 3.1). Both have the same tiles, so as many turns.
        pl.when(at.warpgroup == 1)(next_turn)

        def tile(index: Any, masked: bool, so_far: gpu_tile.Sums) -> gpu_tile.Sums:
            of_keys, of_values = at.slots(ring, index)
            plgpu.barrier_wait(tile_full.at[of_keys])
            [products] = gpu_tile.products(plan, (mine, tiles.at[of_keys]), then=next_turn)
            plgpu.barrier_arrive(tile_empty.at[of_keys])
            key = functools.partial(gpu_tile.keys_as_columns, plan, places_ref, index * ring.keys, products.shape)
            z, _ = gpu_tile.scores(plan, products, key, masked, numbers, ROW)
            weights, (top, total, values) = gpu_tile.weigh(plan, z, so_far)
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(tile_full.at[of_values])
            plgpu.barrier_wait(turns)
            values = gpu_tile.add_product(plan, values, weights.astype(v_ref.dtype), tiles.at[of_values])
            plgpu.barrier_arrive(tile_empty.at[of_values])
            return top, total, values

        top, total, values = gpu_tile.for_tiles(at.bounds, tile, gpu_tile.no_sums(plan), plan.ranged)
        pl.when(at.warpgroup == 0)(next_turn)
        share, lse = gpu_tile.finish(plan, top, total)
        # Nobody reads these rows of q any more.
        mine[...] = (values * gpu_tile.over(share, values.shape, ROW)).astype(out_ref.dtype)
        lse_smem[at.warpgroup] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out_ref.at[at.sequence, at.rows])
        plgpu.copy_smem_to_gmem(lse_smem.at[at.warpgroup], lse_ref.at[at.sequence, at.rows])
        plgpu.wait_smem_to_gmem(0)


def forward(
    plan: Plan,
    ring: Ring,
    table: jax.Array,
    numbers: dict[str, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """(out [N, R, D], lse float32 [N, R]). q: [N, R, D], R whole blocks; k, v: [N, S, D], S whole tiles; table: of
    `key_bounds`; numbers: of rows, [N, R] each.
    """
    N, R, D = q.shape
    return plgpu.kernel(
        functools.partial(_kernel, plan, ring, tuple(numbers)),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((N, R), jnp.float32)),
        scratch_types=(
            gpu_tile.tile_memory(plan, COMPUTE, ROWS, D, q.dtype),
            gpu_tile.tile_memory(plan, ring.slots, ring.keys, D, k.dtype),
            plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTE),
            plgpu.Barrier(num_barriers=ring.slots),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=ring.slots),
            plgpu.Barrier(num_arrivals=COMPUTE),
        ),
        **gpu_tile.launch(NAME, (N, table.shape[1]), ("sequence", "block"), interpret),
    )(table, jnp.arange(k.shape[1], dtype=jnp.int32), gpu_tile.stacked(numbers), q, k, v)
