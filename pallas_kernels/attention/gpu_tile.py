"""What a warpgroup does with tiles: products, layouts, scores.

Mosaic's interpreter has no layouts and no `wgmma` with a transposed operand or one in registers. Interpreted, the
functions here that touch those are plain operations on the same values; all that calls them, which is the order of the
copies, the barriers, the masks and the sums, is the same program either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import reference
from pallas_kernels.attention.gpu_plan import COMPUTE, FLOOR, LN2, LOG2E, MASKED, ROWS, Plan, Ring

T = TypeVar("T")

MATRIX = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
"""A number for each row of a matrix."""
COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""A number for each column of a matrix."""

ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]

Sums = tuple[jax.Array, jax.Array, jax.Array]
"""Online softmax of a warpgroup's rows: largest score, sum of weights, weighted values [ROWS, D]."""

REALS = ("slope", "lse", "delta")
"""Numbers of queries that are float32; the others are int32: "stop", "first", "index"."""


def tile_memory(plan: Plan, count: int, rows: int, width: int, dtype: Any) -> Any:
    """Shared memory for `count` matrices as the matrix units and the copies want them."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = () if plan.interpret else (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, width), dtype, transforms=transforms)


def full(plan: Plan, shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    """A constant in registers."""
    constant = jnp.full(shape, value, jnp.float32)
    return constant if plan.interpret else plgpu.layout_cast(constant, layout)


def over(x: jax.Array, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """A vector as a matrix."""
    return jax.lax.broadcast_in_dim(x, shape, [0 if layout == ROW else 1])


def products(plan: Plan, *pairs: tuple[Any, Any], then: Callable[[], None] = lambda: None) -> list[jax.Array]:
    """a b^T of each pair of matrices in shared memory, float32; all are under way before `then` is called and the first
    is awaited.
    """
    if plan.interpret:
        found = _read(lambda: [_dot(a[...], b[...], 1) for a, b in pairs])
        then()
        return found

    def run(*sums: Any) -> list[jax.Array]:
        for sum_ref, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(sum_ref, a, plgpu.transpose_ref(b, (1, 0)))
        then()
        return [sum_ref[...] for sum_ref in sums]

    return pl.run_scoped(run, *(ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in pairs))


def add_product(plan: Plan, total: jax.Array, a: Any, b: Any) -> jax.Array:
    """total + a b: a in registers or in shared memory, b in shared memory."""
    if plan.interpret:
        return _read(lambda: total + _dot(a[...], b[...], 0))

    def run(sum_ref: Any) -> jax.Array:
        sum_ref[...] = total
        plgpu.wgmma(sum_ref, a, b)
        return sum_ref[...]

    return pl.run_scoped(run, ACC(total.shape, jnp.float32))


def _read(of_tiles: Callable[[], T]) -> T:
    """Interpreted, what is read of shared memory as `wgmma` reads it: through the asynchronous proxy, to which the
    copies belong too, so that a barrier alone lets a copy write there again. jax 0.11's race detector knows proxies.
    """
    found = of_tiles()
    plgpu.commit_smem()
    return found


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def scores(
    plan: Plan, products: jax.Array, key: Any, masked: bool, numbers_of: dict[str, jax.Array], layout: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Scores z of a tile, MASKED where they are not seen (a weight is exp2(unit z)), and the tanh of the soft-cap.

    products: q k^T. layout: ROW where rows are queries, COLUMN where columns are; numbers_of: of the queries. key: ()
    -> int32 matrix of the keys' numbers.
    """
    shape = (products.shape[0], products.shape[1])
    z, tanh = products, None
    if plan.soft_cap is not None:
        # tanh.approx is good to 11 bits only; this is two transcendentals.
        double = jnp.exp2(products * (2.0 * LOG2E * plan.scale / plan.soft_cap))
        tanh = 1.0 - 2.0 / (double + 1.0)
        z = tanh * (plan.soft_cap * LOG2E)
    elif plan.alibi:
        z = z * (plan.scale * LOG2E)
    if plan.alibi:
        distance = jnp.abs(over(numbers_of["index"], shape, layout) - key()).astype(jnp.float32)
        z = z - over(numbers_of["slope"], shape, layout) * distance
    if not masked:
        return z, tanh
    seen = key() < over(numbers_of["stop"], shape, layout)
    if plan.ranged:
        seen = seen & (key() >= over(numbers_of["first"], shape, layout))
    return jnp.where(seen, z, MASKED), tanh


