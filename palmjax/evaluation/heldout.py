"""Held-out loss, bits per byte and token accuracy of a language model. `palmjax eval --checkpoint DIR`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from palmjax import sharding
from palmjax.config import DatasetConfig, Experiment, ShardingRules
from palmjax.data import feed
from palmjax.data.batch import Batch
from palmjax.loss import token_sums
from palmjax.models.api import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Sums over the scored tokens. nats: of cross-entropy; correct: tokens that were the argmax; bytes: of UTF-8 text."""

    nats: float
    tokens: float
    correct: float
    bytes: float

    def metrics(self) -> dict[str, float]:
        """loss (nats a token), bits_per_byte, accuracy, tokens, bytes; NaN where there was nothing to divide by."""
        return {
            "loss": _ratio(self.nats, self.tokens),
            "bits_per_byte": _ratio(self.nats / math.log(2), self.bytes),
            "accuracy": _ratio(self.correct, self.tokens),
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


class HeldOut:
    """One pass over a dataset with a model on a mesh; compiled at the first run, then kept."""

    def __init__(self, config: DatasetConfig, model: LanguageModel, mesh: Mesh, rules: ShardingRules):
        """Raises ConfigError as `feed.open_dataset` does, and if the mesh does not divide the batch."""
        dataset = feed.open_dataset(config)
        self.task, self.vocabulary = config.mixture_or_task_name, dataset.vocabulary
        self._pass, self._mesh, self._rules = dataset.evaluation(), mesh, rules
        rows, length = dataset.batch_size(0), dataset.sequence_length
        self._sharding = sharding.named(mesh, rules, ("batch", "length"), (rows, length), "an evaluation batch")
        # int32 [V]: the bytes of text that each id stands for; ids of the vocabulary's padding never come.
        table = np.zeros(model.config.padded_vocab_size, np.int32)
        table[: len(dataset.token_bytes)] = dataset.token_bytes
        self._step = jax.jit(lambda params, batch: self._sums(model, table, params, batch))

    @classmethod
    def open(cls, experiment: Experiment, model: LanguageModel, mesh: Mesh) -> HeldOut | None:
        """Of the experiment's evaluation dataset; None if it has none."""
        config = experiment.train_eval_dataset
        return None if config is None else cls(config, model, mesh, experiment.sharding)

    @staticmethod
    def _sums(model: LanguageModel, table: np.ndarray, params: Any, batch: Batch) -> dict[str, jax.Array]:
        sums = token_sums(model.logits(params, model.hidden(params, batch)), batch)
        bytes_of = jnp.asarray(table).at[batch.targets].get(out_sharding=sharding.out_spec(("batch", "length"), batch.targets.shape))
        counted = jnp.sum(bytes_of * (batch.weights > 0))
        return {"nats": sums["loss"], "tokens": sums["weight"], "correct": sums["correct"], "bytes": counted}

    def run(self, params: Any, max_batches: int | None = None) -> Result:
        """Scores the rows in order, all of them or the first `max_batches` batches.

        Sums are float32 within a batch and float64 over batches.
        """
        batches = self._pass.num_batches if max_batches is None else min(max_batches, self._pass.num_batches)
        total = dict.fromkeys(("nats", "tokens", "correct", "bytes"), 0.0)
        with feed.Feed(self._pass, self._sharding, 0, batches) as batches_, sharding.activate(self._mesh, self._rules):
            for sums in [self._step(params, batch) for batch in batches_]:
                for name, value in jax.device_get(sums).items():
                    total[name] += float(value)
        return Result(**total)
