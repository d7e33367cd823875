"""Linear cross-entropy's three products on TPUs through Mosaic, one part of the tokens [N, D] against a table [V, D].

Logits lie transposed, [V, N]: what a token needs to know of its logits (largest, sum, the target's) is then reduced
over sublanes, and every number that belongs to a token is a row of lanes. `_scores` writes weights exp(logit - top) in
the hidden states' dtype, top being the largest of a tile: what goes back to memory is half of the logits and no pass
over them is left. `_d_hidden` and `_d_table` scale a tile's weights as they read it, into the logits' gradient, beneath
their products; `_d_table` adds to the sum that the parts before it have left, in place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu_plan import LANES, dot
from pallas_kernels.linear_cross_entropy.reference import MASKED

NAMES = ("palmjax_loss_scores", "palmjax_loss_d_hidden", "palmjax_loss_d_table")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Of a chip. tokens: of a part. rows: of the vocabulary, of a tile of weights, for `_scores`; the other two take
    as many or a multiple. width: columns of the hidden states that `_scores` multiplies at a time; hidden_width,
    table_width: columns of the gradients' tiles. vmem_mib: the limit handed to the compiler; None is its own.
    """

    tokens: int
    rows: int
    width: int
    hidden_rows: int
    hidden_width: int
    table_rows: int
    table_width: int
    vmem_mib: int | None = None

    def __post_init__(self) -> None:
        if self.tokens % LANES or self.hidden_rows % self.rows or self.table_rows % self.rows:
            raise ValueError(f"{self}: tokens must be a multiple of {LANES}, hidden_rows and table_rows of rows")

    @property
    def params(self) -> dict[str, Any]:
        return {"vmem_limit_bytes": None if self.vmem_mib is None else self.vmem_mib << 20}


def padded(tiles: Tiles, table: jax.Array) -> jax.Array:
    """The table with as many rows as tiles need, zeros behind its own."""
    most = max(tiles.rows, tiles.hidden_rows, tiles.table_rows)
    pad = -table.shape[0] % most
    return jnp.pad(table, ((0, pad), (0, 0))) if pad else table


def columns(width: int, most: int) -> int:
    """The most columns, whole lane tiles, that divide `width` and are no more than `most`."""
    return next(size for size in range(min(width, most) // LANES * LANES, 0, -LANES) if width % size == 0)


def part(
    static: Any, hidden: Any, table: Any, targets: Any, weights: Any, real: Any, d_table: Any
) -> tuple[tuple[Any, Any, Any], Any, Any]:
    """As `total._xla_part`, of a padded table."""
    from pallas_kernels.linear_cross_entropy.total import across

    N = hidden.shape[0]
    pad = -N % LANES
    hidden, targets, weights = (jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))) for x in (hidden, targets, weights))
    targets = targets.astype(jnp.int32)[None]
    exps, top, sums = _scores(static, hidden, table, targets, jnp.asarray(real, jnp.int32))
    most = across(static, jnp.max(top, axis=0), jax.lax.pmax)  # [1, N]
    share = jnp.exp(top - most)  # [tiles, 1, N]
    whole = jnp.stack(
        [
            jnp.sum(sums[:, 0:1] * share, axis=0),
            jnp.sum(sums[:, 1:2], axis=0),
            jnp.sum(jnp.where(top == most, sums[:, 2:3], 0.0), axis=0),
        ]
    )
    total, chosen, tied = across(static, whole, jax.lax.psum)
    log_z = jnp.log(total) + most
    wanted = weights[None].astype(jnp.float32) * static.scale
    of_tile = share * (wanted * (1.0 + 2.0 * static.z_loss * log_z) / total)
    if static.soft_cap is not None:
        wanted = wanted * (1.0 - jnp.square(chosen / static.soft_cap))
    d_hidden = _d_hidden(static, exps, of_tile, wanted, targets, table)
    d_table = _d_table(static, exps, of_tile, wanted, targets, hidden, d_table)
    found = log_z - chosen, log_z, jnp.where(chosen == most, 1.0 / tied, 0.0)
    return tuple(x[0, :N] for x in found), d_hidden[:N], d_table  # pyright: ignore[reportReturnType]


