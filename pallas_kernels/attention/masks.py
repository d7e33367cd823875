"""What a query may see, as a value. Implementations read the value; `allowed` is its meaning."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Query i sees key j if j <= i (`causal`), i - j < `window`, and both are in one segment (when segments are given).

    window: how many keys back, the query's own included; None for all. Raises ValueError if it is below one.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"Mask.window = {self.window}: a query sees at least itself; use None for no window")

    def allowed(self, q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
        """Whether index pairs [..., Q, 1] and [..., 1, S] (or any shapes that broadcast) may attend: bool."""
        seen = jnp.ones(jnp.broadcast_shapes(q_index.shape, kv_index.shape), bool)
        if self.causal:
            seen &= kv_index <= q_index
        if self.window is not None:
            seen &= q_index - kv_index < self.window
        return seen