def keys_as_columns(plan: Plan, places_ref: Any, start: Any, shape: tuple[int, ...]) -> jax.Array:
    """Numbers of the keys from `start` on, for a matrix [queries, keys].

    They are read from memory: made in registers, they would stay there throughout the loop, 16 that the kernel of dQ
    does not have.
    """
    places = places_ref.at[pl.ds(start, shape[1])]
    found = places[...] if plan.interpret else plgpu.load(places, (), layout=COLUMN, optimized=False)
    return over(found, shape, COLUMN)


def counted(plan: Plan, start: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Numbers of the keys from `start` on along `axis` of a matrix, made in registers."""
    places = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return (places if plan.interpret else plgpu.layout_cast(places, MATRIX)) + start


def weigh(plan: Plan, z: jax.Array, so_far: Sums) -> tuple[jax.Array, Sums]:
    """Weights of a tile's scores [queries, keys], and the sums with all but its values added (Milakov and Gimelshein
    2018).
    """
    top, total, values = so_far
    new = jnp.maximum(top, jnp.max(z, axis=1))
    weights = jnp.exp2(z * plan.unit - over(new * plan.unit, z.shape, ROW))
    keep = jnp.exp2((top - new) * plan.unit)
    return weights, (new, total * keep + jnp.sum(weights, axis=1), values * over(keep, values.shape, ROW))


def no_sums(plan: Plan) -> Sums:
    """Of a warpgroup's rows before the first tile."""
    return full(plan, (ROWS,), FLOOR, ROW), full(plan, (ROWS,), 0.0, ROW), full(plan, (ROWS, plan.width), 0.0, MATRIX)


def finish(plan: Plan, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what all values are multiplied with, log-sum-exp) of each row; where it saw nothing, (1, EMPTY)."""
    some = total > 0.0
    total = jnp.where(some, total, 1.0)
    return 1.0 / total, jnp.where(some, top * (plan.unit * LN2) + jnp.log(total), reference.EMPTY)


def for_tiles(bounds: Any, tile: Any, carry: Any, ranged: bool) -> Any:
    """tile(index, masked, carry) -> carry over [low, full), [full, high) and [high, end)."""
    low, begin, high, end = bounds
    if ranged:
        carry = jax.lax.fori_loop(low, begin, lambda i, c: tile(i, True, c), carry)
    carry = jax.lax.fori_loop(begin, high, lambda i, c: tile(i, False, c), carry)
    return jax.lax.fori_loop(high, end, lambda i, c: tile(i, True, c), carry)


def bounds_of(table_ref: Any, *index: Any) -> tuple[Any, Any, Any, Any]:
    """Four numbers of a table in memory."""
    a, b, c, d = (table_ref[(*index, i)] for i in range(4))
    return a, b, c, d


def copy_in_turn(count: Any, slots: int, empty: list[Any], copy: Any) -> None:
    """The copying warpgroup's loop: copy(step, slot) for `count` steps, each into a slot that all have left.

    It stays until the last tile is read, so that every phase of a barrier is seen by those who wait at it.
    """

    def one(step: Any, carry: None) -> None:
        slot = jax.lax.rem(step, jnp.int32(slots))

        @pl.when(step >= slots)
        def _() -> None:
            for barrier in empty:
                plgpu.barrier_wait(barrier.at[slot])

        @pl.when(step < count)
        def _() -> None:
            copy(step, slot)

    jax.lax.fori_loop(0, count + jnp.minimum(count, slots), one, None)


class KeyBlock(NamedTuple):
    """A block of query rows against the tiles of keys that they reach, as a warpgroup sees it.

    rows: of the warpgroup, if it is one that computes. bounds: of `key_bounds`.
    """

    sequence: Any
    warpgroup: Any
    rows: Any
    bounds: tuple[Any, Any, Any, Any]

    def slots(self, ring: Ring, index: Any) -> tuple[Any, Any]:
        """Those of a tile's keys and of its values."""
        step = 2 * (index - self.bounds[0])
        return jax.lax.rem(step, jnp.int32(ring.slots)), jax.lax.rem(step + 1, jnp.int32(ring.slots))


