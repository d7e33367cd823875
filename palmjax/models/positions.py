"""How attention knows where a token stands: rotations of queries and keys, or terms added to the scores."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from palmjax import sharding
from palmjax.config import ConfigError, Part, require, section
from palmjax.models.parameters import Context, Dense, normal, parameter, zeros
from palmjax.sharding import Axes

Operands = tuple[tuple[jax.Array, Axes], ...]
"""Arrays with their logical axes, which attention hands to `PositionsPart.scores` on each device."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the attention op is given: queries [B, Q, H, N], and terms of the scores if any.

    alibi_slopes: float32 [H]. bias: float32 [B or 1, H, Q, S], added to the scaled scores.
    """

    q: jax.Array
    alibi_slopes: jax.Array | None = None
    bias: jax.Array | None = None


class PositionsPart(Part):
    """Position information in attention. A variant overrides what it needs; the base is no positions at all."""

    def build(self) -> PositionsPart:
        return self

    def check(self, head_dim: int) -> None:
        """Raises ConfigError if heads of this size cannot carry these positions."""

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys x [B, T, heads, N] at `positions` int32 [B, T]."""
        return x

    def shared(self, num_heads: int, context: Context, dtype: Any) -> jax.Array | None:
        """A parameter that all layers share, made inside the decoder's module; None for none."""
        return None

    def operands(self, q: jax.Array, keys: int, shared: Any, context: Context) -> Operands:
        """Arrays that `scores` needs, made inside the attention layer's module.

        q: the queries [B, Q, H, N]. keys: S, how many keys there are. shared: what `shared` returned.
        """
        return ()

    def scores(self, q: jax.Array, q_index: jax.Array, k_index: jax.Array, scale: float, *operands: Any) -> Scores:
        """q: [B, Q, H, N]; q_index: int32 [B or 1, Q]; k_index: int32 [S]. On each device's own block."""
        return Scores(q)


@section
class NoPositions(PositionsPart):
    """Attention that is not told where tokens stand: positions are embedded, or not given at all."""


class ScalingPart(Part):
    """Rotary frequencies of a model that was stretched to longer rows than it was first trained on."""

    magnitude: ClassVar[float] = 1.0
    """What rotated queries and keys are multiplied by."""

    def build(self) -> ScalingPart:
        return self

    def stretched(self, frequency: jax.Array, base: float) -> jax.Array:
        """The frequencies [dims/2], highest first, float32, of which `frequency` are the ones of `base`."""
        raise NotImplementedError


@section
class LinearScaling(ScalingPart):
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float

    def __post_init__(self) -> None:
        require(self.factor >= 1.0, self, "factor", "1 or more")

    def stretched(self, frequency: jax.Array, base: float) -> jax.Array:
        return frequency / self.factor


