"""The meaning of linear cross-entropy, in plain jnp: all logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30


def linear_cross_entropy(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, *, scale: float, soft_cap: float | None, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Arguments and results as in `api.linear_cross_entropy`."""
    real = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("ND,VD->NV", hidden, table, preferred_element_type=real) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(jnp.arange(table.shape[0]) < rows, logits, MASKED)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    top = jnp.max(logits, axis=-1)
    tied = jnp.sum(logits == top[:, None], axis=-1).astype(real)
    return log_z - chosen, log_z, jax.lax.stop_gradient(jnp.where(chosen == top, 1.0 / tied, 0.0))
