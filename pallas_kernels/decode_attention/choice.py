"""Which implementation of attention against a cache runs, and why."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from pallas_kernels.attention.table import entries
from pallas_kernels.attention.tpu_plan import LANES
from pallas_kernels.decode_attention import gpu_table
from pallas_kernels.decode_attention.case import MOST_ROWS, Case

NAMES = ("tpu", "gpu", "xla", "reference")
"""tpu, gpu: Mosaic. xla: block by block up to the last filled entry. reference: scores against every entry."""

FOLDER = Path(__file__).parent / "tuned"

TILE = 8
"""Rows of a tile in memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Keys of a block (`size`, entries times heads) for one chip and width. cost: of one core, for the shape of
    `cost.program`; source: "simulated" (cycles), "bundles" or "measured" (microseconds).
    """

    chip: str
    head_dim: int
    dtype: str
    size: int
    cores: int
    cost: int | None
    source: str
    provenance: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation's name, the reason for it as people read it, and its row of the table if it has one."""

    name: str
    reason: str
    row: Row | gpu_table.Row | None = None


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows of all files."""
    return tuple(Row(**entry) for entry in entries(FOLDER, "tpu"))


def find(case: Case, chip: str | None) -> Row | None:
    """The row for `case`: of its chip, the nearest width, the cache's dtype before others."""
    fits = [row for row in rows() if row.chip == chip]
    return min(fits, key=lambda row: (row.dtype != case.cache_dtype, abs(row.head_dim - case.head_dim)), default=None)


def refusals(impl: str, case: Case, chip: str | None) -> list[str]:
    """Every reason for which `impl` cannot do `case` on `chip`."""
    if impl == "gpu":
        return gpu_table.refusals(case, chip)
    if impl != "tpu":
        return []
    reasons = ["no dense bias; ALiBi is computed in the kernel from its slopes"] if case.bias else []
    if find(case, chip) is None:
        chips = sorted({row.chip for row in rows()})
        reasons.append(f"chip {chip!r}: the table has {', '.join(chips)}")
    if case.dtype != case.cache_dtype or case.dtype not in ("bfloat16", "float32"):
        reasons.append(f"q {case.dtype}, cache {case.cache_dtype}: it has bfloat16 and float32, both alike")
    if case.kv_heads > 1 and case.page is None and (case.kv_heads % TILE or case.head_dim % LANES):
        reasons.append(
            f"{case.kv_heads} key/value heads of {case.head_dim}: one, or multiples of {TILE} of multiples of {LANES}, "
            "which lie in memory as they are read"
        )
    if case.head_dim > 256:
        reasons.append(f"head_dim {case.head_dim}: at most 256")
    if case.queries * case.heads > MOST_ROWS:
        reasons.append(f"{case.queries} queries of {case.heads} heads: at most {MOST_ROWS} rows")
    if case.page is not None and case.page % LANES:
        reasons.append(f"pages of {case.page} entries: multiples of {LANES}, each is one copy")
    return reasons


def choose(impl: str, case: Case, chip: str | None) -> Choice:
    """The implementation of `case` on `chip` (a device kind, as jax names it; None for a CPU).

    Raises ValueError with every reason, and the names of those that could, when the named one can't do it.
    """
    if impl != "auto" and impl not in NAMES:
        raise ValueError(f"decode_attention: unknown implementation {impl!r}; there is auto, {', '.join(NAMES)}")
    if impl != "auto":
        if reasons := refusals(impl, case, chip):
            could = [name for name in NAMES if not refusals(name, case, chip)]
            raise ValueError(
                f"decode_attention: {impl} cannot do {case} on {chip or 'cpu'}: {'; '.join(reasons)}. "
                f"Could: {', '.join(could)}"
            )
        if impl == "gpu":
            found = gpu_table.find(case, chip)
            assert found is not None
            return Choice(impl, f"named; {found.sizes}", found)
        return Choice(impl, "named", find(case, chip) if impl == "tpu" else None)
    if chip is None or not chip.startswith("TPU"):
        return _auto_elsewhere(case, chip)
    if reasons := refusals("tpu", case, chip):
        return Choice("xla", f"not tpu: {'; '.join(reasons)}")
    row = find(case, chip)
    assert row is not None
    return Choice("tpu", f"{chip}; blocks of {row.size} entries, {row.source}", row)


def _auto_elsewhere(case: Case, chip: str | None) -> Choice:
    where = f"on {chip or 'cpu'}"
    if chip is None or not chip.startswith("NVIDIA"):
        return Choice("xla", where)
    if reasons := gpu_table.refusals(case, chip):
        return Choice("xla", f"{where}; not gpu: {'; '.join(reasons)}")
    row = gpu_table.find(case, chip)
    assert row is not None
    if row.source == "measured":
        return Choice("gpu", f"{chip}; {row.sizes}", row)
    # As attention: what has never run on the hardware runs there when it is named.
    return Choice("xla", f"{where}; gpu, which could, is {row.found}")
