"""What a part of the tokens costs a core before it has run on one, by kernel: cycles that the compiler simulates where
it can, waits for memory included, else instruction bundles, which are not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pallas_kernels.linear_cross_entropy import total, tpu

ROWS, WIDTH = 65536, 4096
"""Of the table's costs. The profiler unrolls every loop: it takes minutes and gigabytes, and more rows cost as much
each.
"""


def program(
    chip: str, tiles: dict[str, Any], interpret: Any = False, width: int = WIDTH, soft_cap: float | None = None
) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """One part of the tokens, and operands."""
    del chip
    sizes = tpu.Tiles(**tiles)
    static = total.Static(
        z_loss=1e-4,
        scale=width**-0.5,
        soft_cap=soft_cap,
        rows=ROWS,
        axis=None,
        tokens=sizes.tokens,
        part=ROWS,
        tiles=sizes,
        interpret=interpret,
    )

    def step(hidden: Any, table: Any, targets: Any, weights: Any, d_table: Any) -> Any:
        return tpu.part(static, hidden, table, targets, weights, jnp.int32(ROWS), d_table)

    of_tokens = [jax.ShapeDtypeStruct((sizes.tokens,), dtype) for dtype in ("int32", "float32")]
    arrays = [jax.ShapeDtypeStruct((n, width), "bfloat16") for n in (sizes.tokens, ROWS)]
    return step, [*arrays, *of_tokens, jax.ShapeDtypeStruct((ROWS, width), "float32")]


def floor(chip: str, tokens: int) -> float:
    """Cycles of one product of a part, on the matrix units of one core."""
    return 2 * tokens * ROWS * WIDTH / aot.FLOPS_PER_CYCLE[chip] / aot.CORES.get(chip, 1)


def question(chip: str, tiles: tpu.Tiles) -> aot.Question:
    """What `program` costs, by kernel."""

    def count(found: dict[str, list[aot.Block]]) -> dict[str, int]:
        return {name: _bundles(chip, name, tiles, aot.of_kernel(found, name)) for name in tpu.NAMES}

    def cycles(found: dict[str, int]) -> dict[str, int]:
        result = {name: aot.of_kernel(found, name) for name in tpu.NAMES}
        if min(result.values()) < floor(chip, tiles.tokens):
            raise aot.ProfileError(f"{result} cycles simulated: the matrix units need more")
        return result

    return aot.Question(
        target="pallas_kernels.linear_cross_entropy.cost:program",
        arguments={"tiles": dataclasses.asdict(tiles)},
        count=count,
        cycles=cycles,
    )


def _bundles(chip: str, name: str, tiles: tpu.Tiles, listing: list[aot.Block]) -> int:
    """Of a kernel's listing, by how often each of its blocks runs: in all steps, or in the first or last of a run."""
    inside = [block for block in listing if block["depth"]]
    scores, adds = name == tpu.NAMES[0], name == tpu.NAMES[2]
    index = tpu.NAMES.index(name)
    rows = (tiles.rows, tiles.hidden_rows, tiles.table_rows)[index]
    wide = WIDTH // tpu.columns(WIDTH, (tiles.width, tiles.hidden_width, tiles.table_width)[index])
    steps = ROWS // rows * wide
    products = [block["bundles"] for block in inside if block["products"]]
    # Zeroing, a run of stores: once a tile of scores, once a column of the hidden states' gradient.
    size = tiles.tokens * (tiles.rows if scores else tpu.columns(WIDTH, tiles.hidden_width)) // 1024
    zeroing = [x["bundles"] for x in inside if not x["products"] and not adds and x["bundles"] >= size]
    rest = sum(x["bundles"] for x in inside if not x["products"]) - sum(zeroing)
    total = steps * rest
    if scores and wide > 1:
        inner, last = products
        total += ROWS // rows * ((wide - 1) * inner + last + sum(zeroing))
    else:
        (product,) = products
        total += steps * product + wide * sum(zeroing)
    return total // aot.CORES.get(chip, 1)
