"""Block sizes of the Hopper kernel, from `tuned/nvidia_*.json`. Each row says where its numbers come from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pallas_kernels.attention import gpu_table
from pallas_kernels.attention.gpu_plan import ROWS
from pallas_kernels.attention.gpu_table import DTYPES
from pallas_kernels.decode_attention.case import MOST_ROWS, Case
from pallas_kernels.decode_attention.gpu_plan import EIGHT, Tuning, tile_of

FOLDER = Path(__file__).parent / "tuned"

Row = gpu_table.Row[Tuning]


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows of all files."""
    return gpu_table.read(FOLDER, lambda entry: Tuning(**entry))


def find(case: Case, chip: str | None) -> Row | None:
    """The row for `case`, or None."""
    return gpu_table.nearest(rows(), case.head_dim, chip)


def refusals(case: Case, chip: str | None) -> list[str]:
    """Every reason for which the kernel cannot do `case` on `chip`."""
    reasons = [] if not case.bias else ["no dense bias; ALiBi is computed in the kernel from its slopes"]
    if case.dtype != case.cache_dtype or case.dtype not in DTYPES:
        reasons.append(f"q {case.dtype}, cache {case.cache_dtype}: it has {' and '.join(DTYPES)}, both alike")
    reasons += gpu_table.unknown(rows(), chip)
    widest = max(row.head_dim for row in rows())
    if case.head_dim % ROWS or case.head_dim > widest:
        reasons.append(f"head_dim {case.head_dim}: multiples of {ROWS} up to {widest}, which are copied as they lie")
    if case.queries * case.heads > MOST_ROWS:
        reasons.append(f"{case.queries} queries of {case.heads} heads: at most {MOST_ROWS} rows")
    if case.entries < ROWS or (case.page is None and case.entries % EIGHT):
        reasons.append(f"{case.entries} entries: multiples of {EIGHT} from {ROWS} on")
    elif case.page is not None and (row := find(case, chip)) is not None:
        tile = tile_of(row.tuning, case.entries)
        if case.page % EIGHT or (case.page % tile and tile % case.page):
            reasons.append(f"pages of {case.page} entries: multiples of {EIGHT} that divide {tile}, or multiples of it")
    return reasons


def program(
    chip: str, head_dim: int, everything: bool, dtype: str = "bfloat16", page: int | None = None
) -> tuple[Any, list[Any]]:
    """`decode_attention(impl="gpu")` of one new token of 32 rows with 16 query heads, and operands: 8,192 entries of
    one key/value head a row.

    everything: grouped queries of two tokens, a window, ALiBi and a soft-cap, which is what takes most registers.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attention.masks import Mask
    from pallas_kernels.decode_attention.api import decode_attention

    rows, entries, heads = 32, 8192, 16
    queries, kv_heads = (2, 2) if everything else (1, 1)

    def step(q: Any, k: Any, v: Any, positions: Any, layer: Any, pages: Any) -> Any:
        extras: dict[str, Any] = {"mask": Mask()}
        if everything:
            extras = dict(mask=Mask(window=512), alibi_slopes=jnp.ones(heads), soft_cap=30.0)
        extras["pages"] = None if page is None else pages
        return decode_attention(q, k, v, positions, layer, impl="gpu", chip=chip, **extras)

    cache = (2, rows, entries, kv_heads, head_dim)
    if page is not None:
        cache = (2, rows * entries // page, kv_heads, page, head_dim)
    shapes = [((rows, queries, heads, head_dim), dtype), (cache, dtype), (cache, dtype)]
    shapes += [((rows, queries), "int32"), ((), "int32"), ((rows, entries // (page or entries)), "int32")]
    return step, [jax.ShapeDtypeStruct(*x) for x in shapes]
