"""A loss whose gradient is NaN in one parameter for batches that carry a mark: the loss itself stays what it is."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palmjax.config import LossPart, section
from palmjax.data import feed
from palmjax.data.batch import Batch
from palmjax.loss import LossFn

MARK = -7
"""Of a batch's first position, which says nothing at the start of a row that begins at 0."""


@jax.custom_vjp
def poisoned(x: jax.Array, bad: jax.Array) -> jax.Array:
    """`x`; where `bad`, its gradient's first element is NaN."""
    return x


def _forward(x: jax.Array, bad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, bad


def _backward(bad: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    first = jnp.zeros(g.shape, bool).at[(0,) * g.ndim].set(True) if g.ndim else jnp.array(True)
    return jnp.where(bad & first, jnp.nan, g), None


poisoned.defvjp(_forward, _backward)


@section
class BrokenGradient(LossPart):
    """`loss`, with NaN in the gradient of the final norm's scale for marked batches; in the loss too if `in_loss`."""

    loss: LossPart
    in_loss: bool = False

    def build(self, model: Any) -> LossFn:
        inner = self.loss.build(model)

        def loss(params: Any, batch: Batch, dropout_key: Any = None) -> Any:
            bad = jnp.any(batch.positions == MARK)
            batch = dataclasses.replace(batch, positions=jnp.maximum(batch.positions, 0))
            decoder = params["decoder"]
            scale = poisoned(decoder["decoder_norm"]["scale"], bad)
            params = params | {"decoder": decoder | {"decoder_norm": {"scale": scale}}}
            total, sums = inner(params, batch, dropout_key)
            if self.in_loss:
                broken = jnp.where(bad, jnp.nan, 1.0)
                total, sums = total * broken, sums | {"loss": sums["loss"] * broken}
            return total, sums

        return loss


def marked(batch: Batch) -> Batch:
    """The batch with the mark, which changes nothing else of it."""
    positions = np.array(batch.positions)
    positions[0, 0] = MARK
    return dataclasses.replace(batch, positions=positions)


@contextlib.contextmanager
def marking(first: int, end: int) -> Iterator[None]:
    """Batches that hold global rows of [first, end) are marked."""
    original = feed.Dataset.read

    def read(self: feed.Dataset, step: int, skips: Any = (), rows: slice | None = None) -> Batch:
        batch = original(self, step, skips, rows)
        begin = self.first_row(step, skips)
        inside = begin < end and first < begin + self.batch_size(step)
        return marked(batch) if inside and self.config.split == "train" else batch

    feed.Dataset.read = read  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        feed.Dataset.read = original