def _scores(
    static: Any, hidden: jax.Array, table: jax.Array, targets: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weights [V, N], top [tiles, 1, N], and of each tile [tiles, 3, N]: sum of exp(logit - top), the target's logit
    or 0, how often top is met). A soft-cap's derivative is in the weights and not in their sum.
    """
    tiles, (N, D), V = static.tiles, hidden.shape, table.shape[0]
    rows, width = tiles.rows, columns(D, tiles.width)
    steps = D // width

    def finish(
        logits: Any, first: Any, real_ref: Any, targets_ref: Any, exps_ref: Any, top_ref: Any, sums_ref: Any
    ) -> None:
        logits = logits * static.scale
        tanh = None
        if static.soft_cap is not None:
            tanh = jnp.tanh(logits * (1.0 / static.soft_cap))
            logits = tanh * static.soft_cap
        row = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        logits = jnp.where(row < real_ref[0], logits, MASKED)
        top = jnp.max(logits, axis=0, keepdims=True)
        exps = jnp.exp(logits - top)
        top_ref[0] = top
        sums_ref[0, 0:1] = jnp.sum(exps, axis=0, keepdims=True)
        sums_ref[0, 1:2] = jnp.sum(jnp.where(row == targets_ref[...], logits, 0.0), axis=0, keepdims=True)
        sums_ref[0, 2:3] = jnp.sum(jnp.where(logits == top, 1.0, 0.0), axis=0, keepdims=True)
        exps_ref[...] = (exps if tanh is None else exps * (1.0 - tanh * tanh)).astype(exps_ref.dtype)

    def kernel(real_ref: Any, targets_ref: Any, hidden_ref: Any, table_ref: Any, *refs: Any) -> None:
        first, step = pl.program_id(0) * rows, pl.program_id(1)
        if steps == 1:
            finish(dot(table_ref[...], hidden_ref[...], (1, 1)), first, real_ref, targets_ref, *refs)
            return
        sum_ref = refs[3]

        @pl.when(step == 0)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        # In one run of instructions: what is read and written hides beneath the product.
        @pl.when(step < steps - 1)
        def _() -> None:
            sum_ref[...] += dot(table_ref[...], hidden_ref[...], (1, 1))

        @pl.when(step == steps - 1)
        def _() -> None:
            last = dot(table_ref[...], hidden_ref[...], (1, 1))
            finish(sum_ref[...] + last, first, real_ref, targets_ref, *refs[:3])

    # What does not change from step to step needs no second buffer.
    once = {"pipeline_mode": pl.Buffered(1)} if steps == 1 else {}
    return pl.pallas_call(
        kernel,
        grid=(V // rows, steps),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, N), lambda i, k: (0, 0)),
            pl.BlockSpec((N, width), lambda i, k: (0, k), **once),
            pl.BlockSpec((rows, width), lambda i, k: (i, k)),
        ],
        out_specs=[
            pl.BlockSpec((rows, N), lambda i, k: (i, 0)),
            pl.BlockSpec((1, 1, N), lambda i, k: (i, 0, 0)),
            pl.BlockSpec((1, 3, N), lambda i, k: (i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((V, N), hidden.dtype),
            jax.ShapeDtypeStruct((V // rows, 1, N), jnp.float32),
            jax.ShapeDtypeStruct((V // rows, 3, N), jnp.float32),
        ],
        scratch_shapes=[] if steps == 1 else [pltpu.VMEM((rows, N), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), **tiles.params),
        cost_estimate=_cost(N, V, D, table.nbytes + V * N * hidden.dtype.itemsize, V * N),
        interpret=static.interpret,
        name=NAMES[0],
    )(real.reshape(1), targets, hidden, table)


def _d_logits(tile: Any, rows: int, exps_ref: Any, of_tile_ref: Any, wanted_ref: Any, targets_ref: Any) -> jax.Array:
    """The logits' gradient of a tile, in the weights' dtype, from rows of one or more of `_scores`'s tiles."""
    exps = exps_ref[...].astype(jnp.float32)
    count = of_tile_ref.shape[0]
    size = rows // count
    scaled = [exps[n * size : (n + 1) * size] * of_tile_ref[n] for n in range(count)]
    row = tile * rows + jax.lax.broadcasted_iota(jnp.int32, exps.shape, 0)
    whole = jnp.concatenate(scaled, axis=0) if count > 1 else scaled[0]
    return (whole - jnp.where(row == targets_ref[...], wanted_ref[...], 0.0)).astype(exps_ref.dtype)


