"""Mixture of experts: each token goes to the few feed-forward layers that a router picks for it (GShard, GLaM)."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import ConfigError, require, section
from palmjax.models.layers import DenseFeedForward, FeedForwardPart, Report
from palmjax.models.parameters import Context, normal, parameter
from palmjax.sharding import Axes


@section
class Experts(FeedForwardPart):
    """`num_experts` feed-forward layers of which each token takes `top_k`, weighted by its router (Lepikhin et al.
    2021, algorithm 1; GLaM section 4).

    expert: one of them. capacity_factor: places of an expert are capacity_factor * top_k * T / num_experts for a row of
    T tokens; tokens that find none go on by the residual stream alone. First choices are served before second ones,
    and earlier tokens before later ones. GLaM does not publish its value. aux_weight: of the load-balancing loss
    E sum_e f_e p_e, f_e the share of tokens whose first choice is e and p_e the mean probability of e (1 if balanced).

    Every row is a group of its own, so that what a token gets depends neither on the batch nor on the mesh. Against a
    key/value cache no token is dropped.
    """

    num_experts: int
    expert: DenseFeedForward
    top_k: int = 2
    capacity_factor: float = 1.25
    aux_weight: float = 0.01

    def __post_init__(self) -> None:
        require(self.num_experts >= 1, self, "num_experts", "1 or more")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"Experts.top_k = {self.top_k}: must be from 1 to num_experts = {self.num_experts}")
        require(self.capacity_factor > 0.0, self, "capacity_factor", "above 0")
        require(self.aux_weight >= 0.0, self, "aux_weight", "0 or more")

    @property
    def d_ff(self) -> int:
        """Width of each expert."""
        return self.expert.d_ff

    def capacity(self, length: int) -> int:
        """Places of each expert for a row of `length` tokens."""
        return min(length, math.ceil(self.capacity_factor * self.top_k * length / self.num_experts))

    def build(self, name: str, context: Context) -> nn.Module:
        return ExpertsModule(self, context, name=name)


class ExpertsModule(nn.Module):
    """The layer: `router` [D, E] and the experts' kernels [E, ...]."""

    config: Experts
    context: Context

    @nn.compact
    def __call__(self, x: jax.Array, rows: Any, dropless: bool = False) -> tuple[jax.Array, Report]:
        """Besides the result [B, T, D]: `aux_loss`, weighted and summed over tokens, and how many of a token's choices
        were `routed` and `dropped`.
        """
        c, (B, T, D) = self.config, x.shape
        E, C = c.num_experts, T if dropless else c.capacity(T)
        # The router is float32 throughout: in bfloat16, rounding would decide near ties (Fedus et al. 2022, 2.4).
        router = parameter(self, "router", (D, E), ("embed", "router"), normal(self.context.kernel_stddev(D)))
        logits = sharding.einsum("BTD,DE->BTE", x.astype(jnp.float32), router, out=("batch", "length", None))

        def route(logits: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            real = jnp.ones(logits.shape[:2]) if segments is None else (segments != 0).astype(jnp.float32)
            return _route(logits, real, c.top_k, C)

        group: Axes = ("batch", "length", None, None)
        outs = ((group, (B, T, E, C)), (("batch", None), (B, 3)))
        inputs = (("batch", "length", None), ("batch", "length"))
        combine, counts = sharding.local_many(route, inputs, outs, logits, rows.segments)

        here: Axes = ("batch", None, None, "residual")
        there: Axes = ("expert_batch", "experts", None, "residual")
        dispatch = (combine > 0.0).astype(x.dtype)
        sent = sharding.einsum("BTD,BTEC->BECD", x, dispatch, out=here)
        sent = sharding.exchange(sent, here, there)
        done, _ = c.expert.build("experts", self.context, experts=E)(sent)
        done = sharding.exchange(done, there, here)
        y = sharding.einsum("BECD,BTEC->BTD", done, combine.astype(x.dtype), out=("batch", "length", "residual"))
        aux, dropped, routed = (jnp.sum(counts[:, i]) for i in range(3))
        return y, {"aux_loss": c.aux_weight * aux, "dropped": dropped, "routed": routed}


def _route(logits: jax.Array, real: jax.Array, top_k: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Weights of each token's places, float32 [B, T, E, C], and float32 [B, 3] for each row: the load-balancing loss
    times its tokens, and choices dropped and made.

    logits: float32 [B, T, E]; real: float32 [B, T], 0 on padding, which takes no place.
    """
    experts = logits.shape[-1]
    gates = jax.nn.softmax(logits)
    weights, choices = jax.lax.top_k(gates, top_k)
    if top_k > 1:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    combine = jnp.zeros((*logits.shape, capacity))
    taken = jnp.zeros((logits.shape[0], 1, experts))
    kept = jnp.zeros(logits.shape[0])
    chosen = [jax.nn.one_hot(choices[..., k], experts) * real[..., None] for k in range(top_k)]
    for k, one in enumerate(chosen):
        place = jnp.sum((taken + jnp.cumsum(one, axis=1) - one) * one, axis=-1)
        fits = jnp.sum(one, axis=-1) * (place < capacity)
        kept += jnp.sum(fits, axis=1)
        where = one[..., None] * jax.nn.one_hot(place.astype(jnp.int32), capacity)[:, :, None, :]
        combine += (weights[..., k] * fits)[..., None, None] * where
        taken += jnp.sum(one, axis=1, keepdims=True)
    tokens = jnp.sum(real, axis=1)
    share = jnp.sum(chosen[0], axis=1) / jnp.maximum(tokens, 1.0)[:, None]
    probability = jnp.sum(gates * real[..., None], axis=1) / jnp.maximum(tokens, 1.0)[:, None]
    balance = experts * jnp.sum(share * probability, axis=-1)
    return combine, jnp.stack([balance * tokens, top_k * tokens - kept, top_k * tokens], axis=-1)
