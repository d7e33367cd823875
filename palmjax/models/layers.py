"""Norms, activations and feed-forward layers. Shape letters are those of `parameters`."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import Part, require, section
from palmjax.models.parameters import Context, Dense, ones, parameter, zeros
from palmjax.sharding import Axes

Report = dict[str, jax.Array]
"""float32 scalars that a layer has to say besides its result, summed over tokens; empty for dense layers."""


class NormPart(Part):
    """A normalisation over the model width: `build(name)` returns a module x [..., D] -> [..., D]."""


@section
class LayerNorm(NormPart):
    """LayerNorm (Ba et al. 2016) with a scale and, if `bias`, a bias. PaLM has no biases; its epsilon is not known."""

    epsilon: float = 1e-6
    bias: bool = False

    def __post_init__(self) -> None:
        require(self.epsilon > 0.0, self, "epsilon", "above 0")

    def build(self, name: str) -> nn.Module:
        return NormModule(self.epsilon, centered=True, bias=self.bias, name=name)


@section
class RMSNorm(NormPart):
    """Division by the root mean square and a scale (Zhang and Sennrich 2019)."""

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        require(self.epsilon > 0.0, self, "epsilon", "above 0")

    def build(self, name: str) -> nn.Module:
        return NormModule(self.epsilon, centered=False, bias=False, name=name)


class NormModule(nn.Module):
    """The norms; statistics in float32, result in x's dtype."""

    epsilon: float
    centered: bool
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", (x.shape[-1],), ("embed",), ones)
        scale = sharding.constrain(scale, ("residual",))
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon) * scale
        if self.bias:
            bias = parameter(self, "bias", (x.shape[-1],), ("embed",), zeros)
            y = y + sharding.constrain(bias, ("residual",))
        return y.astype(x.dtype)


class ActivationPart(Part):
    """A function of each value: `build()` returns it."""


@section
class GELU(ActivationPart):
    """x Phi(x) (Hendrycks and Gimpel 2016)."""

    def build(self) -> Any:
        return lambda x: jax.nn.gelu(x, approximate=False)


@section
class TanhGELU(ActivationPart):
    """GELU with Phi approximated by a tanh, as GPT-2, BLOOM and GPT-J compute it."""

    def build(self) -> Any:
        return lambda x: jax.nn.gelu(x, approximate=True)


@section
class ReLU(ActivationPart):
    """max(x, 0)."""

    def build(self) -> Any:
        return jax.nn.relu


@section
class SquaredReLU(ActivationPart):
    """max(x, 0)^2 (So et al. 2021, Primer)."""

    def build(self) -> Any:
        return lambda x: jnp.square(jax.nn.relu(x))


@section
class SiLU(ActivationPart):
    """x sigmoid(x), also called swish."""

    def build(self) -> Any:
        return jax.nn.silu


class FeedForwardPart(Part):
    """A feed-forward layer.

    `build(name, context)` returns a module (x [B, T, D], rows, dropless) -> ([B, T, D], Report). `rows` and `dropless`
    matter to experts only.
    """

    d_ff: int


class DenseFeedForward(FeedForwardPart):
    """Every token through the same matrices.

    `build(name, context, experts=E)` makes E of them side by side, for x [B, E, C, D].
    """

    activation: ActivationPart
    bias: bool
    gated: ClassVar[bool]

    def __post_init__(self) -> None:
        require(self.d_ff >= 1, self, "d_ff", "1 or more")

    def build(self, name: str, context: Context, experts: int | None = None) -> nn.Module:
        return FeedForwardModule(self, context, experts, name=name)


@section
class MLP(DenseFeedForward):
    """activation(x Wi) Wo: two matrices, with biases if `bias`."""

    d_ff: int
    activation: ActivationPart = TanhGELU()
    bias: bool = False

    gated = False


@section
class SwiGLU(DenseFeedForward):
    """swish(x W0) * (x W1), then Wo (Shazeer 2020; PaLM section 2): three matrices, with biases if `bias`."""

    d_ff: int
    activation: ActivationPart = SiLU()
    bias: bool = False

    gated = True


@section
class GEGLU(DenseFeedForward):
    """GELU(x W0) * (x W1), then Wo (Shazeer 2020; T5 v1.1 and GLaM): three matrices, with biases if `bias`."""

    d_ff: int
    activation: ActivationPart = TanhGELU()
    bias: bool = False

    gated = True


class FeedForwardModule(nn.Module):
    """The feed-forward layer; kernels are named as T5X names them: `wi` or `wi_0` (gate) and `wi_1`, and `wo`."""

    config: DenseFeedForward
    context: Context
    experts: int | None

    @nn.compact
    def __call__(self, x: jax.Array, rows: Any = None, dropless: bool = False) -> tuple[jax.Array, Report]:
        c, D, F = self.config, x.shape[-1], self.config.d_ff
        sizes, names, lead, kernel = (), (), "BT", ""
        axes: Axes = ("batch", "length")
        if self.experts is not None:
            sizes, names, lead, kernel = (self.experts,), ("experts",), "BEC", "E"
            axes = ("expert_batch", "experts", None)

        def up(name: str) -> jax.Array:
            stddev = self.context.kernel_stddev(D)
            return Dense(
                f"{lead}D,{kernel}DF->{lead}F",
                (*sizes, D, F),
                (*names, "embed", "mlp"),
                stddev,
                (*axes, "mlp"),
                c.bias,
                name=name,
            )(x)

        activation = c.activation.build()
        hidden = activation(up("wi_0")) * up("wi_1") if c.gated else activation(up("wi"))
        y = Dense(
            f"{lead}F,{kernel}FD->{lead}D",
            (*sizes, F, D),
            (*names, "mlp", "embed"),
            self.context.residual_stddev(F),
            (*axes, "residual"),
            c.bias,
            partial=self.experts is None,
            name="wo",
        )(hidden)
        return y, {}
