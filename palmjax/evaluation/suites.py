"""A suite on checkpoints: prompts made once, then asked of one checkpoint after the other; results and their manifests.

The verb, the training loop and continuous evaluation all go through `Session`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from palmjax import distributed, provenance
from palmjax.config import ConfigError, Experiment
from palmjax.data import feed
from palmjax.data.store import TokenStore
from palmjax.data.vocabulary import Vocabulary
from palmjax.evaluation import contamination, evaluate, manifest, results
from palmjax.evaluation.backend import ModelBackend
from palmjax.evaluation.documents import digest
from palmjax.evaluation.prompts import Encoder
from palmjax.evaluation.run import ScorerConfig
from palmjax.evaluation.schedule import Request
from palmjax.evaluation.store import Store
from palmjax.evaluation.tasks import Suite
from palmjax.models.api import LanguageModel

ANSWERS = "answers.jsonl"


@dataclasses.dataclass(frozen=True)
class Which:
    """Which parameters are evaluated: for the manifest. checkpoint: its path, or what else names them."""

    checkpoint: str
    step: int
    weights: str


class Session:
    """A suite with its prompts made, on one model and mesh.

    Raises ConfigError, naming file and line, for what is no document, for rows longer than the model's positions, and
    for a token store (`Suite.contamination`) that is not there.
    """

    def __init__(
        self,
        suite: Suite,
        experiment: Experiment,
        model: LanguageModel,
        mesh: Mesh,
        vocabulary: Vocabulary,
        definition: str = "",
    ):
        """definition: the suite's gin text, for the manifest."""
        self.suite, self.definition, self._experiment = suite, definition, experiment
        self._model, self._mesh, self._vocabulary = model, mesh, vocabulary
        limits = [suite.max_length or feed.row_length(experiment.train_dataset), model.config.max_length]
        self.max_length = min(limit for limit in limits if limit is not None)
        if suite.max_length is not None and suite.max_length > self.max_length:
            raise ConfigError(f"Suite.max_length = {suite.max_length}: the model has {self.max_length} positions")
        self._store = None if suite.contamination is None else TokenStore(suite.contamination)
        self.asked = evaluate.ask(suite.build(), Encoder(vocabulary, self.max_length), suite.formats)
        distributed.agree("prompts", manifest.prompts_root(self.asked))
        self._backend = ModelBackend(model, mesh, experiment.sharding, vocabulary, self.max_length, suite.seed)
        self._contamination: results.Contamination | None = None

    @property
    def numerics(self) -> dict[str, Any]:
        """What decides the last bits of an answer beside weights and tokens."""
        return {
            "dtype": str(jnp.dtype(self._model.config.dtype)),
            "parameters": "float32",
            "scorer": dataclasses.asdict(ScorerConfig()),
            "mesh": {axis: size for axis, size in self._mesh.shape.items()},
            "device": self._mesh.devices.flat[0].device_kind,
            "max_length": self.max_length,
            "libraries": provenance.library_versions(),
            "source": provenance.code_version()["source"],
        }

    def values(self, params: Any) -> list[evaluate.Outcome]:
        """The outcomes of `params`, nothing kept. All processes of a job call it together."""
        self._backend.use(params)
        return evaluate.outcomes(self.asked, evaluate.answer(self.asked, self._backend))

    def evaluate(self, params: Any, which: Which, folder: Path) -> dict[str, Any]:
        """Asks everything, going on from what `folder` holds, and writes the result there; returns result.json.

        All processes of a job call it together; the first one writes.
        """
        primary = jax.process_index() == 0
        self._backend.title = f"step {which.step:,}"
        with contextlib.ExitStack() as stack:
            self._backend.use(params)
            identity = self._backend.identity()
            self._backend.kept = stack.enter_context(Store(folder / ANSWERS, identity)) if primary else None
            found = evaluate.outcomes(self.asked, evaluate.answer(self.asked, self._backend))
        dirty = self.contamination()
        if not primary:
            return results.result_json(found, {}, dirty)
        return results.write(folder, found, self.manifest(which, found), dirty)

    def contamination(self) -> results.Contamination | None:
        """Which documents the suite's token store holds; None without one. Looked for once."""
        if self._store is None or self._contamination is not None:
            return self._contamination
        tasks = {each.name: each.documents.documents for each in self.asked}
        documents = [document for listed in tasks.values() for document in listed]
        dirty = iter(contamination.overlap(documents, self._store))
        self._contamination = {name: [next(dirty) for _ in listed] for name, listed in tasks.items()}
        return self._contamination

    def manifest(self, which: Which, found: Sequence[evaluate.Outcome]) -> dict[str, Any]:
        """All that the result depended on. No times."""
        requests = self.requests()
        facts: dict[str, Any] = {
            "checkpoint": {"path": which.checkpoint, "step": which.step, "weights": which.weights},
            "requests": digest([[request.context, request.continuation] for request in requests]),
            "numerics": self.numerics,
            "seed": self.suite.seed,
            "code": dict(provenance.code_version()),
            "counters": {one.name: dict(one.counters) for one in found},
            "suite": self.definition,
            "model": _flat(self._experiment.model),
        }
        if (store := self._store) is not None:
            facts["contamination"] = {"store": store.path, "fingerprint": store.fingerprint, "tokens": store.num_tokens}
        return manifest.describe(self.asked, self._vocabulary, **facts)

    def requests(self) -> list[Request]:
        """Every request once, in the order in which they are asked."""
        encoded = (one for each in self.asked for prompt in each.prompts for one in prompt.encoded)
        return list(dict.fromkeys(request for one in encoded for request in one.requests))

    def answers(self, params: Any, requests: Sequence[Request]) -> list[Any]:
        """Likelihoods of single requests, asked anew."""
        self._backend.use(params)
        return self._backend.likelihoods(requests)


def _flat(section: Any) -> Mapping[str, str]:
    """Every leaf of a configuration, as text."""
    if not dataclasses.is_dataclass(section):
        return {"": repr(section)}
    return {field.name: repr(getattr(section, field.name)) for field in dataclasses.fields(section)}
