"""Training losses: from a model, parameters and a batch to sums over tokens, so that microbatches and hosts add up
exactly.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_total
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
    """Cross-entropy plus `z_loss` * log(Z)^2 for each token, without label smoothing (PaLM section 5: z_loss 1e-4).

    part: rows of the vocabulary whose logits a device holds at a time (`pallas_kernels.linear_cross_entropy`), for
    heads that are one product; None for all at once: parts make every logit a second time.
    tokens: tokens whose logits a device holds at a time, for such heads, with the gradient made in the forward pass
    (`linear_cross_entropy_total`): no logit is made twice, and the table's gradient is summed in float32. Not with
    `part`.
    """

    z_loss: float = 1e-4
    part: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ConfigError(f"CrossEntropy.z_loss = {self.z_loss}: must not be negative (PaLM uses 1e-4)")
        if self.part is not None and self.part < 1:
            raise ConfigError(
                f"CrossEntropy.part = {self.part}: must be 1 row of the vocabulary or more, or None for all"
            )
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"CrossEntropy.tokens = {self.tokens}: must be 1 token or more, or None for all")
        if self.part is not None and self.tokens is not None:
            raise ConfigError(
                f"CrossEntropy.part = {self.part}, tokens = {self.tokens}: the logits are cut one way; leave one None"
            )

    def build(self, model: Any) -> LossFn:
        """The loss of `model`, a LanguageModel."""

        def loss(params: Any, batch: Batch, dropout_key: jax.Array | None = None) -> tuple[jax.Array, Sums]:
            hidden, report = model.forward(params, batch, dropout_key)
            if self.tokens is not None:
                total, found = total_by_tokens(model, params, hidden, batch, self.z_loss, self.tokens)
                sums = weighted_sums(*found, batch)
            else:
                if self.part is not None:
                    found = losses_by_parts(model, params, hidden, batch.targets, self.part)
                else:
                    found = token_losses(model.logits(params, hidden), batch.targets)
                sums = weighted_sums(*found, batch)
                total = sums["loss"] + self.z_loss * sums["log_z_squared"]
            total = total + report.get("aux_loss", 0.0)
            return total, {
                "loss": sums["loss"],
                "z_loss": self.z_loss * sums["log_z_squared"],
                "correct": sums["correct"],
                "weight": sums["weight"],
                **report,
            }

        return loss


def losses_by_parts(
    model: Any, params: Any, hidden: jax.Array, targets: jax.Array, part: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`token_losses` of a model's hidden states [B, T, D] without ever holding their logits, but `part` rows of the
    vocabulary at a time on each device. Raises ConfigError for a head that is more than a product with a table.
    """
    readout, table, axis = _readout(model, params, "part")
    table = table.astype(hidden.dtype)

    def op(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        found = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            table,
            targets.reshape(-1),
            scale=readout.scale,
            soft_cap=readout.soft_cap,
            rows=model.config.vocab_size,
            axis=axis,
            part=part,
        )
        return tuple(x.reshape(targets.shape) for x in found)

    inputs: tuple[sharding.Axes, ...] = ((*_TOKENS, None), ("vocab", None), _TOKENS)
    loss, log_z, correct = sharding.local_many(op, inputs, ((_TOKENS, targets.shape),) * 3, hidden, table, targets)
    return loss, log_z, correct


def total_by_tokens(
    model: Any, params: Any, hidden: jax.Array, batch: Batch, z_loss: float, tokens: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """(the sum over `batch` of weight times cross-entropy plus z-loss, its `token_losses`, which cannot be
    differentiated) from hidden states [B, T, D], `tokens` tokens at a time on each device. Raises ConfigError as
    `losses_by_parts` does.
    """
    readout, table, axis = _readout(model, params, "tokens")
    # Rows that lie in pieces are put together in half the bytes; of whole ones, the gradient is the float32 sum itself.
    in_pieces = sharding.ways(("vocab", "embed"), table.shape)[1] > 1
    if in_pieces or table.dtype != jnp.promote_types(hidden.dtype, jnp.float32):
        table = table.astype(hidden.dtype)
    shape = batch.targets.shape

    def op(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        total, *found = linear_cross_entropy_total(
            hidden.reshape(-1, hidden.shape[-1]),
            table,
            targets.reshape(-1),
            weights.reshape(-1),
            z_loss=z_loss,
            scale=readout.scale,
            soft_cap=readout.soft_cap,
            rows=model.config.vocab_size,
            axis=axis,
            tokens=tokens,
            chip=sharding.device_kind(),
        )
        return total.reshape(1, 1), *(x.reshape(targets.shape) for x in found)

    # Each device's own total: summed over them outside, as every other reduction is.
    ways = sharding.ways(_TOKENS, shape)
    inputs: tuple[sharding.Axes, ...] = ((*_TOKENS, None), ("vocab", None), _TOKENS, _TOKENS)
    outs = ((_TOKENS, ways), *((_TOKENS, shape),) * 3)
    total, loss, log_z, correct = sharding.local_many(
        op, inputs, outs, hidden, table, batch.targets, batch.weights.astype(jnp.float32)
    )
    return jnp.sum(total), (loss, log_z, correct)


_TOKENS: sharding.Axes = ("batch", "length")


def _readout(model: Any, params: Any, field: str) -> tuple[Any, jax.Array, Any]:
    """A model's readout, its table, and the mesh axes that the table's rows lie over."""
    readout = model.readout(params)
    if readout is None:
        raise ConfigError(f"CrossEntropy.{field}: this head is more than one product (a bias, a projection); use None")
    spec = sharding.out_spec(("vocab", None), readout.table.shape)
    return readout, readout.table, None if spec is None else spec[0]


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
    return weighted_sums(*token_losses(logits, batch.targets), batch)


def weighted_sums(loss: jax.Array, log_z: jax.Array, correct: jax.Array, batch: Batch) -> Sums:
    """`token_sums` of what `token_losses` found."""
    weights = batch.weights
    return {
        "loss": jnp.sum(loss * weights),
        "log_z_squared": jnp.sum(jnp.square(log_z) * weights),
        "correct": jnp.sum(correct * weights),
        "weight": jnp.sum(weights),
    }
