"""Parameters as one record, norms and feed-forward layers.

Shape letters: B rows, T length, D model width, F feed-forward width, H query heads, K key/value heads, N head
dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from palmjax import sharding
from palmjax.config import Part, require, section
from palmjax.sharding import Axes

Initializer = Callable[[jax.Array, tuple[int, ...], Axes], jax.Array]
"""(key, shape, logical axes) -> float32 values, born with their sharding."""

STACKED = "layers"


@struct.dataclass
class AxesBox(meta.AxisMetadata):
    """A parameter with its logical axes. Linen's own boxes constrain values by PartitionSpec, which an explicit mesh
    refuses.
    """

    value: Any
    axes: Axes = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> AxesBox:
        return AxesBox(value=val, axes=self.axes)

    def add_axis(self, index: int, params: dict) -> AxesBox:
        return AxesBox(value=self.value, axes=(*self.axes[:index], params[nn.PARTITION_NAME], *self.axes[index:]))

    def remove_axis(self, index: int, params: dict) -> AxesBox:
        return AxesBox(value=self.value, axes=(*self.axes[:index], *self.axes[index + 1 :]))


def parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: Axes, init: Initializer) -> jax.Array:
    """A float32 parameter: shape, axes and initializer said once; abstract tree, shardings and values derive from
    it.
    """
    return module.param(name, lambda key: AxesBox(value=init(key, shape, axes), axes=axes))  # pyright: ignore[reportReturnType]


def normal(stddev: float) -> Initializer:
    """Independent N(0, stddev^2)."""

    def init(key: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
        born = sharding.out_spec(axes, shape, f"parameter {axes}")
        return stddev * jax.random.normal(key, shape, jnp.float32, out_sharding=born)

    return init


def ones(key: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """All ones."""
    return jnp.ones(shape, jnp.float32, out_sharding=sharding.out_spec(axes, shape, f"parameter {axes}"))


def dropout(x: jax.Array, rate: float, key: jax.Array | None, axes: Axes) -> jax.Array:
    """Zeroes each value with probability `rate` and scales the rest; the identity without a key or a rate."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=sharding.out_spec(axes, x.shape))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class Dense(nn.Module):
    """A linear map without bias: `einsum(equation, x, kernel)`.

    shape, axes: the kernel's. fan_in: of the initializer, std 1/sqrt(fan_in) (PaLM section 5).
    """

    equation: str
    shape: tuple[int, ...]
    axes: Axes
    fan_in: int
    out: Axes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", self.shape, self.axes, normal(self.fan_in**-0.5))
        return sharding.einsum(self.equation, x, kernel, out=self.out)


class NormPart(Part):
    """A normalisation over the model width: `build(name)` returns a module x [..., D] -> [..., D]."""


@section
class LayerNorm(NormPart):
    """Zero mean, unit variance and a learned scale; no bias (PaLM section 2). PaLM does not publish epsilon."""

    epsilon: float = 1e-6

    def build(self, name: str) -> nn.Module:
        return LayerNormModule(self.epsilon, name=name)


class LayerNormModule(nn.Module):
    """LayerNorm with scale only; statistics in float32, result in x's dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", (x.shape[-1],), ("embed",), ones)
        scale = sharding.constrain(scale, ("residual",))
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


class FeedForwardPart(Part):
    """A feed-forward layer: `build(name)` returns a module x [B, T, D] -> [B, T, D]."""

    d_ff: int


@section
class SwiGLU(FeedForwardPart):
    """swish(x W0) * (x W1), then Wo, three matrices without biases (Shazeer 2020; PaLM section 2)."""

    d_ff: int

    def __post_init__(self) -> None:
        require(self.d_ff >= 1, self, "d_ff", "1 or more")

    def build(self, name: str) -> nn.Module:
        return SwiGLUModule(self.d_ff, name=name)


class SwiGLUModule(nn.Module):
    """The gated feed-forward layer; kernels are named as T5X names them."""

    d_ff: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = x_BTD.shape[-1], self.d_ff
        hidden: Axes = ("batch", "length", "mlp")
        gate = Dense("BTD,DF->BTF", (D, F), ("embed", "mlp"), D, hidden, name="wi_0")(x_BTD)
        value = Dense("BTD,DF->BTF", (D, F), ("embed", "mlp"), D, hidden, name="wi_1")(x_BTD)
        return Dense("BTF,FD->BTD", (F, D), ("mlp", "embed"), F, ("batch", "length", "residual"), name="wo")(
            jax.nn.silu(gate) * value
        )
