"""A parameter as one record: shape, dtype, logical axes and initial values together; and the linear map made of them.

Shape letters of the models: B rows, T length, D model width, F feed-forward width, H query heads, K key/value heads,
N head dimension, V vocabulary, E experts, C places of an expert.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from palmjax import sharding
from palmjax.config import Part, require, section
from palmjax.sharding import Axes

Initializer = Callable[[jax.Array, tuple[int, ...], Axes], jax.Array]
"""(key, shape, logical axes) -> float32 values, born with their sharding."""

STACKED = "layers"

_declaring: contextvars.ContextVar[bool] = contextvars.ContextVar("declaring", default=False)


@contextlib.contextmanager
def declaring() -> Iterator[None]:
    """Inside, only the shapes and axes of parameters are asked for: they get no initial values, and what is known to
    hold no parameter may be left out.
    """
    token = _declaring.set(True)
    try:
        yield
    finally:
        _declaring.reset(token)


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


def is_declaring() -> bool:
    """Whether `declaring` is in force."""
    return _declaring.get()


def parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: Axes, init: Initializer) -> jax.Array:
    """A float32 parameter: shape, axes and initializer said once; abstract tree, shardings and values derive from
    it.
    """
    if is_declaring():
        # Nobody looks at the values, and tracing the generator of random numbers costs as much as tracing the model.
        return module.param(name, lambda key: AxesBox(value=zeros(key, shape, axes), axes=axes))  # pyright: ignore[reportReturnType]
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


def zeros(key: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """All zeros."""
    return jnp.zeros(shape, jnp.float32, out_sharding=sharding.out_spec(axes, shape, f"parameter {axes}"))


class InitPart(Part):
    """Standard deviations of fresh, normally distributed parameters. Biases start at zero, norm scales at one."""

    def build(self) -> InitPart:
        return self

    def embedding(self, d_model: int) -> float:
        """Of embedding tables, and of an untied head."""
        raise NotImplementedError

    def kernel(self, fan_in: int, d_model: int) -> float:
        """Of a matrix that sums over `fan_in` values."""
        raise NotImplementedError

    def residual(self, fan_in: int, d_model: int, num_layers: int) -> float:
        """Of a matrix whose product is added to the residual stream."""
        return self.kernel(fan_in, d_model)


@section
class FanIn(InitPart):
    """1/sqrt(fan_in) for matrices, N(0, 1) for embeddings (PaLM section 5)."""

    def embedding(self, d_model: int) -> float:
        return 1.0

    def kernel(self, fan_in: int, d_model: int) -> float:
        return fan_in**-0.5


@section
class Gaussian(InitPart):
    """One standard deviation for all (BERT and LLaMA: 0.02)."""

    stddev: float = 0.02

    def __post_init__(self) -> None:
        require(self.stddev > 0.0, self, "stddev", "above 0")

    def embedding(self, d_model: int) -> float:
        return self.stddev

    def kernel(self, fan_in: int, d_model: int) -> float:
        return self.stddev


@section
class DepthScaledGaussian(Gaussian):
    """Gaussian with what is added to the residual stream divided by sqrt(2 layers) (GPT-2; OPT 0.006, BLOOM 0.0048)."""

    def residual(self, fan_in: int, d_model: int, num_layers: int) -> float:
        return self.stddev * (2 * num_layers) ** -0.5


@section
class SmallInit(InitPart):
    """sqrt(2/(5 d_model)), and 2/(layers sqrt(d_model)) into the residual stream (GPT-NeoX-20B, section 2.1)."""

    def embedding(self, d_model: int) -> float:
        return (2 / (5 * d_model)) ** 0.5

    def kernel(self, fan_in: int, d_model: int) -> float:
        return (2 / (5 * d_model)) ** 0.5

    def residual(self, fan_in: int, d_model: int, num_layers: int) -> float:
        return 2 / num_layers * d_model**-0.5


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part of a layer needs to know of the decoder around it.

    recompute_attention: keep no attention score of the forward pass. dropout: the rate. policy: what `jax.checkpoint`
    keeps of a block.
    """

    d_model: int
    num_layers: int
    init: InitPart
    recompute_attention: bool = False
    dropout: float = 0.0
    policy: Any = None

    def kernel_stddev(self, fan_in: int) -> float:
        """Of a fresh matrix inside a block."""
        return self.init.kernel(fan_in, self.d_model)

    def residual_stddev(self, fan_in: int) -> float:
        """Of a fresh matrix at a block's end."""
        return self.init.residual(fan_in, self.d_model, self.num_layers)


class Dense(nn.Module):
    """A linear map, `einsum(equation, x, kernel)`, plus `bias` over the dimensions that the kernel brings.

    The product goes by the module's name for policies that keep named values (`KeepProjections`).

    shape, axes: the kernel's. stddev: of the fresh kernel. out: logical axes of the result. partial: leave sums over
    mesh axes to `sharding.total` (without a bias, which would be added once for each part).
    """

    equation: str
    shape: tuple[int, ...]
    axes: Axes
    stddev: float
    out: Axes
    bias: bool = False
    partial: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", self.shape, self.axes, normal(self.stddev))
        if self.partial and not self.bias:
            return sharding.einsum(self.equation, x, kernel, out=self.out, partial=True)
        y = checkpoint_name(sharding.einsum(self.equation, x, kernel, out=self.out), self.name or "")
        if not self.bias:
            return y
        operands, result = self.equation.split("->")
        letters = operands.split(",")[1]
        kept = [i for i, letter in enumerate(letters) if letter in result]
        bias = parameter(self, "bias", tuple(self.shape[i] for i in kept), tuple(self.axes[i] for i in kept), zeros)
        # Laid out like the result's own dimensions, with ones where it does not vary.
        where = [result.index(letters[i]) for i in kept]
        bias = sharding.constrain(bias, tuple(self.out[i] for i in where)).astype(y.dtype)
        return y + jnp.expand_dims(bias, [i for i in range(len(result)) if i not in where])
