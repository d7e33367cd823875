"""How long a kernel of this package takes on a chip, before it has run there: from the tuned tables.

    cycles("palmjax_attention_forward", "TPU v4", flops=3.4e10, width=256)    # (cycles, where they come from)

A Pallas call carries no estimate of the compiler's. Its name does (`op`, also inside `jvp_..._`), and so does the
`CostEstimate` that its author states; what share of the matrix units' peak it reaches is in the table.
"""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.aot import CORES, FLOPS_PER_CYCLE
from pallas_kernels.attention import table, tpu_forward
from pallas_kernels.attention.cost import PASSES, PRODUCTS, parts

__all__ = ["chip_in", "cycles", "kernel_in"]


def kernel_in(name: str) -> str | None:
    """The kernel of this package that an HLO instruction or op of this name is a call of; None for others."""
    return next((kernel for kernel in PASSES.values() if kernel in name), None)


def chip_in(kinds: Sequence[str]) -> str:
    """Of the names that a chip goes by the one that the tables use; the first if they know none."""
    return next((kind for kind in kinds if kind in FLOPS_PER_CYCLE), kinds[0])


def cycles(
    op: str, chip: str, *, flops: float, width: int = 256, length: int = 2048, dtype: str = "bfloat16"
) -> tuple[float, str]:
    """Cycles of one device for a call of `op`, and their source.

    chip: a device kind, as jax names it. flops: what the call's CostEstimate states, of one device. width: head
    dimension. length: tokens a row. The cycles are those of the matrix units at peak over the share of the peak that
    the compiler shows for the nearest row (simulated cycles, or the bundles of its listing, without waits); with no
    row, the peak itself.
    Raises ValueError for an op or a chip that the package does not know.
    """
    kernel = kernel_in(op)
    if kernel is None:
        raise ValueError(f"schedule: no kernel is called {op!r}; there is {', '.join(PASSES.values())}")
    if chip not in FLOPS_PER_CYCLE:
        raise ValueError(f"schedule: chip {chip!r} is not known; there is {', '.join(FLOPS_PER_CYCLE)}")
    peak = flops / (FLOPS_PER_CYCLE[chip] * CORES.get(chip, 1))
    which = "forward" if kernel == tpu_forward.NAME else "backward"
    row = _nearest(chip, which, width, length, dtype)
    cost = None if row is None else getattr(row, f"{which}_cost")
    source = None if row is None else row.source if which == "forward" else row.backward_source
    if row is None or cost is None or source not in ("bundles", "simulated"):
        return peak, "matrix units' peak"
    stated = _stated_flops(row, which)
    share = stated / (FLOPS_PER_CYCLE[chip] * CORES.get(chip, 1)) / cost
    return peak / share, f"{source} of the tuned row T={row.length} D={row.head_dim} ({share:.0%} of the peak)"


def _nearest(chip: str, which: str, width: int, length: int, dtype: str) -> table.Row | None:
    known = [row for row in table.rows() if row.chip == chip and getattr(row, f"{which}_cost") is not None]
    # Of another mask a call may be told from its operands, but its flops are stated as causal.
    known = [row for row in known if row.mask == "causal"]
    fits = [row for row in known if row.dtype == dtype and row.head_dim >= min(width, 256)]
    return min(fits, key=lambda row: (row.head_dim, abs(row.length - length)), default=None)


def _stated_flops(row: table.Row, which: str) -> int:
    return sum(call.plan.flops(PRODUCTS[which], row.head_dim) for call in parts(which, row.shape, row.tuning))
