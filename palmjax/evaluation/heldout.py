"""Held-out loss, bits per byte and token accuracy of a language model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from palmjax import sharding
from palmjax.config import ConfigError, Experiment, ShardingRules
from palmjax.data import feed
from palmjax.data.batch import Batch, abstract_batch
from palmjax.loss import token_losses
from palmjax.models.api import LanguageModel

SUMS = ("nats", "log_z_squared", "tokens", "correct", "bytes")

Report = Callable[[int, int], None]
"""Told (batches scored, batches in all)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Sums over the scored tokens: those with weight.

    nats: of cross-entropy. log_z_squared: of log(Z)^2, what z-loss is a multiple of. tokens: how many, by weight.
    correct: targets that were the argmax (1/n for one of n tied). bytes: of UTF-8 text that the targets stand for; EOS
    stands for none.
    """

    nats: float
    log_z_squared: float
    tokens: float
    correct: float
    bytes: float

    @property
    def loss(self) -> float:
        """Cross-entropy, nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text; NaN for a vocabulary whose ids stand for no text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def accuracy(self) -> float:
        """Share of targets that were the most probable token."""
        return self.correct / self.tokens

    @property
    def z(self) -> float:
        """Mean log(Z)^2 of a token."""
        return self.log_z_squared / self.tokens

    def metrics(self) -> dict[str, float]:
        """What is reported, by name; without bits_per_byte where it is NaN."""
        names = ("loss", "bits_per_byte", "accuracy", "z", "tokens", "bytes")
        values = {name: float(getattr(self, name)) for name in names}
        return {name: value for name, value in values.items() if not math.isnan(value) or name == "loss"}


class HeldOut:
    """One pass over a dataset with a model on a mesh. Compiled at the first run or by `compile`, then kept.

    Sums are made row by row in float32 on the devices and over rows on the host, exactly (`math.fsum`): neither the
    batch size nor the order of rows enters the result, but for what they change in a row's own arithmetic.
    """

    def __init__(self, dataset: feed.Dataset, model: LanguageModel, mesh: Mesh, rules: ShardingRules):
        """Raises ConfigError if the mesh does not divide the batch, or the model knows fewer ids than the dataset."""
        self.task, self.split = dataset.config.mixture_or_task_name, dataset.config.split
        self.vocabulary, ids = dataset.vocabulary, model.config.vocab_size
        if self.vocabulary.size > ids:
            raise ConfigError(f"task {self.task!r} has {self.vocabulary.size:,} ids and the model only {ids:,}")
        model.check_rows(dataset.sequence_length, dataset.config.packing)
        self._packing = dataset.config.packing
        self._pass, self._mesh, self._rules = dataset.evaluation(), mesh, rules
        self._shape = (dataset.batch_size(0), dataset.sequence_length)
        self._sharding = sharding.named(mesh, rules, ("batch", "length"), self._shape, "an evaluation batch")
        # float32 [V], exact: the bytes of text that each id stands for; the vocabulary's padding never comes.
        table = np.zeros(model.config.padded_vocab_size, np.float32)
        table[: len(dataset.token_bytes)] = dataset.token_bytes
        self._table = table
        self._step: Any = jax.jit(lambda params, table, batch: _row_sums(model, params, table, batch))

    @classmethod
    def open(cls, experiment: Experiment, model: LanguageModel, mesh: Mesh) -> HeldOut | None:
        """Of the experiment's evaluation dataset; None if it has none. Raises ConfigError if that can't be opened."""
        config = experiment.train_eval_dataset
        return None if config is None else cls(feed.open_dataset(config), model, mesh, experiment.sharding)

    def compile(self, params: Any) -> None:
        """Compiles for `params`: arrays, or ShapeDtypeStructs with the shardings that they will have."""
        batch = abstract_batch(self._packing, *self._shape, self._sharding)
        with sharding.activate(self._mesh, self._rules):
            self._step = self._step.lower(params, self._table, batch).compile()

    def run(self, params: Any, max_batches: int | None = None, progress: Report | None = None) -> Result:
        """Scores the rows in order: all of them, or those of the first `max_batches` batches.

        All processes of a job call it together. Raises ConfigError if no token has any weight.
        """
        batches = self._pass.num_batches if max_batches is None else min(max_batches, self._pass.num_batches)
        rows: list[np.ndarray] = []
        launched: jax.Array | None = None
        with feed.Feed(self._pass, self._sharding, 0, batches) as read, sharding.activate(self._mesh, self._rules):
            for number, batch in enumerate(read):
                earlier, launched = launched, self._step(params, self._table, batch)
                if earlier is not None:  # fetched while the batch just launched is computed
                    rows.append(jax.device_get(earlier))
                if progress is not None:
                    progress(number, batches)
            if launched is not None:
                rows.append(jax.device_get(launched))
            if progress is not None:
                progress(batches, batches)
        totals = [math.fsum(values) for values in np.concatenate(rows, axis=1)] if rows else [0.0] * len(SUMS)
        result = Result(**dict(zip(SUMS, totals, strict=True)))
        if not result.tokens:
            raise ConfigError(f"task {self.task!r}, split {self.split!r} has no token to score in {batches} batches")
        return result


def _row_sums(model: LanguageModel, params: Any, table: jax.Array, batch: Batch) -> jax.Array:
    """float32 [len(SUMS), B], on every device: the sums of each row's tokens. table: float32 [V], bytes of each id."""

    def bytes_of(targets: jax.Array, table: jax.Array) -> jax.Array:
        return table[targets]

    targets, weights = jnp.asarray(batch.targets), jnp.asarray(batch.weights)
    nats, log_z, correct = token_losses(model.logits(params, model.hidden(params, batch)), targets)
    text = sharding.local(bytes_of, (("batch", "length"), (None,)), ("batch", "length"), targets, table)
    by_token = (nats * weights, jnp.square(log_z) * weights, weights, correct * weights, text * (weights > 0))
    return sharding.constrain(jnp.stack([jnp.sum(x, axis=1) for x in by_token]), (None, None))
