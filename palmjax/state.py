"""The training state: one pytree that the step maps to itself and a checkpoint holds whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from palmjax.config import section
from palmjax.loss_scale import LossScale, LossScaleState


@jax.tree_util.register_dataclass
@section
class TrainState:
    """Everything that a step changes.

    step: int32 [], steps done. params: nested dict of float32 arrays. opt_state: optax's.
    rng: uint32 key data of the run's root key; a step derives its own keys from (rng, step), so it never changes.
    loss_scale: float16's; None without.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    loss_scale: LossScaleState | None = None

    def replace(self, **changes: Any) -> TrainState:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, loss_scale: LossScale | None = None
) -> TrainState:
    """The state before the first step. Traceable; under an explicit mesh the moments take the parameters' shardings.

    key: root of the keys that steps derive (dropout).
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(key),
        loss_scale=None if loss_scale is None else loss_scale.init(),
    )
