"""How many instruction bundles a core issues for one of our attention kernels: the listing's blocks times how often
each runs. Waits for memory and for the matrix units are not in it: it ranks and it guards, it is not a time.
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
    bounds = [tuple(int(x) for x in plan.bounds(block)) for block in mine]
    chunks = [high - full for _, full, high, _ in bounds]
    largest, *smaller = (size // CHUNK for size in plan.sizes)
    # In the listing's order: the loop of masked chunks below the first tile, that of whole tiles, then the rest once.
    loops = [] if plan.one_chunk_of_diagonal else [sum(end - 1 - high for _, _, high, end in bounds)]
    loops.append(sum(count // largest for count in chunks))
    rest = [sum((count // size) & 1 for count in chunks) for size in smaller]
    total, seen, first = 0, [], False
    for block in listing:
        if block["depth"] == 0:
            total += block["bundles"]
        elif block["products"] and block["depth"] > 1:
            if block["loop"] not in seen:
                seen.append(block["loop"])
            total += block["bundles"] * loops[seen.index(block["loop"])]
        elif block["products"] and seen and rest:
            total += block["bundles"] * rest.pop(0)
        elif block["depth"] == 1:
            once = zeroing and not first and not block["products"] and block["bundles"] >= zeroing // 2
            total += block["bundles"] * (1 if once else len(mine))
            first |= bool(block["products"])
    assert not rest, f"{len(rest)} tiles of {plan} are not in the listing"
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
