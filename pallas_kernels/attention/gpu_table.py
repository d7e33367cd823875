"""Block sizes of the Hopper kernels, from `tuned/nvidia_*.json`. Each row says where its numbers come from."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from pallas_kernels.attention.case import Case
from pallas_kernels.attention.gpu_plan import Ring, Stream, Tuning
from pallas_kernels.attention.table import FOLDER

DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Block sizes for one head dimension on one chip.

    chip: begin of the device kinds, as jax names them. source: "compiled" has been shown to compile for sm_90a with no
    register spilled, "measured" has run and was timed on the chip. provenance: versions and date.
    """

    chip: str
    head_dim: int
    tuning: Tuning
    source: str
    provenance: dict[str, str]

    @property
    def found(self) -> str:
        """The source, for people."""
        return "compiled for sm_90a, not timed" if self.source == "compiled" else self.source


def _row(entry: dict[str, Any]) -> Row:
    tuning = entry["tuning"]
    of = Tuning(forward=Ring(**tuning["forward"]), dq=Ring(**tuning["dq"]), dkv=Stream(**tuning["dkv"]))
    return Row(**{**entry, "tuning": of})


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows of all files."""
    paths = sorted(FOLDER.glob("nvidia_*.json"))
    return tuple(_row(entry) for path in paths for entry in json.loads(path.read_text()))


def chips() -> list[str]:
    """Begins of device kinds that have rows."""
    return sorted({row.chip for row in rows()})


def find(case: Case, chip: str | None) -> Row | None:
    """The row with the least head dimension that holds the case's, or None."""
    fits = [row for row in rows() if chip is not None and chip.startswith(row.chip) and row.head_dim >= case.head_dim]
    return min(fits, key=lambda row: row.head_dim, default=None)


def refusals(case: Case, chip: str | None) -> list[str]:
    """Every reason for which the kernels cannot do `case` on `chip`."""
    reasons = [] if not case.bias else ["no dense bias; ALiBi is computed in the kernel from its slopes"]
    if case.dtype not in DTYPES:
        reasons.append(f"{case.dtype}: it has {' and '.join(DTYPES)}")
    if chip is None or not any(chip.startswith(name) for name in chips()):
        reasons.append(f"chip {chip!r}: the table has {', '.join(chips())}")
    widest = max(row.head_dim for row in rows())
    if case.head_dim > widest:
        reasons.append(f"head_dim {case.head_dim}: at most {widest}")
    return reasons
