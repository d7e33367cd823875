"""The forward pass on a TPU: one block of queries against all keys, which stay in VMEM; softmax online in base 2."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import reference
from pallas_kernels.attention.tpu_plan import (
    LANES,
    LN2,
    LOG2E,
    Plan,
    columns,
    dot,
    for_each_tile,
    scores,
    split,
    where_seen,
)

NAME = "palmjax_attention_forward"
PRODUCTS = 2

MASKED = -1e30
FLOOR = -1e29
"""No row's largest score goes below it, so that masked scores weigh nothing even where a row sees nothing."""
TINY = 1e-30
SEEN = -1e20
"""A log-sum-exp below it is that of a row which saw nothing."""


def zigzag(step: Any, blocks: int) -> Any:
    """A step's query block: first, last, second, last but one. Under a causal mask any half of the steps, which is what
    one of two cores gets, is then half of the work.
    """
    return jnp.where(step & 1 == 0, step >> 1, blocks - 1 - (step >> 1))


def _kernel(plan: Plan, *refs: Any) -> None:
    table_ref, fields_ref, refs = split(plan, refs)
    q_ref, k_ref, v_ref, out_ref, lse_ref, top_ref, total_ref, sum_ref = refs[:8]
    columns_ref = refs[8] if plan.fields else None
    block = zigzag(pl.program_id(1), plan.blocks)
    columns(plan, fields_ref, columns_ref)

    def tile(start: Any, size: int, masked: int, first: bool) -> None:
        keys = pl.ds(start, size)
        z, seen, _ = scores(plan, q_ref[0], k_ref[0, keys, :], block, start, masked, columns_ref)
        z = where_seen(seen, z, MASKED)
        top = jnp.max(z, axis=1, keepdims=True)
        if first:
            top = jnp.broadcast_to(jnp.maximum(top, FLOOR), (plan.rows, LANES))
        else:
            top = jnp.maximum(top_ref[...], top)
        weights = jnp.exp2((z - jnp.tile(top, (1, size // LANES))) * plan.unit)
        # Lanes are summed once a block, not once a tile.
        total = functools.reduce(jnp.add, jnp.split(weights, size // LANES, axis=1))
        values = dot(weights.astype(v_ref.dtype), v_ref[0, keys, :], (1, 0))
        if first:
            total_ref[...], sum_ref[...] = total, values
        else:
            keep = jnp.exp2((top_ref[...] - top) * plan.unit)
            total_ref[...] = total_ref[...] * keep + total
            sum_ref[...] = sum_ref[...] * jnp.tile(keep, (1, values.shape[1] // LANES)) + values
        top_ref[...] = top

    for_each_tile(plan, plan.bounds(block, table_ref, pl.program_id(0)), tile)
    _finish(plan, out_ref, lse_ref, top_ref[...], total_ref[...], sum_ref)


def _finish(plan: Plan, out_ref: Any, lse_ref: Any, top: Any, total: Any, sum_ref: Any) -> None:
    # A row that saw nothing has a zero total and sum; TINY makes its result zero and its log-sum-exp very small.
    log = jnp.log(jnp.maximum(jnp.sum(total, axis=1, keepdims=True), TINY))
    # exp2(-log2 x) is two transcendentals; a float32 division is many vector instructions.
    out_ref[0] = (sum_ref[...] * jnp.exp2(log * -LOG2E)).astype(out_ref.dtype)
    lse = top * (plan.unit * LN2) + log
    # From columns to lanes: of each square, keep the diagonal and sum.
    square = (LANES, LANES)
    diagonal = jax.lax.broadcasted_iota(jnp.int32, square, 0) == jax.lax.broadcasted_iota(jnp.int32, square, 1)
    for begin in range(0, plan.rows, LANES):
        part = jnp.sum(jnp.where(diagonal, lse[begin : begin + LANES], 0.0), axis=0, keepdims=True)
        lse_ref[0, :, begin : begin + LANES] = jnp.where(part < SEEN, reference.EMPTY, part)


def forward(
    plan: Plan,
    table: jax.Array | None,
    fields: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    out_dtype: Any,
    vmem_mib: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse). q, out: [N, R, D], R = blocks x rows, D a multiple of 128; k, v: [N, S, D]; fields: float32
    [N, F, R], None where the plan has none; table: `bounds_table` when ranges are data; lse: float32 [N, 1, R].
    """
    N, R, D = q.shape
    S = k.shape[1]
    row = pl.BlockSpec((1, plan.rows, D), lambda n, step, *_: (n, zigzag(step, plan.blocks), 0))
    lanes = pl.BlockSpec((1, 1, plan.rows), lambda n, step, *_: (n, 0, zigzag(step, plan.blocks)))
    per_row = pl.BlockSpec((1, len(plan.fields), plan.rows), lambda n, step, *_: (n, 0, zigzag(step, plan.blocks)))
    whole = pl.BlockSpec((1, S, D), lambda n, step, *_: (n, 0, 0))
    scratch = [
        pltpu.VMEM((plan.rows, LANES), jnp.float32),
        pltpu.VMEM((plan.rows, LANES), jnp.float32),
        pltpu.VMEM((plan.rows, D), jnp.float32),
    ]
    if plan.fields:
        scratch.append(pltpu.VMEM((len(plan.fields), plan.rows, LANES), jnp.float32))
    given = [x for x in (table, fields) if x is not None]
    flops = plan.flops(PRODUCTS, D, N)
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=int(table is not None),
            grid=(N, plan.blocks),
            in_specs=[*([per_row] if plan.fields else []), row, whole, whole],
            out_specs=[row, lanes],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((N, R, D), out_dtype), jax.ShapeDtypeStruct((N, 1, R), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=None if vmem_mib is None else vmem_mib * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=flops // (4 * D),
            bytes_accessed=int(2 * (q.nbytes + k.nbytes) + 4 * N * R * (1 + len(plan.fields))),
        ),
        interpret=interpret,
        name=NAME,
    )(*given, q, k, v)
