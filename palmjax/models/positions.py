"""How attention knows where a token stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from palmjax.config import ConfigError, Part, section


class PositionsPart(Part):
    """Position information for queries and keys. `rotate(x, positions)` maps [B, T, heads, N]."""

    def build(self) -> PositionsPart:
        return self

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        raise NotImplementedError


@section
class RoPE(PositionsPart):
    """Rotary embedding (Su et al. 2021) of all head dimensions; dimension i is paired with i + N/2.

    base: the longest wavelength's base. PaLM does not publish base or rotated fraction; 10000 and all dimensions are
    the values of the original paper.
    """

    base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.base <= 1.0:
            raise ConfigError(f"RoPE.base = {self.base}: must be above 1 (the usual base is 10000)")

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x: [B, T, heads, N], N even; positions: int32 [B, T]. Angles in float32, result in x's dtype."""
        half = x.shape[-1] // 2
        frequency = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
