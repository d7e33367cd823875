"""Which implementation runs, and why: a named one works or raises with every reason; "auto" can explain itself."""

from __future__ import annotations

import dataclasses

from pallas_kernels.attention import gpu_table, others, table
from pallas_kernels.attention.case import Case
from pallas_kernels.attention.tpu_plan import Blocks

NAMES = ("einsum", "xla", "tpu", "gpu", *others.NAMES)
"""einsum: the whole score matrix. xla: block by block. tpu, gpu: Mosaic, this package's. The rest: `others`."""

SHORT = 256
"""Tokens below which the whole score matrix is as fast as blocks of it on a CPU."""

SHORT_ON_GPU = 4096
"""On a GPU blocks of a loop are small kernels one after the other: they pay only where the matrix is too large."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation's name, the reason for it as people read it, and its row of the table if it has one."""

    name: str
    reason: str
    row: table.Row | gpu_table.Row | None = None


def check_name(impl: str) -> None:
    """Raises ValueError for an implementation that there is not."""
    if impl != "auto" and impl not in NAMES:
        raise ValueError(f"attention: unknown implementation {impl!r}; there is auto, {', '.join(NAMES)}")


def refusals(impl: str, case: Case, chip: str | None) -> list[str]:
    """Every reason for which `impl` cannot do `case` on `chip`."""
    if impl == "einsum":
        return []
    if impl == "xla":
        return ["bias is a [T, S] array already; use einsum"] if case.bias else []
    if impl == "gpu":
        return gpu_table.refusals(case, chip)
    if impl == "tpu":
        reasons = [] if not case.bias else ["no dense bias; ALiBi is computed in the kernel from its slopes"]
        if case.dtype not in ("bfloat16", "float32"):
            reasons.append(f"{case.dtype}: it has bfloat16 and float32")
        if case.head_dim > 256:
            reasons.append(f"head_dim {case.head_dim}: at most 256")
        if chip is None or chip not in table.chips():
            reasons.append(f"chip {chip!r}: the table has {', '.join(table.chips())}")
        elif not reasons and (row := table.find(case, chip)) is None:
            reasons.append(f"no row for {case.dtype}, head_dim {case.head_dim} on {chip}")
        elif not reasons and row is not None:
            heads = case.heads // case.kv_heads
            least, most = Blocks.smallest(heads) * heads, min(row.tuning.forward.rows, row.tuning.backward.rows)
            if least > most:
                reasons.append(f"{heads} query heads a key/value head make blocks of {least} rows, tuned are {most}")
        return reasons
    return others.refusals(impl, case, chip)


def choose(impl: str, case: Case, chip: str | None) -> Choice:
    """The implementation of `case` on `chip` (a device kind, as jax names it; None for a CPU).

    Raises ValueError with every reason, and the names of those that could, when the named one can't do it.
    """
    check_name(impl)
    if impl == "auto":
        return _auto(case, chip)
    if reasons := refusals(impl, case, chip):
        could = [name for name in NAMES if not refusals(name, case, chip)]
        raise ValueError(
            f"attention: {impl} cannot do {case} on {chip or 'cpu'}: {'; '.join(reasons)}. "
            f"Could: {', '.join(could) or 'none'}"
        )
    row = None
    if impl == "gpu":
        row = gpu_table.find(case, chip)
    elif impl == "tpu" and chip is not None:
        row = table.find(case, chip)
    return Choice(impl, "named" if row is None else f"named; {_sizes(row, case)}", row)


def _sizes(row: table.Row | gpu_table.Row, case: Case) -> str:
    """The row whose block sizes are taken, and whether it is of another mask."""
    if isinstance(row, gpu_table.Row) or row.mask == case.mask_class:
        return row.sizes
    return f"{row.sizes}; no row is for {case.mask_class}"


def _auto(case: Case, chip: str | None) -> Choice:
    if case.bias:
        return Choice("einsum", "bias is a [T, S] array, so the scores may be")
    if chip is not None and chip.startswith("TPU"):
        if not (reasons := refusals("tpu", case, chip)):
            row = table.find(case, chip)
            assert row is not None
            return Choice("tpu", f"{chip}; {_sizes(row, case)}", row)
        return Choice("xla", f"not tpu: {'; '.join(reasons)}")
    gpu = chip is not None and chip != "cpu"
    short = SHORT_ON_GPU if gpu else SHORT
    where = chip or "cpu"
    ours = ""
    if gpu and not gpu_table.refusals(case, chip):
        row = gpu_table.find(case, chip)
        assert row is not None
        if row.source == "measured":
            return Choice("gpu", f"{chip}; {row.sizes}", row)
        # What has never run on the hardware runs there when it is named, and by itself once it has been measured.
        ours = f"; gpu, which could, is {row.found}"
    # cuDNN stays a named choice: its backward pass does not promise the same bits twice.
    if case.length < short:
        return Choice("einsum", f"{case.length} tokens on {where}: fewer than {short}{ours}")
    return Choice("xla", f"{case.length} tokens on {where}: {short} or more{ours}")
