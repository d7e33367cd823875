"""What a query may see, as a value, and as the one thing that every implementation reads: a range of keys."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


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


def fixed_ranges(mask: Mask, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`ranges` of a row that is one segment without a prefix: int32 [T] twice, known when a program is built."""
    i = np.arange(length, dtype=np.int32)
    first = np.zeros_like(i) if mask.window is None else np.maximum(i - mask.window + 1, 0)
    return first, i + 1 if mask.causal else np.full_like(i, length)


def ranges(
    mask: Mask, rows: int, length: int, segments: jax.Array | None = None, prefix: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(first, stop), int32 [B, T] each: query i sees the keys j with first[i] <= j < stop[i], and no others.

    segments: int32 [B, T]; a segment is a run of equal ids. prefix: bool or int [B, T], marks; the first of a segment's
    tokens, as many as it has marks, are seen by all its queries (with a window: by those that it reaches).
    """
    first, stop = (jnp.broadcast_to(jnp.asarray(x), (rows, length)) for x in fixed_ranges(mask, length))
    if segments is None and prefix is None:
        return first, stop
    if segments is None:
        segments = jnp.zeros((rows, length), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    change = _begins(segments)
    start = jax.lax.cummax(jnp.where(change, index, 0), axis=1)
    last = jnp.concatenate([change[:, 1:], jnp.ones((rows, 1), bool)], axis=1)
    end = jax.lax.cummin(jnp.where(last, index + 1, length), axis=1, reverse=True)
    if prefix is not None:
        marks = jnp.cumsum(jnp.pad((prefix != 0).astype(jnp.int32), ((0, 0), (1, 0))), axis=1)
        count = jnp.take_along_axis(marks, end, axis=1) - jnp.take_along_axis(marks, start, axis=1)
        stop = jnp.maximum(stop, start + count)
    return jnp.maximum(first, start), jnp.minimum(stop, end)


def run_ids(segments: jax.Array) -> jax.Array:
    """Ids that differ between any two runs of equal ids, int32 [B, T]: for those who go by equality."""
    return jnp.cumsum(_begins(segments).astype(jnp.int32), axis=1)


def _begins(segments: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
