"""What one of our attention kernels costs a core before it has run on one: cycles that the compiler simulates where it
can, else instruction bundles, the listing's blocks times how often each runs. Waits for memory and for the matrix units
are in the former only. Both rank and guard; neither is a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pallas_kernels.attention import table, tpu, tpu_backward, tpu_forward
from pallas_kernels.attention.masks import Mask, fixed_ranges
from pallas_kernels.attention.tpu_plan import CHUNK, LANES, Blocks, Plan

PASSES = {"forward": tpu_forward.NAME, "backward": tpu_backward.NAME}


def program(
    chip: str,
    length: int,
    heads: int,
    head_dim: int,
    dtype: str,
    tuning: dict[str, Any],
    ranged: bool = False,
    both: bool = True,
) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """Causal attention of one sequence with one key/value head, forward and (`both`) backward, and its operands. With
    `ranged`, segments, a prefix, a window, ALiBi and a soft-cap too: what takes most memory.
    """
    del chip
    limits = table.as_tuning(tuning)
    mask = Mask(window=length // 2) if ranged else Mask()

    def attend(q: Any, k: Any, v: Any, bounds: Any) -> jax.Array:
        extras: dict[str, Any] = {"alibi_slopes": jnp.full((heads,), 0.5), "soft_cap": 30.0} if ranged else {}
        fixed = None if ranged else mask
        return tpu.attention(q, k, v, *bounds, mask=fixed, scale=head_dim**-0.5, tuning=limits, **extras)[0]

    def forward(q: Any, k: Any, v: Any, first: Any, stop: Any) -> jax.Array:
        bounds = (first, stop) if ranged else tuple(jnp.asarray(x)[None] for x in fixed_ranges(mask, length))
        return attend(q, k, v, bounds)

    def gradient(q: Any, k: Any, v: Any, first: Any, stop: Any, do: Any) -> Any:
        return jax.vjp(lambda q, k, v: forward(q, k, v, first, stop), q, k, v)[1](do)

    q, kv = (1, length, heads, head_dim), (1, length, 1, head_dim)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, kv, kv)]
    operands += [jax.ShapeDtypeStruct((1, length), "int32")] * 2
    return (gradient, [*operands, operands[0]]) if both else (forward, operands)


def plan_of(which: str, length: int, heads: int, blocks: Blocks) -> Plan:
    """The plan of `program` without `ranged`."""
    return Plan(
        length=length,
        keys=-(-length // CHUNK) * CHUNK,
        heads=heads,
        tokens=blocks.tokens(heads),
        largest=blocks.keys,
        cores=blocks.cores if which == "backward" else 1,
        mask=Mask(),
        fields=(),
        scale=1.0,
        soft_cap=None,
        signed=False,
    )


def busiest_core(which: str, plan: Plan, cores: int, width: int, listing: list[aot.Block]) -> int:
    """Bundles of the core that issues most, for a causal mask."""
    steps = plan.blocks // cores
    zeroing = 2 * plan.keys * width // 1024 if which == "backward" else 0
    totals = []
    for core in range(cores):
        if which == "forward":
            mine = [int(tpu_forward.zigzag(core * steps + step, plan.blocks)) for step in range(steps)]
        else:
            mine = [int(tpu_backward.block_of(core, step, cores)) for step in range(steps)]
        totals.append(_bundles(plan, mine, listing, zeroing))
    return max(totals)


def _bundles(plan: Plan, mine: list[int], listing: list[aot.Block], zeroing: int) -> int:
    """Of one core's query blocks `mine`: which tiles each visits decides how often a block of the listing runs.
    zeroing: vector registers that are stored once a sequence, before the first tile.
    """
    tile = plan.tile // CHUNK
    firsts, masked, whole = [0] * tile, 0, 0
    for _, full, high, end in (tuple(int(x) for x in plan.bounds(block)) for block in mine):
        rest = (end - 1 - full) % tile
        tiles = (end - 1 - rest - full) // tile
        firsts[rest] += 1
        whole += min((high - full) // tile, tiles)
        masked += tiles - min((high - full) // tile, tiles)
    # In the listing's order: each size that a first tile may have, the loop of masked tiles, that of whole ones.
    loops = [whole] if plan.one_chunk_of_diagonal else [masked, whole]
    total, seen, first = 0, [], False
    for block in listing:
        if block["depth"] == 0:
            total += block["bundles"]
        elif block["products"] and block["depth"] > 1:
            if block["loop"] not in seen:
                seen.append(block["loop"])
            total += block["bundles"] * loops[seen.index(block["loop"])]
        elif block["products"]:
            total += block["bundles"] * firsts.pop(0)
            first = True
        elif block["depth"] == 1:
            once = zeroing and not first and block["bundles"] >= zeroing // 2
            total += block["bundles"] * (1 if once else len(mine))
    assert not firsts and len(seen) <= len(loops), f"tiles of {plan} and of the listing differ"
    return total


def kernel(found: dict[str, list[aot.Block]], name: str) -> list[aot.Block]:
    """The listing of the kernel called `name`, which jax's transformations add to (`jvp_name_`)."""
    return next(listing for full, listing in found.items() if name in full)


