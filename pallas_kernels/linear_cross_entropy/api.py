"""Linear cross-entropy: by token, or its weighted total; implementations chosen loudly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import choice, reference, total, xla

NAMES = ("xla", "reference")
PART = 8192
"""Rows of the table at a time: of 256k, a thirty-second."""

TOKENS = 1024
"""Tokens at a time of a total in plain XLA."""


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
    _check(hidden, table, targets, soft_cap)
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


def linear_cross_entropy_total(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    scale: float = 1.0,
    soft_cap: float | None = None,
    rows: int | None = None,
    axis: str | tuple[str, ...] | None = None,
    tokens: int | None = None,
    impl: str = "auto",
    chip: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The sum over tokens of weights (loss + z_loss (log Z)^2), with loss, log Z and the rest as in
    `linear_cross_entropy`; weights: float32 [N].

    The gradient is made in the forward pass, where a part's logits are at hand, from three products of the logits'
    size; parts of the vocabulary need four. It is kept until the backward pass: float32 [V, D] while it is summed. The
    table may be float32 beside narrower hidden states, whose dtype it is then multiplied in: its gradient is that very
    sum, neither rounded nor held twice.
    tokens: of a part, whose weights [V, tokens] are in memory at a time; by default the table's, TOKENS in plain XLA.
    impl: "tpu" (Mosaic), "xla", or "auto". chip, interpret: as in `attention`. Without a gradient, parts of the
    vocabulary run.

    Returns (the total, float32; loss, log Z, correct, float32 [N] each). The total is differentiable in hidden, table
    and weights. Raises ValueError for shapes that do not fit, an implementation that cannot do this call, and where
    one of the other results is differentiated.
    """
    _check(hidden, table, targets, soft_cap, jnp.promote_types(hidden.dtype, jnp.float32))
    if weights.shape != targets.shape:
        raise ValueError(f"linear_cross_entropy_total: weights {weights.shape} for targets {targets.shape}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"linear_cross_entropy_total: tokens = {tokens}: must be at least 1")
    tiles, _ = choice.choose(impl, hidden.shape[1], str(hidden.dtype), chip)
    whole = table.shape[0] * (1 if axis is None else jax.lax.axis_size(axis))
    static = total.Static(
        z_loss=z_loss,
        scale=scale,
        soft_cap=soft_cap,
        rows=whole if rows is None else rows,
        axis=axis,
        tokens=tokens or (TOKENS if tiles is None else tiles.tokens),
        part=PART,
        tiles=tiles,
        interpret=interpret,
    )
    return total.total(static, hidden, table, targets, weights)


def explain_total(impl: str, width: int, dtype: str, chip: str | None = None) -> str:
    """What `linear_cross_entropy_total` runs for hidden states of `width` and `dtype` on `chip`, and why. Raises as it
    does.
    """
    tiles, reason = choice.choose(impl, width, dtype, chip)
    return f"linear_cross_entropy_total: {'xla' if tiles is None else 'tpu'} ({reason}) for width {width} {dtype}"


def _check(hidden: jax.Array, table: jax.Array, targets: jax.Array, soft_cap: float | None, *wider: Any) -> None:
    """wider: what the table's dtype may be but for hidden's."""
    if hidden.ndim != 2 or table.ndim != 2 or hidden.shape[1] != table.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: shapes do not fit: hidden {hidden.shape}, table {table.shape}, targets "
            f"{targets.shape}; need [N,D], [V,D], [N]"
        )
    if table.dtype not in (hidden.dtype, *wider) or not jnp.issubdtype(hidden.dtype, jnp.floating):
        need = " or a table in ".join(["one floating dtype", *(x.name for x in wider if x != hidden.dtype)])
        raise ValueError(f"linear_cross_entropy: hidden is {hidden.dtype}, table {table.dtype}; need {need}")
    if soft_cap is not None and not soft_cap > 0.0:
        raise ValueError(f"linear_cross_entropy: soft_cap = {soft_cap}: must be above 0; None for no cap")
