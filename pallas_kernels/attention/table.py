"""Block sizes by chip, from `tuned/*.json`. Each row says where its numbers come from; `python -m pallas_kernels.tune`
makes them anew.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from pallas_kernels.attention.case import Case
from pallas_kernels.attention.tpu import Tuning
from pallas_kernels.attention.tpu_plan import LANES, Blocks

FOLDER = Path(__file__).parent / "tuned"


def file_name(chip: str) -> str:
    """Of a chip's rows, in the folder of any op."""
    return f"{chip.lower().replace(' ', '_')}.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was found for one shape on one chip.

    length, heads (of one key/value head), head_dim, dtype: the shape, causal, one sequence. forward_cost,
    backward_cost: of the busiest core; the sources say of what: "simulated" are cycles by the compiler's static
    profiler, "bundles" instructions of its final listing times how often each block of them runs, "measured" are
    microseconds on the chip, "compiled" has no cost. Every row has been shown to compile with segments, prefix, window,
    ALiBi and soft-cap at the most keys. provenance: versions and date.
    """

    chip: str
    length: int
    heads: int
    head_dim: int
    dtype: str
    tuning: Tuning
    forward_cost: int | None
    backward_cost: int | None
    source: str
    backward_source: str
    provenance: dict[str, str]


def as_tuning(entry: dict[str, Any]) -> Tuning:
    """A Tuning from its JSON form."""
    blocks: dict[str, Any] = {which: Blocks(**entry[which]) for which in ("forward", "backward")}
    return Tuning(**{**entry, **blocks})


def _row(entry: dict[str, Any]) -> Row:
    return Row(**{"backward_source": entry["source"], **entry, "tuning": as_tuning(entry["tuning"])})


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows of all files."""
    return tuple(_row(entry) for path in sorted(FOLDER.glob("tpu*.json")) for entry in json.loads(path.read_text()))


def chips() -> list[str]:
    """The device kinds that have rows."""
    return sorted({row.chip for row in rows()})


def find(case: Case, chip: str) -> Row | None:
    """The row whose block sizes `case` takes on `chip`: of its dtype, with heads at least as wide, nearest in length
    and then in heads; None when there is no such row.
    """
    width = -(-case.head_dim // LANES) * LANES
    fits = [row for row in rows() if row.chip == chip and row.dtype == case.dtype and row.head_dim >= width]

    def distance(row: Row) -> tuple[float, ...]:
        heads = case.heads // case.kv_heads
        return row.head_dim, abs(math.log2(row.length / case.length)), abs(math.log2(row.heads / heads))

    return min(fits, key=distance, default=None)
