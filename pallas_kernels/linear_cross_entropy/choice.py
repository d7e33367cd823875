"""Which implementation of the total of linear cross-entropy runs, and why."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from pallas_kernels.attention.table import entries
from pallas_kernels.attention.tpu_plan import LANES
from pallas_kernels.linear_cross_entropy.tpu import Tiles

NAMES = ("tpu", "xla")
"""tpu: Mosaic. xla: the same three products in plain XLA."""

FOLDER = Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Tile sizes for one chip. cost: of the busiest core, of a part of the tokens against `cost.ROWS` rows of width
    `cost.WIDTH`, by kernel; source: "simulated" (cycles), "bundles" or "measured" (microseconds).
    """

    chip: str
    dtype: str
    tiles: Tiles
    cost: dict[str, int]
    source: str
    provenance: dict[str, str]


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows of all files."""
    return tuple(Row(**{**entry, "tiles": Tiles(**entry["tiles"])}) for entry in entries(FOLDER, "tpu"))


def find(dtype: str, chip: str | None) -> Row | None:
    """The row of a chip and a dtype; None where there is none."""
    return next((row for row in rows() if (row.chip, row.dtype) == (chip, dtype)), None)


def refusals(width: int, dtype: str, chip: str | None) -> list[str]:
    """Every reason for which the TPU kernels cannot take hidden states of `width` and `dtype` on `chip`."""
    reasons = [] if width % LANES == 0 else [f"width {width}: multiples of {LANES}"]
    if find(dtype, chip) is None:
        known = ", ".join(f"{row.chip} {row.dtype}" for row in rows())
        reasons.append(f"chip {chip!r} {dtype}: the table has {known}")
    return reasons


def choose(impl: str, width: int, dtype: str, chip: str | None) -> tuple[Tiles | None, str]:
    """(the TPU kernels' tiles or None for plain XLA, why).

    Raises ValueError for an unknown `impl`, and with every reason when the named one can't do it.
    """
    if impl not in ("auto", *NAMES):
        raise ValueError(f"linear_cross_entropy_total: unknown implementation {impl!r}; there is auto, tpu, xla")
    if impl == "xla":
        return None, "named"
    reasons = refusals(width, dtype, chip)
    if not reasons:
        row = find(dtype, chip)
        assert row is not None
        return row.tiles, "named" if impl == "tpu" else f"{chip}; parts of {row.tiles.tokens} tokens, {row.source}"
    if impl == "tpu":
        raise ValueError(
            f"linear_cross_entropy_total: tpu cannot do width {width} {dtype} on {chip or 'cpu'}: "
            f"{'; '.join(reasons)}. Could: xla"
        )
    if chip is not None and chip.startswith("TPU"):
        return None, f"not tpu: {reasons[0]}"
    return None, f"on {chip or 'cpu'}" if chip in (None, "cpu") else f"on {chip}: there is no kernel for it"
