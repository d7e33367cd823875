"""The backward pass on a TPU, in one: queries stream through once, the gradients of all keys and values stay in VMEM.

Five products a tile. dQ of a block is whole when the block is done; dK and dV add up in float32 on chip in a fixed
order, so no partial sums go to memory but one set for each core, and the bits are the same from run to run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_plan import (
    LANES,
    Plan,
    column,
    columns,
    dot,
    for_each_tile,
    scores,
    split,
    where_seen,
)

NAME = "palmjax_attention_backward"
PRODUCTS = 5


def block_of(core: Any, step: Any, cores: int) -> Any:
    """A step's query block. Two cores take turns within pairs of blocks, so both have half of a causal mask's work."""
    return step if cores == 1 else 2 * step + ((step + core) & 1)


def _kernel(plan: Plan, *refs: Any) -> None:
    table_ref, fields_ref, refs = split(plan, refs)
    q_ref, do_ref, k_ref, v_ref, dq_ref, dk_hbm, dv_hbm, dk_sum, dv_sum, columns_ref, sent = refs[:11]
    # A float32 result is summed where it is written.
    dq_sum = refs[11] if len(refs) > 11 else dq_ref.at[0]
    n, core, step = (pl.program_id(axis) for axis in range(3))

    @pl.when(step == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    columns(plan, fields_ref, columns_ref)
    block = block_of(core, step, plan.cores)

    def tile(start: Any, size: int, masked: int, first: bool) -> None:
        keys = pl.ds(start, size)
        q, do, k = q_ref[0], do_ref[0], k_ref[0, keys, :]
        z, seen, tanh = scores(plan, q, k, block, start, masked, columns_ref)
        weights = jnp.exp2(z * plan.unit - column(plan, columns_ref, "lse", size))
        weights = where_seen(seen, weights, 0.0)
        d_weights = dot(do, v_ref[0, keys, :], (1, 1))
        d_scores = weights * (d_weights - column(plan, columns_ref, "delta", size))
        if tanh is not None:
            d_scores = d_scores * (1.0 - tanh * tanh)
        d_scores = d_scores.astype(q.dtype)
        dv_sum[keys, :] += dot(weights.astype(q.dtype), do, (0, 0))
        dk_sum[keys, :] += dot(d_scores, q, (0, 0))
        dq = dot(d_scores, k, (1, 0))
        if first:
            dq_sum[...] = dq
        else:
            dq_sum[...] += dq

    for_each_tile(plan, plan.bounds(block, table_ref, n), tile)
    dq_ref[0] = (dq_sum[...] * plan.scale).astype(dq_ref.dtype)

    @pl.when(step == plan.blocks // plan.cores - 1)
    def _() -> None:
        copies = [
            pltpu.make_async_copy(dk_sum, dk_hbm.at[n, core], sent.at[0]),
            pltpu.make_async_copy(dv_sum, dv_hbm.at[n, core], sent.at[1]),
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()


def by_core(
    plan: Plan,
    table: jax.Array | None,
    fields: jax.Array,
    q: jax.Array,
    do: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    dq_dtype: Any,
    vmem_mib: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq [N, R, D] in `dq_dtype`, and what each core has summed of dk, but for its scale, and of dv: float32
    [N, cores, S, D]). Arguments as `tpu_forward.forward`; do as q; the fields have "lse" (in base 2) and "delta" (of
    the softmax's gradient: sum of do out, less the gradient of lse).
    """
    N, R, D = q.shape
    S = k.shape[1]

    def at(n: Any, core: Any, step: Any, *_: Any) -> Any:
        return block_of(core, step, plan.cores)

    row = pl.BlockSpec((1, plan.rows, D), lambda *ids: (ids[0], at(*ids), 0))
    per_row = pl.BlockSpec((1, len(plan.fields), plan.rows), lambda *ids: (ids[0], 0, at(*ids)))
    # One buffer: what a second would hide is paid once a sequence, and the room is dK's.
    whole = pl.BlockSpec((1, S, D), lambda *ids: (ids[0], 0, 0), pipeline_mode=pl.Buffered(1))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    sums = jax.ShapeDtypeStruct((N, plan.cores, S, D), jnp.float32)
    given = () if table is None else (table,)
    flops = plan.flops(PRODUCTS, D, N)
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(given),
            grid=(N, plan.cores, plan.blocks // plan.cores),
            in_specs=[per_row, row, row, whole, whole],
            out_specs=[row, hbm, hbm],
            scratch_shapes=[
                pltpu.VMEM((S, D), jnp.float32),
                pltpu.VMEM((S, D), jnp.float32),
                pltpu.VMEM((len(plan.fields), plan.rows, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                *([] if dq_dtype == jnp.float32 else [pltpu.VMEM((plan.rows, D), jnp.float32)]),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((N, R, D), dq_dtype), sums, sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=None if vmem_mib is None else vmem_mib * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=flops // (10 * D),
            bytes_accessed=int(3 * q.nbytes + 2 * k.nbytes + 8 * N * plan.cores * S * D),
        ),
        interpret=interpret,
        name=NAME,
    )(*given, fields, q, do, k, v)


def backward(plan: Plan, *operands: Any, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq [N, R, D], dk, dv float32 [N, S, D]). Arguments as `by_core`."""
    dq, dk, dv = by_core(plan, *operands, **options)
    return dq, jnp.sum(dk, axis=1) * plan.scale, jnp.sum(dv, axis=1)
