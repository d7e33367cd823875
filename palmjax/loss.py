"""Training losses: from a model, parameters and a batch to sums over tokens, so that microbatches and hosts add up
exactly.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import ConfigError, LossPart, section
from palmjax.data.batch import Batch

Sums = dict[str, jax.Array]
"""float32 scalars summed over tokens: `loss` (cross-entropy, nats), `z_loss`, `correct`, `weight` (tokens that count),
and what the model reports (`LanguageModel.forward`).
"""


class LossFn(Protocol):
    """The loss of one model."""

    def __call__(self, params: Any, batch: Batch, dropout_key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
        """(the sum over tokens to differentiate, the sums to report). No key, no dropout."""
        ...


@section
class CrossEntropy(LossPart):
    """Cross-entropy plus `z_loss` * log(Z)^2 for each token, without label smoothing (PaLM section 5: z_loss 1e-4)."""

    z_loss: float = 1e-4

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ConfigError(f"CrossEntropy.z_loss = {self.z_loss}: must not be negative (PaLM uses 1e-4)")

    def build(self, model: Any) -> LossFn:
        """The loss of `model`, a LanguageModel."""

        def loss(params: Any, batch: Batch, dropout_key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
            hidden, report = model.forward(params, batch, dropout_key)
            sums = token_sums(model.logits(params, hidden), batch)
            total = sums["loss"] + self.z_loss * sums["log_z_squared"] + report.get("aux_loss", 0.0)
            return total, {
                "loss": sums["loss"],
                "z_loss": self.z_loss * sums["log_z_squared"],
                "correct": sums["correct"],
                "weight": sums["weight"],
                **report,
            }

        return loss


def token_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy (nats), log Z and whether the target is the argmax (1/n for one of n tied), each float32 [B, T].

    logits: float32 [B, T, V], its vocabulary may be sharded; targets: int32 [B, T]. No gather: the target's logit is
    picked by comparison, which a sharded vocabulary sums over like any other reduction.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    log_z = jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)) + top
    vocabulary = sharding.constrain(jnp.arange(logits.shape[-1]), ("vocab",))
    chosen = jnp.sum(jnp.where(vocabulary == targets[..., None], logits, 0.0), axis=-1)
    tied = jnp.sum((logits == top[..., None]).astype(jnp.float32), axis=-1)
    return log_z - chosen, log_z, jnp.where(chosen == top, 1.0 / tied, 0.0)


def token_sums(logits: jax.Array, batch: Batch) -> Sums:
    """Weighted sums over a batch: `loss`, `log_z_squared`, `correct`, `weight`."""
    loss, log_z, correct = token_losses(logits, batch.targets)
    weights = batch.weights
    return {
        "loss": jnp.sum(loss * weights),
        "log_z_squared": jnp.sum(jnp.square(log_z) * weights),
        "correct": jnp.sum(correct * weights),
        "weight": jnp.sum(weights),
    }
