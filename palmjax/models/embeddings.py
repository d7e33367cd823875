"""From token ids to the first hidden states, and from the last hidden states to logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import Part, require, section
from palmjax.models.layers import GELU, ActivationPart, LayerNorm, NormPart
from palmjax.models.parameters import Context, Dense, normal, parameter, zeros
from palmjax.sharding import Axes

RESIDUAL: Axes = ("batch", "length", "residual")


@section
class LearnedPositions:
    """A learned vector for each position, added to the tokens' (GPT-2, OPT, BERT).

    length: how many positions there are, the longest row. offset: rows in front of the first position's (OPT: 2).
    """

    length: int
    offset: int = 0

    def __post_init__(self) -> None:
        require(self.length >= 1, self, "length", "1 or more")
        require(self.offset >= 0, self, "offset", "0 or more")


@section
class TokenTypes:
    """A learned vector for each kind of token, added to the tokens' (BERT's two sentences)."""

    count: int = 2

    def __post_init__(self) -> None:
        require(self.count >= 1, self, "count", "1 or more")


@section
class Embedding:
    """The embeddings of a row: tokens, and what is present of the rest.

    width: of the token table, with a projection to d_model (OPT-350M: 512); None for d_model. scale: of the tokens'
    vectors, None for 1 (Gemma: sqrt(d_model)). norm: over the sum (BLOOM, BERT).
    """

    width: int | None = None
    scale: float | None = None
    positions: LearnedPositions | None = None
    types: TokenTypes | None = None
    norm: NormPart | None = None

    def __post_init__(self) -> None:
        require(self.width is None or self.width >= 1, self, "width", "1 or more, or None for d_model")
        require(self.scale is None or self.scale > 0.0, self, "scale", "above 0, or None for 1")


class TokenEmbedder(nn.Module):
    """The table [V padded, width], and the projection to d_model if they differ in width."""

    config: Embedding
    context: Context
    rows: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c, D = self.config, self.context.d_model
        stddev = self.context.init.embedding(D)
        table = parameter(self, "embedding", (self.rows, c.width or D), ("vocab", "embed"), normal(stddev))
        if c.width is None:
            x = sharding.take(table, tokens, RESIDUAL, self.dtype)
        else:
            x = sharding.take(table, tokens, ("batch", "length", None), self.dtype)
            stddev = self.context.kernel_stddev(c.width)
            x = Dense("BTW,WD->BTD", (c.width, D), (None, "embed"), stddev, RESIDUAL, name="project_in")(x)
        return x if c.scale is None else x * jnp.asarray(c.scale, x.dtype)


class VectorEmbedder(nn.Module):
    """A table of `count` learned vectors, looked up by number; a number beyond the table takes its last row."""

    count: int
    axis: str
    context: Context
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        D = self.context.d_model
        table = parameter(
            self, "embedding", (self.count, D), (self.axis, "embed"), normal(self.context.init.embedding(D))
        )
        return sharding.take(table, jnp.minimum(ids, self.count - 1), RESIDUAL, self.dtype)


class HeadPart(Part):
    """Hidden states to logits. `build(context, rows)` returns a module (hidden [B, T, D], table [V, W]) -> logits.

    rows: V padded. Logits are float32 [B, T, V]: not rounded to the compute dtype on the way, since bfloat16 logits
    tie, and cost hundredths of a nat.
    """

    tied: bool

    def readout(self, params: Any, table: jax.Array, d_model: int) -> Readout | None:
        """The head as one product with the rows of a table, of its parameters (`params`); None where it is more."""
        return None


@dataclasses.dataclass(frozen=True)
class Readout:
    """logits = cap(scale hidden table^T). table: [V padded, D], its logical axes ("vocab", "embed")."""

    table: jax.Array
    scale: float
    soft_cap: float | None


def _capped(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@section
class TiedHead(HeadPart):
    """Products with the token table. Where that is narrower than d_model, hidden states are projected to its width.

    logit_scale: None for 1/sqrt(d_model) (PaLM section 5); 1 in most families. soft_cap: c tanh(logits / c).
    """

    logit_scale: float | None = None
    soft_cap: float | None = None

    tied = True

    def __post_init__(self) -> None:
        for field in ("logit_scale", "soft_cap"):
            value = getattr(self, field)
            require(value is None or value > 0.0, self, field, "above 0, or None")

    def build(self, context: Context, rows: int) -> nn.Module:
        return TiedHeadModule(self, context)

    def scale(self, d_model: int) -> float:
        """Of the logits."""
        return d_model**-0.5 if self.logit_scale is None else self.logit_scale

    def readout(self, params: Any, table: jax.Array, d_model: int) -> Readout | None:
        return None if table.shape[1] != d_model else Readout(table, self.scale(d_model), self.soft_cap)


class TiedHeadModule(nn.Module):
    """Logits from the token table."""

    config: TiedHead
    context: Context

    @nn.compact
    def __call__(self, hidden: jax.Array, table: jax.Array) -> jax.Array:
        D, W = self.context.d_model, table.shape[1]
        if W != D:
            stddev = self.context.kernel_stddev(D)
            out: Axes = ("batch", "length", None)
            hidden = Dense("BTD,DW->BTW", (D, W), ("embed", None), stddev, out, name="project_out")(hidden)
        logits = sharding.einsum("BTD,VD->BTV", hidden, table, out=("batch", "length", "vocab"), dtype=jnp.float32)
        return _capped(logits * self.config.scale(D), self.config.soft_cap)


@section
class UntiedHead(HeadPart):
    """A matrix of its own, with a bias if `bias` (GPT-J). soft_cap: c tanh(logits / c), None for none."""

    bias: bool = False
    logit_scale: float = 1.0
    soft_cap: float | None = None

    tied = False

    def __post_init__(self) -> None:
        require(self.logit_scale > 0.0, self, "logit_scale", "above 0")
        require(self.soft_cap is None or self.soft_cap > 0.0, self, "soft_cap", "above 0, or None")

    def build(self, context: Context, rows: int) -> nn.Module:
        return UntiedHeadModule(self, context, rows)

    def readout(self, params: Any, table: jax.Array, d_model: int) -> Readout | None:
        return None if self.bias else Readout(params["kernel"].T, self.logit_scale, self.soft_cap)


class UntiedHeadModule(nn.Module):
    """Logits from `kernel` [D, V] and `bias` [V]."""

    config: UntiedHead
    context: Context
    rows: int

    @nn.compact
    def __call__(self, hidden: jax.Array, table: jax.Array) -> jax.Array:
        D, c = self.context.d_model, self.config
        kernel = parameter(self, "kernel", (D, self.rows), ("embed", "vocab"), normal(self.context.init.kernel(D, D)))
        out: Axes = ("batch", "length", "vocab")
        logits = sharding.einsum("BTD,DV->BTV", hidden, kernel, out=out, dtype=jnp.float32)
        if c.bias:
            bias = parameter(self, "bias", (self.rows,), ("vocab",), zeros)
            logits = logits + sharding.constrain(bias, ("vocab",))
        return _capped(logits * c.logit_scale, c.soft_cap)


@section
class MaskedLMHead(HeadPart):
    """A dense layer, an activation, a norm, then products with the token table plus a bias (BERT)."""

    activation: ActivationPart = GELU()
    norm: NormPart = LayerNorm(epsilon=1e-12, bias=True)

    tied = True

    def build(self, context: Context, rows: int) -> nn.Module:
        return MaskedLMHeadModule(self, context, rows)


class MaskedLMHeadModule(nn.Module):
    """Logits of BERT's masked tokens: `transform`, `norm`, and `bias` [V]."""

    config: MaskedLMHead
    context: Context
    rows: int

    @nn.compact
    def __call__(self, hidden: jax.Array, table: jax.Array) -> jax.Array:
        D, stddev = self.context.d_model, self.context.kernel_stddev(self.context.d_model)
        # The second dimension is the result's: two of one logical axis can't be sharded alike.
        h = Dense("BTD,DE->BTE", (D, D), ("embed", None), stddev, RESIDUAL, bias=True, name="transform")(hidden)
        h = self.config.norm.build("norm")(self.config.activation.build()(h))
        logits = sharding.einsum("BTD,VD->BTV", h, table, out=("batch", "length", "vocab"), dtype=jnp.float32)
        bias = parameter(self, "bias", (self.rows,), ("vocab",), zeros)
        return logits + sharding.constrain(bias, ("vocab",))
