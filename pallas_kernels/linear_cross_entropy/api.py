"""Linear cross-entropy: one op, implementations chosen loudly."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import reference, xla

NAMES = ("xla", "reference")
PART = 8192
"""Rows of the table at a time: of 256k, a thirty-second."""


def linear_cross_entropy(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    rows: int | None = None,
    axis: str | tuple[str, ...] | None = None,
    part: int = PART,
    impl: str = "xla",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of logits = cap(scale hidden table^T) that are never whole.

    hidden: [N, D]; table: [V, D] in hidden's dtype, a (tied) embedding; targets: int32 [N]; soft_cap: c of
    c tanh(x / c); rows: how many of the vocabulary's rows are real, the rest is padding and gets no probability. axis:
    the mesh axis that the table's rows are sharded over, inside `shard_map(..., check_vma=False)`; hidden and targets
    are then whole on each of its devices. part: rows of the table at a time.

    Returns (loss, log Z, whether the target is the argmax: 1/n for one of n tied), each float32 [N]. Loss and log Z are
    differentiable; a z-loss is made of log Z, and tokens that do not count get zero weight behind the op.
    Raises ValueError for shapes that do not fit or an unknown `impl`.
    """
    if impl not in NAMES:
        raise ValueError(f"linear_cross_entropy: unknown implementation {impl!r}; there is {', '.join(NAMES)}")
    if hidden.ndim != 2 or table.ndim != 2 or hidden.shape[1] != table.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: shapes do not fit: hidden {hidden.shape}, table {table.shape}, targets "
            f"{targets.shape}; need [N,D], [V,D], [N]"
        )
    if hidden.dtype != table.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(
            f"linear_cross_entropy: hidden is {hidden.dtype}, table {table.dtype}; need one floating dtype"
        )
    if soft_cap is not None and not soft_cap > 0.0:
        raise ValueError(f"linear_cross_entropy: soft_cap = {soft_cap}: must be above 0; None for no cap")
    if part < 1:
        raise ValueError(f"linear_cross_entropy: part = {part}: must be at least 1")
    whole = table.shape[0] * (1 if axis is None else jax.lax.axis_size(axis))
    real = whole if rows is None else rows
    if impl == "reference":
        if axis is not None:
            raise ValueError("linear_cross_entropy: reference has no mesh axis; xla could")
        return reference.linear_cross_entropy(hidden, table, targets, scale=scale, soft_cap=soft_cap, rows=real)
    return xla.linear_cross_entropy(
        hidden, table, targets, scale=scale, soft_cap=soft_cap, rows=real, axis=axis, part=part
    )
