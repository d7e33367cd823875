"""Heads packed with tokens for the Hopper kernels: [B, T, H, D] to [N, R, D] and back, N = B K sequences, R = T G rows.

In place where K = 1. G is the number of query heads of a key/value head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.gpu_plan import LOG2E, NOTHING, SEEN


class Rows:
    """The packing of queries [B, T, H, D], padded to R rows, a multiple of `block`, of `width` columns."""

    def __init__(self, shape: tuple[int, ...], kv_heads: int, block: int, width: int):
        self.B, self.T, self.H, self.D = shape
        self.K = kv_heads
        self.N, self.G = self.B * self.K, self.H // self.K
        self.R = -(-self.T * self.G // block) * block
        self.width = width

    def rows(self, x: jax.Array) -> jax.Array:
        """[B, T, H, D] to [N, R, D]."""
        x = x.reshape(self.B, self.T, self.K, self.G, self.D)
        x = jnp.swapaxes(x, 1, 2).reshape(self.N, self.T * self.G, self.D)
        return jnp.pad(x, ((0, 0), (0, self.R - self.T * self.G), (0, self.width - self.D)))

    def from_rows(self, x: jax.Array) -> jax.Array:
        x = x[:, : self.T * self.G, : self.D].reshape(self.B, self.K, self.T, self.G, self.D)
        return jnp.swapaxes(x, 1, 2).reshape(self.B, self.T, self.H, self.D)

    def per_row(self, x: jax.Array, filler: Any) -> jax.Array:
        """[B, T, H] (or what broadcasts to it) to [N, R]."""
        x = jnp.broadcast_to(x, (self.B, self.T, self.H)).reshape(self.B, self.T, self.K, self.G)
        x = jnp.swapaxes(x, 1, 2).reshape(self.N, self.T * self.G)
        return jnp.pad(x, ((0, 0), (0, self.R - self.T * self.G)), constant_values=filler)

    def from_numbers(self, x: jax.Array) -> jax.Array:
        """[N, R] to [B, T, H]."""
        x = x[:, : self.T * self.G].reshape(self.B, self.K, self.T, self.G)
        return jnp.swapaxes(x, 1, 2).reshape(self.B, self.T, self.H)

    def numbers(
        self, first: Any, stop: Any, index: Any, slopes: Any, lse: Any = None, delta: Any = None
    ) -> dict[str, jax.Array]:
        """What the kernels must know of rows, [N, R] each. first: [B, T], or None where it is 0 throughout; stop: [B,
        T]; index: [B or 1, T], read where there are slopes [H]; lse, delta: [B, T, H].
        """
        found = {"stop": self.per_row(stop[:, :, None], 0)}
        if first is not None:
            found["first"] = self.per_row(first[:, :, None], 0)
        if slopes is not None:
            found |= {"index": self.per_row(index[:, :, None], 0), "slope": self.per_row(slopes * LOG2E, 0.0)}
        if lse is not None:
            # Of a row that saw nothing too.
            lse = jnp.where(lse > SEEN, lse * LOG2E, NOTHING)
            found |= {"lse": self.per_row(lse, NOTHING), "delta": self.per_row(delta, 0.0)}
        return found

    def ranges(self, first: Any, stop: Any) -> tuple[jax.Array, jax.Array]:
        """[N, R] of both, where padding rows are like the last one, so that they cut no tile."""
        pad = ((0, 0), (0, self.R - self.T * self.G))
        first, stop = (self.per_row(x[:, :, None], 0)[:, : self.T * self.G] for x in (first, stop))
        return jnp.pad(first, pad, mode="edge"), jnp.pad(stop, pad, mode="edge")