def _of_weights(tiles: Tiles, rows: int, N: int) -> list[pl.BlockSpec]:
    """Of `_d_logits`'s operands, on a grid (columns, tiles)."""
    return [
        pl.BlockSpec((rows, N), lambda j, i: (i, 0)),
        pl.BlockSpec((rows // tiles.rows, 1, N), lambda j, i: (i, 0, 0)),
        pl.BlockSpec((1, N), lambda j, i: (0, 0)),
        pl.BlockSpec((1, N), lambda j, i: (0, 0)),
    ]


def _d_hidden(static: Any, exps: Any, of_tile: Any, wanted: Any, targets: Any, table: Any) -> jax.Array:
    """Gradient of the hidden states [N, D], float32."""
    tiles, (V, N), D = static.tiles, exps.shape, table.shape[1]
    rows, width = tiles.hidden_rows, columns(D, tiles.hidden_width)

    def kernel(
        exps_ref: Any, of_tile_ref: Any, wanted_ref: Any, targets_ref: Any, table_ref: Any, out_ref: Any
    ) -> None:
        tile = pl.program_id(1)

        @pl.when(tile == 0)
        def _() -> None:
            out_ref[...] = jnp.zeros_like(out_ref)

        d_logits = _d_logits(tile, rows, exps_ref, of_tile_ref, wanted_ref, targets_ref)
        # In one run of instructions: what is read and written hides beneath the product.
        out_ref[...] += dot(d_logits, table_ref[...], (0, 0))

    return pl.pallas_call(
        kernel,
        grid=(D // width, V // rows),
        in_specs=[*_of_weights(tiles, rows, N), pl.BlockSpec((rows, width), lambda j, i: (i, j))],
        out_specs=pl.BlockSpec((N, width), lambda j, i: (0, j)),
        out_shape=jax.ShapeDtypeStruct((N, D), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), **tiles.params),
        cost_estimate=_cost(N, V, D, table.nbytes + D // width * exps.nbytes, 0),
        interpret=static.interpret,
        name=NAMES[1],
    )(exps, of_tile, wanted, targets, table)


def _d_table(static: Any, exps: Any, of_tile: Any, wanted: Any, targets: Any, hidden: Any, so_far: Any) -> jax.Array:
    """`so_far` [V, D] plus the table's gradient, in place."""
    tiles, (V, N), D = static.tiles, exps.shape, hidden.shape[1]
    rows, width = tiles.table_rows, columns(D, tiles.table_width)

    def kernel(
        exps_ref: Any, of_tile_ref: Any, wanted_ref: Any, targets_ref: Any, hidden_ref: Any, before: Any, after: Any
    ) -> None:
        d_logits = _d_logits(pl.program_id(1), rows, exps_ref, of_tile_ref, wanted_ref, targets_ref)
        after[...] = before[...] + dot(d_logits, hidden_ref[...], (1, 0))

    tile = pl.BlockSpec((rows, width), lambda j, i: (i, j))
    return pl.pallas_call(
        kernel,
        grid=(D // width, V // rows),
        in_specs=[
            *_of_weights(tiles, rows, N),
            pl.BlockSpec((N, width), lambda j, i: (0, j), pipeline_mode=pl.Buffered(1)),
            tile,
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct((V, D), jnp.float32),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), **tiles.params),
        cost_estimate=_cost(N, V, D, 2 * so_far.nbytes + D // width * exps.nbytes, 0),
        interpret=static.interpret,
        name=NAMES[2],
    )(exps, of_tile, wanted, targets, hidden, so_far)


def _cost(N: int, V: int, D: int, bytes_accessed: int, transcendentals: int) -> pl.CostEstimate:
    return pl.CostEstimate(flops=2 * N * V * D, bytes_accessed=bytes_accessed, transcendentals=transcendentals)