@section
class BandScaling(ScalingPart):
    """Long wavelengths divided by `factor`, short ones kept, and those between in between (LLaMA 3.1).

    A wavelength is long if the row of `original_length` tokens holds fewer than `low` of it, short if more than `high`.
    """

    factor: float
    original_length: int
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        require(self.factor >= 1.0, self, "factor", "1 or more")
        require(self.original_length >= 1, self, "original_length", "1 or more")
        require(0.0 < self.low < self.high, self, "low", f"above 0 and below high = {self.high}")

    def stretched(self, frequency: jax.Array, base: float) -> jax.Array:
        held = self.original_length * frequency / (2 * math.pi)
        kept = jnp.clip((held - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequency * (kept + (1.0 - kept) / self.factor)


@section
class YaRNScaling(ScalingPart):
    """YaRN (Peng et al. 2023, section 3): as BandScaling, with a ramp over dimensions instead of wavelengths.

    original_length: tokens of the rows before. fast, slow: how often a wavelength that is kept, or divided, fits in
    one of them. attention: what queries and keys are multiplied by; None for the paper's 0.1 ln(factor) + 1.
    truncate: whether the ramp's ends are whole dimensions.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(self.factor >= 1.0, self, "factor", "1 or more")
        require(self.original_length >= 1, self, "original_length", "1 or more")
        require(0.0 < self.slow < self.fast, self, "slow", f"above 0 and below fast = {self.fast}")

    @property
    def magnitude(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 0.1 * math.log(self.factor) + 1.0 if self.attention is None else self.attention

    def stretched(self, frequency: jax.Array, base: float) -> jax.Array:
        half = frequency.shape[0]

        def dimension(turns: float) -> float:
            """The (fractional) pair of which a row holds so many turns."""
            return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)

        first, last = dimension(self.fast), dimension(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        ramp = (jnp.arange(half, dtype=jnp.float32) - first) / ((last - first) or 0.001)
        divided = jnp.clip(ramp, 0.0, 1.0)
        return frequency * (1.0 - divided + divided / self.factor)


@section
class RoPE(PositionsPart):
    """Rotary embedding (Su et al. 2021); dimension i is paired with i + dims/2 (GPT-NeoX, LLaMA, Falcon).

    base: the longest wavelength's base. PaLM does not publish base or rotated fraction; 10000 and all dimensions are
    the values of the original paper. dims: how many of a head's first dimensions are rotated; None for all. scaling:
    of a model stretched to longer rows; None for none.
    """

    base: float = 10_000.0
    dims: int | None = None
    scaling: ScalingPart | None = None

    def __post_init__(self) -> None:
        if self.base <= 1.0:
            raise ConfigError(f"{type(self).__name__}.base = {self.base}: must be above 1 (the usual base is 10000)")
        require(self.dims is None or (self.dims >= 2 and self.dims % 2 == 0), self, "dims", "even, or None for all")

    def check(self, head_dim: int) -> None:
        if self.dims is None and head_dim % 2:
            raise ConfigError(f"Attention.head_dim = {head_dim} is odd; rotary positions pair dimensions")
        require(self.dims is None or self.dims <= head_dim, self, "dims", f"at most Attention.head_dim = {head_dim}")

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x: [B, T, heads, N]; positions: int32 [B, T]. Angles in float32, result in x's dtype."""
        dims = self.dims or x.shape[-1]
        half = dims // 2
        frequency = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.scaling is not None:
            frequency = self.scaling.stretched(frequency, self.base)
        angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
        low, high = self.split(x[..., :dims].astype(jnp.float32))
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if self.scaling is not None:
            cos, sin = cos * self.scaling.magnitude, sin * self.scaling.magnitude
        turned = self.join(low * cos - high * sin, high * cos + low * sin).astype(x.dtype)
        return turned if dims == x.shape[-1] else jnp.concatenate([turned, x[..., dims:]], axis=-1)

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The two members of each pair."""
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]

    def join(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        return jnp.concatenate([low, high], axis=-1)


@section
class InterleavedRoPE(RoPE):
    """Rotary embedding that pairs dimension 2i with 2i + 1 (GPT-J; the original paper's text)."""

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x[..., 0::2], x[..., 1::2]

    def join(self, low: jax.Array, high: jax.Array) -> jax.Array:
        return jnp.stack([low, high], axis=-1).reshape(*low.shape[:-1], 2 * low.shape[-1])


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slope of each head, float32 [num_heads] (Press et al. 2022): 2^(-8 i / n) for i = 1..n, n a power of two.

    Another number of heads takes the slopes of the power of two below, and the rest from every other slope of the
    power above (BLOOM's 112 heads: 64 and 48).
    """

    def powers(count: int) -> list[float]:
        return [2.0 ** (-8.0 * i / count) for i in range(1, count + 1)]

    below = 1 << (num_heads.bit_length() - 1)
    return np.asarray([*powers(below), *powers(2 * below)[0::2][: num_heads - below]], np.float32)


@section
class ALiBi(PositionsPart):
    """Each head's scores fall with the distance, at a slope of its own, and nothing is learned (Press et al. 2022)."""

    def operands(self, q: jax.Array, keys: int, shared: Any, context: Context) -> Operands:
        return ((jnp.asarray(alibi_slopes(q.shape[2])), ("heads",)),)

    def scores(self, q: jax.Array, q_index: jax.Array, k_index: jax.Array, scale: float, *operands: Any) -> Scores:
        return Scores(q, alibi_slopes=operands[0])


class RelativeTable(nn.Module):
    """A learned number for each head and bucket of distances, float32 [H, buckets], named as T5X names it."""

    buckets: int
    stddev: float

    @nn.compact
    def __call__(self, num_heads: int, dtype: Any) -> jax.Array:
        shape = (num_heads, self.buckets)
        table = parameter(self, "rel_embedding", shape, ("heads", "relpos_buckets"), normal(self.stddev))
        return table.astype(dtype)


@section
class RelativeBuckets(PositionsPart):
    """A learned bias for each head and bucket of distances (Raffel et al. 2020, section 2.1), a table in each layer.

    The near half of the buckets holds one distance each, the far half grows logarithmically up to max_distance.
    bidirectional: half of the buckets for keys behind the query, for layers without a causal mask.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self) -> None:
        require(self.num_buckets >= 4 and self.num_buckets % 4 == 0, self, "num_buckets", "a multiple of 4")
        require(self.max_distance > self.num_buckets // 2, self, "max_distance", "more than half of num_buckets")

    def buckets(self, distance: jax.Array) -> jax.Array:
        """Bucket of each distance (key index - query index), int32."""
        count, first = self.num_buckets, jnp.zeros_like(distance)
        if self.bidirectional:
            count //= 2
            first = jnp.where(distance > 0, count, 0)
            back = jnp.abs(distance)
        else:
            back = jnp.maximum(-distance, 0)
        exact = count // 2
        grown = jnp.log(jnp.maximum(back, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = jnp.minimum(exact + (grown * (count - exact)).astype(jnp.int32), count - 1)
        return first + jnp.where(back < exact, back, far)

    def operands(self, q: jax.Array, keys: int, shared: Any, context: Context) -> Operands:
        return ((self.table(q.shape[2], context, q.dtype), ("heads", "relpos_buckets")),)

    def table(self, num_heads: int, context: Context, dtype: Any) -> jax.Array:
        stddev = context.init.embedding(context.d_model)
        return RelativeTable(self.num_buckets, stddev, name="relpos_bias")(num_heads, dtype)

    def scores(self, q: jax.Array, q_index: jax.Array, k_index: jax.Array, scale: float, *operands: Any) -> Scores:
        buckets = self.buckets(k_index[None, None, :] - q_index[:, :, None])
        return Scores(q, bias=jnp.moveaxis(operands[0][:, buckets], 0, 1).astype(jnp.float32))


@section
class SharedRelativeBuckets(RelativeBuckets):
    """RelativeBuckets with one table for all layers (T5)."""

    def shared(self, num_heads: int, context: Context, dtype: Any) -> jax.Array:
        return self.table(num_heads, context, dtype)

    def operands(self, q: jax.Array, keys: int, shared: Any, context: Context) -> Operands:
        return ((shared, ("heads", "relpos_buckets")),)


@section
class TransformerXL(PositionsPart):
    """Relative positions of Transformer-XL (Dai et al. 2019, section 3.3), as Gopher has them.

    score(i, j) = (q_i + u) k_j + (q_i + v) W r_(i-j), with r a sinusoid of the distance, W a matrix of each layer and
    u, v vectors of each head. For causal layers. max_wavelength: of the sinusoids.
    """

    max_wavelength: float = 10_000.0

    def __post_init__(self) -> None:
        require(self.max_wavelength > 1.0, self, "max_wavelength", "above 1")

    def operands(self, q: jax.Array, keys: int, shared: Any, context: Context) -> Operands:
        return TransformerXLModule(self, context, name="relative")(q, keys)

    def scores(self, q: jax.Array, q_index: jax.Array, k_index: jax.Array, scale: float, *operands: Any) -> Scores:
        distances, content, position = operands
        by_distance = jnp.einsum(
            "BQHN,SHN->BHQS", q + position.astype(q.dtype), distances, preferred_element_type=jnp.float32
        )
        back = jnp.clip(q_index[:, :, None] - k_index[None, None, :], 0, distances.shape[0] - 1)
        bias = scale * jnp.take_along_axis(by_distance, back[:, None], axis=-1)
        return Scores(q + content.astype(q.dtype), bias=bias)


class TransformerXLModule(nn.Module):
    """Parameters of TransformerXL: `kernel` [D, H, N], `content_bias` (u) and `position_bias` (v) [H, N]."""

    config: TransformerXL
    context: Context

    @nn.compact
    def __call__(self, q: jax.Array, keys: int) -> Operands:
        H, N, D = q.shape[2], q.shape[3], self.context.d_model
        frequency = self.config.max_wavelength ** (-np.arange(0, D, 2) / D)
        angle = np.arange(keys)[:, None] * frequency
        sinusoids = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)[:, :D]
        per_head: Axes = ("heads", "head_dim")
        stddev = self.context.kernel_stddev(D)
        distances = Dense("SD,DHN->SHN", (D, H, N), ("embed", *per_head), stddev, (None, *per_head), name="projection")(
            sharding.constrain(jnp.asarray(sinusoids, q.dtype), (None, None))
        )
        content = parameter(self, "content_bias", (H, N), per_head, zeros)
        position = parameter(self, "position_bias", (H, N), per_head, zeros)
        return (distances, (None, *per_head)), (content, per_head), (position, per_head)
