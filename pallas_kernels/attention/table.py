"""Block sizes of the TPU kernels by chip, from `tuned/tpu*.json`. Each row says where its numbers come from; `python -m
pallas_kernels.tune` makes them anew.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from pallas_kernels.attention.case import MASKS, Case
from pallas_kernels.attention.tpu import Tuning
from pallas_kernels.attention.tpu_plan import LANES, Blocks

FOLDER = Path(__file__).parent / "tuned"


def file_name(chip: str) -> str:
    """Of a chip's rows, in the folder of any op."""
    return f"{chip.lower().replace(' ', '_')}.json"


def entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    """All rows of an op's folder for chips of a `kind`, "tpu" or "nvidia", as JSON."""
    return [entry for path in sorted(folder.glob(f"{kind}*.json")) for entry in json.loads(path.read_text())]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What block sizes are found for: one sequence with one key/value head.

    heads: query heads. mask: of `case.MASKS`; what a window and a packed row were is `cost.mask_of`'s.
    """

    length: int
    heads: int
    head_dim: int
    dtype: str
    mask: str = "causal"

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"Shape.mask = {self.mask!r}: one of {', '.join(MASKS)}")

    def __str__(self) -> str:
        return f"{self.mask} T={self.length}, {self.heads} heads of {self.head_dim} {self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Shape):
    """What was found for one shape on one chip.

    forward_cost, backward_cost: of the busiest core; the sources say of what: "simulated" are cycles by the compiler's
    static profiler, "bundles" instructions of its final listing times how often each block of them runs, "measured" are
    microseconds on the chip, "compiled" has no cost. Every row has been shown to compile with segments, prefix, window,
    ALiBi and soft-cap at the most keys. provenance: versions and date.
    """

    chip: str
    tuning: Tuning
    forward_cost: int | None
    backward_cost: int | None
    source: str
    backward_source: str
    provenance: dict[str, str]

    @property
    def shape(self) -> Shape:
        return Shape(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Shape)})

    @property
    def sizes(self) -> str:
        """Which row it is and how it was found, for people."""
        return f"block sizes of the row for {self.shape}, {self.source}"


def as_tuning(entry: dict[str, Any]) -> Tuning:
    """A Tuning from its JSON form."""
    blocks: dict[str, Any] = {which: Blocks(**entry[which]) for which in ("forward", "backward")}
    return Tuning(**{**entry, **blocks})


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows of all files."""
    return tuple(Row(**{**entry, "tuning": as_tuning(entry["tuning"])}) for entry in entries(FOLDER, "tpu"))


def chips() -> list[str]:
    """The device kinds that have rows."""
    return sorted({row.chip for row in rows()})


def find(case: Case, chip: str) -> Row | None:
    """The row whose block sizes `case` takes on `chip`, or None: of its dtype, with heads at least as wide, of its mask
    if there is such a row, else causal, nearest in length and then in heads.
    """
    width = -(-case.head_dim // LANES) * LANES
    fits = [row for row in rows() if row.chip == chip and row.dtype == case.dtype and row.head_dim >= width]
    fits = [row for row in fits if row.mask in (case.mask_class, "causal")]

    def distance(row: Row) -> tuple[float, ...]:
        heads = case.heads // case.kv_heads
        other = row.mask != case.mask_class
        return row.head_dim, other, abs(math.log2(row.length / case.length)), abs(math.log2(row.heads / heads))

    return min(fits, key=distance, default=None)
