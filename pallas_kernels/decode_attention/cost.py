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
from pallas_kernels.decode_attention.case import MOST_ROWS

ROWS, HEADS, ENTRIES = 8, 16, 8192
"""The shape of the table's costs: full caches of one key/value head."""


def program(
    chip: str, size: int, head_dim: int = 256, dtype: str = "bfloat16", impl: str = "tpu", interpret: Any = False
) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """One new token of each row against its full cache, and operands."""

    def step(q: Any, k: Any, v: Any) -> jax.Array:
        shared: dict[str, Any] = {"mask": Mask(), "scale": head_dim**-0.5}
        positions = jnp.full((ROWS, 1), ENTRIES - 1, jnp.int32)
        if impl == "xla":
            return xla.decode_attention(q, k, v, positions, jnp.int32(0), **shared)
        shared |= {"cores": aot.CORES.get(chip, 1), "filled": ENTRIES, "interpret": interpret}
        return tpu.decode_attention(q, k, v, positions, 0, size=size, **shared)

    cache = jax.ShapeDtypeStruct((1, ROWS, ENTRIES, 1, head_dim), dtype)
    return step, [jax.ShapeDtypeStruct((ROWS, 1, HEADS, head_dim), dtype), cache, cache]


def most(chip: str, size: int, head_dim: int, dtype: str) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """What takes most memory: as many queries as a kernel takes, on ragged rows, with a window, a prefix, ALiBi and a
    soft-cap.
    """
    queries = MOST_ROWS // HEADS

    def step(q: Any, k: Any, v: Any, positions: Any, prefix: Any) -> jax.Array:
        given: dict[str, Any] = {"mask": Mask(window=1000), "scale": 1.0, "prefix": prefix, "soft_cap": 30.0}
        given |= {"cores": aot.CORES.get(chip, 1), "alibi_slopes": jnp.ones(HEADS)}
        return tpu.decode_attention(q, k, v, positions, 0, size=size, **given)

    cache = jax.ShapeDtypeStruct((1, 3, ENTRIES, 1, head_dim), dtype)
    of_rows = [jax.ShapeDtypeStruct(shape, "int32") for shape in ((3, queries), (3,))]
    return step, [jax.ShapeDtypeStruct((3, queries, HEADS, head_dim), dtype), cache, cache, *of_rows]


def bytes_read(rows: int = ROWS, entries: int = ENTRIES, head_dim: int = 256) -> int:
    """Of bfloat16 keys and values, by one step."""
    return 2 * rows * entries * head_dim * 2


def question(chip: str, size: int, head_dim: int, dtype: str) -> aot.Question:
    """What `program` costs."""

    def count(found: dict[str, list[aot.Block]]) -> int:
        inside = [block for block in aot.of_kernel(found, tpu.NAME) if block["depth"]]
        # Of the two kinds of block a full cache has only the one without a mask, which comes first.
        products = [block["bundles"] for block in inside if block["products"]]
        step = products[0] + sum(block["bundles"] for block in inside if not block["products"])
        return ROWS * -(-ENTRIES // size) * step // aot.CORES.get(chip, 1)

    return aot.Question(
        target="pallas_kernels.decode_attention.cost:program",
        arguments={"size": size, "head_dim": head_dim, "dtype": dtype},
        # Float32's products are loops of their own in the listing.
        count=None if dtype == "float32" else count,
        cycles=lambda found: aot.of_kernel(found, tpu.NAME),
    )
