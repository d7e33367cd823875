"""What one of our attention kernels costs a core before it has run on one: cycles that the compiler simulates where it
can, else instruction bundles, the listing's blocks times how often each runs. Waits for memory and for the matrix units
are in the former only. Both rank and guard; neither is a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import aot
from pallas_kernels.attention import table, tpu, tpu_backward, tpu_forward
from pallas_kernels.attention.masks import Mask, fixed_ranges
from pallas_kernels.attention.table import Shape
from pallas_kernels.attention.tpu_plan import CHUNK, LANES, Plan, bounds_table

PASSES = {"forward": tpu_forward.NAME, "backward": tpu_backward.NAME}
PRODUCTS = {"forward": tpu_forward.PRODUCTS, "backward": tpu_backward.PRODUCTS}

WINDOW, SEGMENT = 1024, 600
"""Keys that a query of a "window" row sees, half of the row if that is less, and tokens of a segment of a "packed" one,
which no block's edge meets.
"""

MOST_SIMULATED = 2048 * 16
"""Query rows (tokens times heads). The profiler unrolls every loop: of more, its time is minutes."""


def mask_of(shape: Shape) -> Mask:
    """The mask that a row of the table stands for; a packed row has segments besides."""
    return Mask(causal=shape.mask != "full", window=min(WINDOW, shape.length // 2) if shape.mask == "window" else None)


def ranges_of(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(first, stop) as `masks.ranges`, int32 [T] each."""
    first, stop = fixed_ranges(mask_of(shape), shape.length)
    if shape.mask == "packed":
        first = np.maximum(first, np.arange(shape.length, dtype=np.int32) // SEGMENT * SEGMENT)
    return first, stop


@dataclasses.dataclass(frozen=True)
class Part:
    """One call of a kernel: queries against a run of keys. first, stop: of its ranges, int32 [T] each."""

    plan: Plan
    pack: tpu.Packing
    first: np.ndarray
    stop: np.ndarray

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """`Plan.bounds` of each block, int [blocks, 4]."""
        return np.asarray(bounds_table(self.plan, *self._ranges)).reshape(-1, 4)

    @property
    def _ranges(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.first)[None], jnp.asarray(self.stop)[None]

    def program(self, which: str, out_dtype: Any, vmem_mib: int | None, interpret: Any) -> Any:
        """The kernel alone, a function of q, k, v and, backward, dO, packed."""
        plan, pack = self.plan, self.pack
        given = bounds_table(plan, *self._ranges) if plan.mask is None else None
        names = tuple(name for name in plan.fields if name not in ("lse", "delta"))
        slopes = jnp.full((pack.H,), 0.5) if "slope" in names else None
        fields = pack.fields(names, *self._ranges, slopes, jnp.int32(0))
        shared: dict[str, Any] = dict(vmem_mib=vmem_mib, interpret=interpret)

        def forward(q: Any, k: Any, v: Any) -> Any:
            rows = jnp.stack(fields, axis=1) if fields else None
            return tpu_forward.forward(plan, given, rows, q, k, v, out_dtype=out_dtype, **shared)

        def backward(q: Any, k: Any, v: Any, do: Any) -> Any:
            # Of scores of unit size no weight overflows.
            ends = [jnp.full((pack.B * pack.K, pack.padded * pack.G), value) for value in (30.0, 0.0)]
            rows = jnp.stack([*fields, *ends], axis=1)
            return tpu_backward.by_core(plan, given, rows, q, do, k, v, dq_dtype=out_dtype, **shared)

        return forward if which == "forward" else backward

    def operands(self, which: str, dtype: str) -> list[jax.ShapeDtypeStruct]:
        width = -(-self.pack.D // LANES) * LANES
        rows = jax.ShapeDtypeStruct((1, self.plan.blocks * self.plan.rows, width), dtype)
        keys = jax.ShapeDtypeStruct((1, self.plan.keys, width), dtype)
        return [rows, keys, keys] + ([rows] if which == "backward" else [])


def parts(which: str, shape: Shape, tuning: tpu.Tuning, everything: bool = False) -> list[Part]:
    """The calls of one pass's kernel for a row of `shape`, one for each run of as many keys as it may hold.

    everything: instead, one call of a few blocks against the most keys, with what takes most memory: ranges that are
    data, ALiBi of both signs and a soft-cap. What a kernel holds does not depend on how many blocks there are.
    """
    blocks = tuning.forward if which == "forward" else tuning.backward
    limit = tuning.forward_keys if which == "forward" else tuning.backward_keys
    length, keys = shape.length, shape.length
    if everything:
        length, keys = 2 * blocks.cores * blocks.tokens(shape.heads), limit
    static = tpu.Static(
        mask=None if shape.mask == "packed" or everything else mask_of(shape),
        reach=Mask(causal=False) if everything else mask_of(shape),
        scale=shape.head_dim**-0.5,
        soft_cap=30.0 if everything else None,
        signed=everything,
        tuning=tuning,
        interpret=False,
    )
    first, stop = (np.zeros(length, np.int32), np.full(length, keys, np.int32)) if everything else ranges_of(shape)
    found = []
    for part in tpu.parts(static.mask, static.reach, limit, length, keys):
        some = dataclasses.replace(static, mask=part.mask)
        fields = tpu.fields_of(some, slopes=everything or None)
        if which == "backward":
            fields = (*fields, "lse", "delta")
        q, k = (
            jax.ShapeDtypeStruct((1, n, heads, shape.head_dim), shape.dtype)
            for n, heads in ((part.high - part.low, shape.heads), (part.end - part.begin, 1))
        )
        pack = tpu.Packing(q, k, some, blocks, by_core=which == "backward")  # pyright: ignore[reportArgumentType]
        ends = (np.asarray(x)[0] for x in part.bounds(first[None], stop[None]))
        found.append(Part(pack.plan(fields), pack, *ends))
    return found


def program(
    chip: str,
    which: str,
    shape: dict[str, Any],
    tuning: dict[str, Any],
    everything: bool = False,
    summed: bool = True,
    whole: bool = False,
    interpret: Any = False,
) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The kernel of a pass alone, as packed, and its operands; for XLA's work beside it the profiler has no model.

    Of a row whose keys do not all fit, the first part, which the others are like; `whole`: all of them. everything: as
    `parts`; `summed`: with a float32 result, as what is added to other parts has.
    """
    del chip
    limits, of = table.as_tuning(tuning), Shape(**shape)
    calls = parts(which, of, limits, everything)
    blocks = limits.forward if which == "forward" else limits.backward
    wide = summed if everything else len(calls) > 1
    out_dtype = jnp.float32 if wide else jnp.dtype(of.dtype)
    used = calls if whole else calls[:1]
    kernels = [call.program(which, out_dtype, blocks.vmem_mib, interpret) for call in used]
    operands = [call.operands(which, of.dtype) for call in used]
    if len(kernels) == 1:
        return kernels[0], operands[0]
    each = len(operands[0])
    return (
        lambda *given: [kernel(*given[n * each : (n + 1) * each]) for n, kernel in enumerate(kernels)],
        [x for some in operands for x in some],
    )


def busiest_core(calls: list[Part], which: str, cores: int, width: int, listing: list[aot.Block]) -> int:
    """Bundles of the core that issues most. width: of the heads, padded."""
    totals = [0] * cores
    for call in calls:
        blocks = call.plan.blocks
        steps = blocks // cores
        assert blocks % cores == 0, f"{blocks} blocks, {cores} cores"
        zeroing = 2 * call.plan.keys * width // 1024 if which == "backward" else 0
        for core in range(cores):
            if which == "forward":
                mine = [int(tpu_forward.zigzag(core * steps + step, blocks)) for step in range(steps)]
            else:
                mine = [int(tpu_backward.block_of(core, step, cores)) for step in range(steps)]
            totals[core] += _bundles(call.plan, call.bounds[mine], listing, zeroing)
    return max(totals)


def _bundles(plan: Plan, bounds: np.ndarray, listing: list[aot.Block], zeroing: int) -> int:
    """Of one core's query blocks, by their `bounds`: which tiles each visits decides how often a block of the listing
    runs. zeroing: vector registers that are stored once a sequence, before the first tile.
    """
    tile = plan.tile // CHUNK
    firsts, chunks, masked, whole = [0] * tile, 0, 0, 0
    for low, full, high, end in bounds.tolist():
        rest = (end - 1 - full) % tile
        tiles = (end - 1 - rest - full) // tile
        unmasked = tiles if plan.one_chunk_of_diagonal else min((high - full) // tile, tiles)
        firsts[rest] += 1
        chunks += full - low
        masked += tiles - unmasked
        whole += unmasked
    # In the listing's order: each size that a first tile may have, the loops of masked chunks and tiles, of whole ones.
    loops = [*([chunks] if plan.from_below else []), *([] if plan.one_chunk_of_diagonal else [masked]), whole]
    if plan.mask is not None and not plan.mask.causal and plan.mask.window is None:
        # Each block sees the same, and the compiler knows: one of the branches is left, and a loop of one is none.
        firsts = [count for count in firsts if count]
        if whole == len(bounds):
            firsts, loops = [*firsts, whole], []
    branches = [block["bundles"] for block in listing if block["products"] and block["depth"] == 1]
    inner = [block for block in listing if block["products"] and block["depth"] > 1]
    numbers = list(dict.fromkeys(block["loop"] for block in inner))
    if (len(branches), len(numbers)) != (len(firsts), len(loops)):
        raise aot.ProfileError(f"the listing has other tiles than {plan}")
    total = sum(bundles * count for bundles, count in zip(branches, firsts, strict=True))
    total += sum(block["bundles"] * loops[numbers.index(block["loop"])] for block in inner)
    for block in listing:
        if block["depth"] == 0:
            total += block["bundles"]
        elif block["products"]:
            zeroing = 0
        elif block["depth"] == 1:
            once = 0 < zeroing <= 2 * block["bundles"]
            zeroing = 0 if once else zeroing
            total += block["bundles"] * (1 if once else len(bounds))
    return total


def floor(chip: str, which: str, shape: Shape) -> float:
    """Cycles that the matrix units of one core need for the pairs that the mask leaves."""
    first, stop = ranges_of(shape)
    pairs = int(np.sum(stop - first, dtype=np.int64))
    flops = 2 * PRODUCTS[which] * shape.heads * shape.head_dim * pairs
    return flops / aot.FLOPS_PER_CYCLE[chip] / aot.CORES.get(chip, 1)


def question(chip: str, which: str, shape: Shape, tuning: tpu.Tuning) -> aot.Question:
    """What a pass costs for one row of `shape`."""
    calls, name = parts(which, shape, tuning), PASSES[which]

    def count(found: dict[str, list[aot.Block]]) -> int:
        width = -(-shape.head_dim // LANES) * LANES
        return busiest_core(calls, which, aot.CORES.get(chip, 1), width, aot.of_kernel(found, name))

    def cycles(found: dict[str, int]) -> int:
        result, least = aot.of_kernel(found, name), floor(chip, which, shape)
        if result < least:
            raise aot.ProfileError(f"{which}: {result} cycles simulated, the matrix units need {least:.0f}")
        return result

    # Of several calls only the first is compiled.
    known = len(calls) == 1 and calls[0].plan.mask is not None and shape.length * shape.heads <= MOST_SIMULATED
    return aot.Question(
        target="pallas_kernels.attention.cost:program",
        arguments={"which": which, "shape": dataclasses.asdict(shape), "tuning": dataclasses.asdict(tuning)},
        at_hand={"whole": True},
        # Float32's products are loops of their own in the listing.
        count=None if shape.dtype == "float32" else count,
        cycles=cycles if known else None,
    )