def key_block(table_ref: Any) -> KeyBlock:
    """This block. Under a causal mask the last ones have most to do: they begin first."""
    sequence, warpgroup = jax.lax.axis_index("sequence"), jax.lax.axis_index("warpgroup")
    block = table_ref.shape[1] - 1 - jax.lax.axis_index("block")
    rows = pl.ds(block * (COMPUTE * ROWS) + warpgroup * ROWS, ROWS)
    return KeyBlock(sequence, warpgroup, rows, bounds_of(table_ref, sequence, block))


def copy_keys_and_values(ring: Ring, here: KeyBlock, k_ref: Any, v_ref: Any, tiles: Any, full: Any, empty: Any) -> None:
    """The copying warpgroup's part: tiles of keys and of values in turn, from the first to the last of the bounds."""
    bounds = here.bounds

    def copy(step: Any, slot: Any) -> None:
        keys = pl.ds((bounds[0] + step // 2) * ring.keys, ring.keys)
        for of_values, ref in enumerate((k_ref, v_ref)):

            @pl.when(jax.lax.rem(step, 2) == of_values)
            def _(ref: Any = ref) -> None:
                plgpu.copy_gmem_to_smem(ref.at[here.sequence, keys], tiles.at[slot], full.at[slot])

    @pl.when(here.warpgroup == COMPUTE)
    def _() -> None:
        few_registers()
        copy_in_turn(2 * (bounds[3] - bounds[0]), ring.slots, [empty], copy)


def few_registers() -> None:
    """For a warpgroup that copies."""
    plgpu.set_max_registers(24, action="decrease")


def most_registers() -> None:
    """For a warpgroup that computes: what the copying one leaves, shared by COMPUTE."""
    plgpu.set_max_registers(240, action="increase")


def stacked(of_rows: dict[str, jax.Array]) -> jax.Array:
    """int32 [N, F, R] of F numbers a row, [N, R] each; float32 ones by their bits."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in of_rows.values()]
    return jnp.stack(bits, axis=1)


def vector(plan: Plan, ref: Any, index: Any, layout: Any) -> jax.Array:
    """A row [n] of a [F, n] of any memory, a number for each row or column of a matrix."""
    return ref[index] if plan.interpret else plgpu.load(ref, (index,), layout=layout, optimized=False)


def numbers(plan: Plan, names: tuple[str, ...], ref: Any, layout: Any) -> dict[str, jax.Array]:
    """By name, the numbers of queries in a [F, n] of any memory."""
    found = {}
    for index, name in enumerate(names):
        bits = vector(plan, ref, index, layout)
        found[name] = jax.lax.bitcast_convert_type(bits, jnp.float32) if name in REALS else bits
    return found


def interpreter(interpret: Any) -> Any:
    """`InterpretGPUParams`, of which True means the defaults; False compiles for a GPU."""
    if interpret is not True:
        return interpret
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not public as of jax 0.11

    return InterpretGPUParams()


def launch(name: str, grid: tuple[int, ...], grid_names: tuple[str, ...], interpret: Any) -> dict[str, Any]:
    """What all the kernels are launched with. jax 0.11 made another lowering its default: this one is named."""
    return dict(
        grid=grid,
        grid_names=grid_names,
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        interpret=interpret or None,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Along rows of `wgmma`'s layout, the only ones here, a warp has all that it adds up.
            reduction_scratch_bytes=0,
        ),
    )