def measure(chip: str, length: int, heads: int, head_dim: int, dtype: str, tuning: dict[str, Any]) -> dict[str, int]:
    """Pass to bundles of the busiest core, for one causal sequence. Raises CompileError."""
    found = aot.listings(
        chip,
        "pallas_kernels.attention.bundles:program",
        length=length,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        tuning=tuning,
    )
    limits = table.as_tuning(tuning)
    width = -(-head_dim // LANES) * LANES
    result = {}
    for which, blocks in (("forward", limits.forward), ("backward", limits.backward)):
        plan = plan_of(which, length, heads, blocks)
        result[which] = busiest_core(which, plan, aot.CORES.get(chip, 1), width, kernel(found, PASSES[which]))
    return result


def simulate(
    chip: str, length: int, heads: int, head_dim: int, dtype: str, tuning: dict[str, Any], both: bool = True
) -> dict[str, int]:
    """Pass to simulated cycles of one core, for one causal sequence; forward only unless `both`. Raises CompileError,
    also where a figure is below what the matrix units need, and ValueError for a chip that is not simulated.
    """
    shape: dict[str, Any] = dict(length=length, heads=heads, head_dim=head_dim, dtype=dtype, tuning=tuning, both=both)
    found = aot.simulated(chip, "pallas_kernels.attention.bundles:program", **shape)
    result = {}
    for which, products in (("forward", tpu_forward.PRODUCTS), ("backward", tpu_backward.PRODUCTS))[: 1 + both]:
        result[which] = next(cycles for name, cycles in found.items() if PASSES[which] in name)
        flops = products * heads * head_dim * length * (length + 1)
        least = flops / aot.FLOPS_PER_CYCLE[chip] / aot.CORES.get(chip, 1)
        if result[which] < least:
            raise aot.CompileError(f"{which}: {result[which]} cycles simulated, the matrix units need {least:.0f}")
    return result


def cost(chip: str, *shape: Any, tuning: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Pass to (cost, "simulated" or "bundles"): simulated where the compiler does (its profiler aborts on TPU v4, and
    on the backward pass for v5p).
    """
    found: dict[str, tuple[int, str]] = {}
    if chip in aot.SIMULATED:
        for both in (True, False):
            try:
                cycles = simulate(chip, *shape, tuning=tuning, both=both)
            except aot.CompileError:
                continue
            found = {which: (cycles[which], "simulated") for which in cycles}
            break
    if len(found) < len(PASSES):
        found = {which: (count, "bundles") for which, count in measure(chip, *shape, tuning=tuning).items()} | found
    return found
