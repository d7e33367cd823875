"""Which implementation runs, and why: a named one works or raises with every reason; "auto" can explain itself."""

from __future__ import annotations

import dataclasses

from pallas_kernels.attention.case import Case

NAMES = ("einsum", "xla")


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation's name and the reason for it, as people read it."""

    name: str
    reason: str


def check_name(impl: str) -> None:
    """Raises ValueError for an implementation that there is not."""
    if impl != "auto" and impl not in NAMES:
        raise ValueError(f"attention: unknown implementation {impl!r}; there is auto, {', '.join(NAMES)}")


def choose(impl: str, case: Case, chip: str | None) -> Choice:
    """The implementation of `case` on `chip` (a device kind, as jax names it; None for a CPU)."""
    check_name(impl)
    return Choice("einsum", "the only one")
