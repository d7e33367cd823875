"""The weighted total of linear cross-entropy, with its gradient made in the forward pass: three products of the logits'
size where parts of the vocabulary need four, and no more logits at a time than a part of the tokens has.

A total's gradient is linear in its one cotangent, so that it can be made where the logits are at hand. The price: what
is reported beside the total cannot be differentiated, and says so.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.linear_cross_entropy import tpu, xla
from pallas_kernels.linear_cross_entropy.reference import MASKED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What is no array. tokens: of a part. rows: of the whole vocabulary that are real. part: rows of the table at a
    time where nothing is differentiated. tiles: of the TPU kernels; None for plain XLA.
    """

    z_loss: float
    scale: float
    soft_cap: float | None
    rows: int
    axis: str | tuple[str, ...] | None
    tokens: int
    part: int
    tiles: tpu.Tiles | None
    interpret: Any


def total(static: Static, hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    """Arguments and results as in `api.linear_cross_entropy_total`."""
    return _total(static, hidden, table, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(static: Static, hidden: Any, table: Any, targets: Any, weights: Any) -> Any:
    loss, log_z, correct = xla.linear_cross_entropy(
        hidden,
        table.astype(hidden.dtype),
        targets,
        scale=static.scale,
        soft_cap=static.soft_cap,
        rows=static.rows,
        axis=static.axis,
        part=static.part,
    )
    return _sum(static, loss, log_z, weights), loss, log_z, correct


def _sum(static: Static, loss: Any, log_z: Any, weights: Any) -> Any:
    return jnp.sum(weights * (loss + static.z_loss * jnp.square(log_z)))


def _fwd(static: Static, *given: Any) -> Any:
    hidden, table, targets, weights = (x.value for x in given)
    if not (given[0].perturbed or given[1].perturbed):
        found: Any = _total(static, hidden, table, targets, weights)
        return found, (None, None, *found[1:3], hidden, table)
    tokens = min(static.tokens, hidden.shape[0])
    pad = -hidden.shape[0] % tokens

    def parts(x: jax.Array) -> jax.Array:
        # Padding has no weight, so no gradient.
        return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(-1, tokens, *x.shape[1:])

    begin = 0 if static.axis is None else jax.lax.axis_index(static.axis) * table.shape[0]
    real = jnp.clip(static.rows - begin, 0, table.shape[0])
    run = _xla_part if static.tiles is None else tpu.part
    rows = table.astype(hidden.dtype)
    rows = rows if static.tiles is None else tpu.padded(static.tiles, rows)

    def add(d_table: jax.Array, of_part: tuple) -> tuple[jax.Array, tuple]:
        h, t, w = of_part
        # The next device's first rows have the numbers of what pads this one's.
        mine = jnp.where((t >= begin) & (t < begin + real), t - begin, -1)
        found, d_hidden, d_table = run(static, h, rows, mine, w, real, d_table)
        return d_table, (*found, d_hidden.astype(hidden.dtype))

    zeros = jnp.zeros(rows.shape, jnp.promote_types(table.dtype, jnp.float32))
    d_table, found = jax.lax.scan(add, zeros, tuple(parts(x) for x in (hidden, targets, weights)))
    loss, log_z, correct, d_hidden = (x.reshape(-1, *x.shape[2:])[: hidden.shape[0]] for x in found)
    d_table = d_table[: table.shape[0]].astype(table.dtype)
    return (_sum(static, loss, log_z, weights), loss, log_z, correct), (d_hidden, d_table, loss, log_z, None, None)


def _bwd(static: Static, kept: Any, cotangents: Any) -> Any:
    d_total, *others = cotangents
    if any(type(x) is not SymbolicZero for x in others):
        raise ValueError(
            "linear_cross_entropy_total: only its total is differentiable; linear_cross_entropy has a differentiable "
            "loss and log Z for each token"
        )
    d_hidden, d_table, loss, log_z, *shapes = kept
    if type(d_total) is SymbolicZero:
        d_total = jnp.float32(0.0)
    if static.axis is not None:
        # As in `xla`: each device is handed its share.
        d_total = jax.lax.psum(d_total, static.axis)
    d_weights = d_total * (loss + static.z_loss * jnp.square(log_z))
    if static.axis is not None:
        d_weights = d_weights / jax.lax.axis_size(static.axis)
    if d_hidden is None:
        return *(jnp.zeros_like(x) for x in shapes), None, d_weights
    return (d_total * d_hidden).astype(d_hidden.dtype), (d_total * d_table).astype(d_table.dtype), None, d_weights


_total.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _xla_part(
    static: Static, hidden: Any, table: Any, targets: Any, weights: Any, real: Any, d_table: Any
) -> tuple[tuple[Any, Any, Any], Any, Any]:
    """One part of the tokens: ((loss, log Z, correct), d hidden, d table added to). targets: counted from the table's
    first row, -1 for another device's; real: how many of its rows are.
    """
    wide = d_table.dtype
    logits = jnp.einsum("ND,VD->NV", hidden, table, preferred_element_type=wide) * static.scale
    tanh = None
    if static.soft_cap is not None:
        tanh = jnp.tanh(logits / static.soft_cap)
        logits = static.soft_cap * tanh
    ids = jnp.arange(table.shape[0])
    logits = jnp.where(ids < real, logits, MASKED)
    hit = ids == targets[:, None]
    top = across(static, jnp.max(logits, axis=-1), jax.lax.pmax)
    sums = jnp.stack(
        [
            jnp.sum(jnp.exp(logits - top[:, None]), axis=-1),
            jnp.sum(jnp.where(hit, logits, 0.0), axis=-1),
            jnp.sum((logits == top[:, None]).astype(wide), axis=-1),
        ]
    )
    total, chosen, tied = across(static, sums, jax.lax.psum)
    log_z = jnp.log(total) + top
    share = weights * (1.0 + 2.0 * static.z_loss * log_z)
    d_logits = jnp.exp(logits - log_z[:, None]) * share[:, None] - jnp.where(hit, weights[:, None], 0.0)
    if tanh is not None:
        d_logits = d_logits * (1.0 - tanh * tanh)
    # Rounded once: each of the two products would make it again, tile by tile.
    d_logits = jax.lax.optimization_barrier((d_logits * static.scale).astype(hidden.dtype))
    d_hidden = jnp.einsum("NV,VD->ND", d_logits, table, preferred_element_type=wide)
    d_table = d_table + jnp.einsum("NV,ND->VD", d_logits, hidden, preferred_element_type=wide)
    return (log_z - chosen, log_z, jnp.where(chosen == top, 1.0 / tied, 0.0)), d_hidden, d_table


def across(static: Static, x: jax.Array, collective: Any) -> jax.Array:
    """`collective` over the vocabulary's mesh axis, if it has one."""
    return x if static.axis is None else collective(x, static.axis)
