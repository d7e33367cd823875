"""What a step of decoding costs a core before it has run on one: cycles that the compiler simulates where it can, waits
for memory included, else instruction bundles, which are not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pallas_kernels.attention.masks import Mask
from pallas_kernels.decode_attention import tpu, xla

ROWS, HEADS, ENTRIES, WIDTH = 8, 16, 8192, 256
"""The shape of the table's costs: full caches of one key/value head, bfloat16."""


def program(
    chip: str, size: int, impl: str = "tpu", rows: int = ROWS, heads: int = HEADS, entries: int = ENTRIES
) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """One new token of each row against its full cache, and operands."""

    def step(q: Any, k: Any, v: Any) -> jax.Array:
        shared: dict[str, Any] = {"mask": Mask(), "scale": WIDTH**-0.5}
        positions = jnp.full((rows, 1), entries - 1, jnp.int32)
        if impl == "xla":
            return xla.decode_attention(q, k, v, positions, jnp.int32(0), **shared)
        cores = aot.CORES.get(chip, 1)
        return tpu.decode_attention(q, k, v, positions, 0, size=size, cores=cores, filled=entries, **shared)

    cache = jax.ShapeDtypeStruct((1, rows, entries, 1, WIDTH), "bfloat16")
    return step, [jax.ShapeDtypeStruct((rows, 1, heads, WIDTH), "bfloat16"), cache, cache]


def bytes_read(rows: int = ROWS, entries: int = ENTRIES) -> int:
    """Of keys and values, by one step."""
    return 2 * rows * entries * WIDTH * 2


def cost(chip: str, size: int) -> tuple[int, str]:
    """(cost of the busiest core, "simulated" or "bundles") of `program`. Raises CompileError."""
    target = "pallas_kernels.decode_attention.cost:program"
    if chip in aot.SIMULATED:
        found = aot.simulated(chip, target, size=size)
        return next(cycles for name, cycles in found.items() if tpu.NAME in name), "simulated"
    listing = next(x for name, x in aot.listings(chip, target, size=size).items() if tpu.NAME in name)
    inside = [block for block in listing if block["depth"]]
    # Of the two kinds of block a full cache has only the one without a mask, which comes first.
    products = [block["bundles"] for block in inside if block["products"]]
    step = products[0] + sum(block["bundles"] for block in inside if not block["products"])
    return ROWS * -(-ENTRIES // size) * step // aot.CORES.get(chip, 1), "bundles"
