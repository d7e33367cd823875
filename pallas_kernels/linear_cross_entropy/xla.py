"""Linear cross-entropy a part of the vocabulary at a time, in plain XLA: log Z is accumulated online, and the backward
pass makes each part's logits again.

By parts of the vocabulary, not of the tokens: the hidden states are read once a part and each row's gradient is written
once, where parts of the tokens would read the whole table and add to its whole gradient every time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy.reference import MASKED


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    soft_cap: float | None
    rows: int
    axis: str | tuple[str, ...] | None
    part: int


def linear_cross_entropy(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    rows: int,
    axis: str | tuple[str, ...] | None,
    part: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Arguments and results as in `api.linear_cross_entropy`; part: rows of the table at a time."""
    return _losses(_Static(scale, soft_cap, rows, axis, min(part, table.shape[0])), hidden, table, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(static: _Static, hidden: Any, table: Any, targets: Any) -> Any:
    return _fwd(static, hidden, table, targets)[0]


def _parts(static: _Static, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The table in parts [parts, part, D], and the vocabulary's id of each part's first row."""
    pad = -table.shape[0] % static.part
    parts = jnp.pad(table, ((0, pad), (0, 0))).reshape(-1, static.part, table.shape[1])
    begin = 0 if static.axis is None else jax.lax.axis_index(static.axis) * table.shape[0]
    return parts, begin + jnp.arange(parts.shape[0]) * static.part


def _logits(static: _Static, hidden: Any, rows: Any, begin: Any, end: Any) -> tuple[Any, Any, Any]:
    """Logits [N, part], the rows' ids [part] (-1 for padding), and the tanh of the soft-cap.

    end: the id behind this device's last row.
    """
    real = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("ND,VD->NV", hidden, rows, preferred_element_type=real) * static.scale
    tanh = None
    if static.soft_cap is not None:
        tanh = jnp.tanh(logits / static.soft_cap)
        logits = static.soft_cap * tanh
    ids = begin + jnp.arange(static.part)
    real_ids = ids < jnp.minimum(static.rows, end)
    # Padding of the last part has ids that are the next device's.
    return jnp.where(real_ids, logits, MASKED), jnp.where(real_ids, ids, -1), tanh


def _fwd(static: _Static, hidden: Any, table: Any, targets: Any) -> Any:
    parts, begins = _parts(static, table)
    real = jnp.promote_types(hidden.dtype, jnp.float32)
    end = begins[0] + table.shape[0]

    def add(so_far: tuple, given: tuple) -> tuple[tuple, None]:
        top, total, chosen, tied = so_far
        logits, ids, _ = _logits(static, hidden, given[0], given[1], end)
        best = jnp.max(logits, axis=-1)
        new = jnp.maximum(top, best)
        total = total * jnp.exp(top - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=-1)
        chosen = chosen + jnp.sum(jnp.where(ids == targets[:, None], logits, 0.0), axis=-1)
        here = jnp.sum((logits == new[:, None]).astype(real), axis=-1)
        return (new, total, chosen, jnp.where(top == new, tied, 0.0) + here), None

    zeros = jnp.zeros(targets.shape, real)
    (top, total, chosen, tied), _ = jax.lax.scan(add, (zeros + MASKED, zeros, zeros, zeros), (parts, begins))
    if static.axis is not None:
        most = jax.lax.pmax(top, static.axis)
        tied = jnp.where(top == most, tied, 0.0)
        total, chosen, tied = jax.lax.psum((total * jnp.exp(top - most), chosen, tied), static.axis)
        top = most
    log_z = jnp.log(total) + top
    found = log_z - chosen, log_z, jnp.where(chosen == top, 1.0 / tied, 0.0)
    return found, (hidden, table, targets, log_z)


def _bwd(static: _Static, kept: Any, cotangents: Any) -> Any:
    hidden, table, targets, log_z = kept
    d_loss, d_log_z, _ = cotangents
    if static.axis is not None:
        # Each device is handed its share of the results' cotangents, as the transpose of a sum over the axis expects.
        d_loss, d_log_z = jax.lax.psum((d_loss, d_log_z), static.axis)
    parts, begins = _parts(static, table)
    end = begins[0] + table.shape[0]

    def add(d_hidden: jax.Array, given: tuple) -> tuple[jax.Array, jax.Array]:
        logits, ids, tanh = _logits(static, hidden, given[0], given[1], end)
        d_logits = jnp.exp(logits - log_z[:, None]) * (d_loss + d_log_z)[:, None]
        d_logits = d_logits - jnp.where(ids == targets[:, None], d_loss[:, None], 0.0)
        if tanh is not None:
            d_logits = d_logits * (1.0 - tanh * tanh)
        d_logits = (d_logits * static.scale).astype(hidden.dtype)
        more = jnp.einsum("NV,VD->ND", d_logits, given[0], preferred_element_type=d_hidden.dtype)
        d_rows = jnp.einsum("NV,ND->VD", d_logits, hidden, preferred_element_type=d_hidden.dtype)
        return d_hidden + more, d_rows.astype(table.dtype)

    zeros = jnp.zeros(hidden.shape, jnp.promote_types(hidden.dtype, jnp.float32))
    d_hidden, d_parts = jax.lax.scan(add, zeros, (parts, begins))
    d_table = d_parts.reshape(-1, table.shape[1])[: table.shape[0]]
    return d_hidden.astype(hidden.dtype), d_table, None


_losses.defvjp(_fwd, _bwd)
