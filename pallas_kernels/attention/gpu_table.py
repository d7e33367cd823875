"""Block sizes of the Hopper kernels, from `tuned/nvidia_*.json`. Each row says where its numbers come from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pallas_kernels.attention.case import Case
from pallas_kernels.attention.gpu_plan import Ring, Stream, Tuning
from pallas_kernels.attention.table import FOLDER, entries

T = TypeVar("T")

DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Generic[T]):
    """Block sizes for one head dimension on one chip, of any op.

    chip: begin of the device kinds, as jax names them. source: "compiled" has been shown to compile for sm_90a with no
    register spilled, "measured" has run and was timed on the chip. provenance: versions and date.
    """

    chip: str
    head_dim: int
    tuning: T
    source: str
    provenance: dict[str, str]

    @property
    def found(self) -> str:
        """The source, for people."""
        return "compiled for sm_90a, not timed" if self.source == "compiled" else self.source

    @property
    def sizes(self) -> str:
        """Which row it is and how it was found, for people."""
        return f"block sizes of the row for head_dim {self.head_dim}, {self.found}"


def read(folder: Path, tuning: Callable[[dict[str, Any]], T]) -> tuple[Row[T], ...]:
    """All rows of a folder's files."""
    return tuple(Row(**{**entry, "tuning": tuning(entry["tuning"])}) for entry in entries(folder, "nvidia"))


def nearest(rows: Iterable[Row[T]], head_dim: int, chip: str | None) -> Row[T] | None:
    """The row with the least head dimension that holds `head_dim`, or None."""
    fits = [row for row in rows if chip is not None and chip.startswith(row.chip) and row.head_dim >= head_dim]
    return min(fits, key=lambda row: row.head_dim, default=None)


def unknown(rows: Iterable[Row[Any]], chip: str | None) -> list[str]:
    """The reason for which no row is for `chip`, if none is."""
    chips = sorted({row.chip for row in rows})
    if chip is not None and any(chip.startswith(name) for name in chips):
        return []
    return [f"chip {chip!r}: the table has {', '.join(chips)}"]


def as_tuning(entry: dict[str, Any]) -> Tuning:
    """A Tuning from its JSON form."""
    return Tuning(forward=Ring(**entry["forward"]), dq=Ring(**entry["dq"]), dkv=Stream(**entry["dkv"]))


@functools.cache
def rows() -> tuple[Row[Tuning], ...]:
    """All rows of all files."""
    return read(FOLDER, as_tuning)


def find(case: Case, chip: str | None) -> Row[Tuning] | None:
    """The row for `case`, or None."""
    return nearest(rows(), case.head_dim, chip)


def refusals(case: Case, chip: str | None) -> list[str]:
    """Every reason for which the kernels cannot do `case` on `chip`."""
    reasons = [] if not case.bias else ["no dense bias; ALiBi is computed in the kernel from its slopes"]
    if case.dtype not in DTYPES:
        reasons.append(f"{case.dtype}: it has {' and '.join(DTYPES)}")
    reasons += unknown(rows(), chip)
    widest = max(row.head_dim for row in rows())
    if case.head_dim > widest:
        reasons.append(f"head_dim {case.head_dim}: at most {widest}")
    return reasons


def program(chip: str, head_dim: int, everything: bool, dtype: str = "bfloat16") -> tuple[Any, list[Any]]:
    """The gradient of `attention(impl="gpu")` and operands: 2048 tokens, 16 query heads, one key/value head, causal.

    everything: with segments, a window, ALiBi and a soft-cap, which is what takes most registers.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attention.api import attention
    from pallas_kernels.attention.masks import Mask

    def gradient(q: Any, k: Any, v: Any, do: Any, segments: Any) -> Any:
        extras: dict[str, Any] = {}
        if everything:
            slopes = jnp.ones(q.shape[2])
            extras = dict(mask=Mask(window=512), segments=segments, alibi_slopes=slopes, soft_cap=30.0)
        out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, impl="gpu", chip=chip, **extras), q, k, v)
        return out, backward(do)

    q, kv = (1, 2048, 16, head_dim), (1, 2048, 1, head_dim)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, kv, kv, q)]
    return gradient, [*operands, jax.ShapeDtypeStruct((1, 2048), "int32")]
