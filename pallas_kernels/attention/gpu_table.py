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


def program(chip: str, head_dim: int, everything: bool) -> tuple[Any, list[Any]]:
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
    operands = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in (q, kv, kv, q)]
    return gradient, [*operands, jax.ShapeDtypeStruct((1, 2048), "int32")]
