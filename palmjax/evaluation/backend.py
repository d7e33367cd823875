"""The model behind `evaluate.Backend`: the scorer for likelihoods, `decode` for texts, answers kept as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from palmjax import decode
from palmjax.config import ConfigError, ShardingRules
from palmjax.data.vocabulary import Vocabulary
from palmjax.decode import SearchPart
from palmjax.evaluation import run
from palmjax.evaluation.forms import Text, Write
from palmjax.evaluation.schedule import Request
from palmjax.evaluation.store import Answer, Store
from palmjax.models.api import LanguageModel
from palmjax.progress import Progress
from palmjax.sampling import SamplingPart

TEXTS_AT_ONCE = 64
"""Prompts that are decoded before what they gave is kept."""


class ModelBackend:
    """One model on one mesh. `use` says with which parameters, and `kept` where their answers are looked up and put.

    seed: of what is drawn when a text is sampled; a draw depends on it and on the prompt alone.
    """

    def __init__(
        self,
        model: LanguageModel,
        mesh: Mesh | None,
        rules: ShardingRules,
        vocabulary: Vocabulary,
        max_length: int,
        seed: int = 0,
    ):
        self._model, self._mesh, self._rules, self._vocabulary = model, mesh, rules, vocabulary
        self._max_length, self._seed = max_length, seed
        self._scorer: run.Scorer | None = None
        self._params: Any = None
        self.kept: Store | None = None
        self.title = "evaluating"

    def use(self, params: Any) -> None:
        """Answers with `params` from here on, and keeps nothing; what was compiled stays."""
        self._params, self.kept = params, None
        if self._scorer is None:
            self._scorer = run.Scorer(self._model, params, self._mesh, self._rules, max_length=self._max_length)
        else:
            self._scorer = self._scorer.with_params(params)

    @property
    def scorer(self) -> run.Scorer:
        assert self._scorer is not None, "`use` comes first"
        return self._scorer

    def identity(self) -> str:
        """Of the model and its numerics: what kept answers go by. All processes of a job call it together."""
        return self.scorer.identity(self._params)

    def likelihoods(self, requests: Sequence[Request]) -> list[Answer]:
        """As `evaluate.Backend`. All processes of a job call it together."""
        with _progress(f"{self.title}: log-likelihoods", len(requests), "requests") as told:
            return self.scorer.score(requests, told, kept=self.kept)

    def texts(self, prompts: Sequence[tuple[int, ...]], write: Write, keys: Sequence[int]) -> list[Text]:
        """As `evaluate.Backend`. All processes of a job call it together."""
        if write.sampling is not None and not isinstance(write.sampling, (SamplingPart, SearchPart)):
            raise ConfigError(f"Generate.sampling = {write.sampling!r}: must be a way to sample, as @Temperature()")
        how = f"{write.max_new_tokens}, {write.stop}, {write.sampling}, seed {self._seed}"
        found = _on_all_processes(prompts, {} if self.kept is None else _kept_texts(self.kept, prompts, how))
        left = {prompt: key for prompt, key in zip(prompts, keys, strict=True) if prompt not in found}
        with _progress(f"{self.title}: texts", len(prompts), "texts") as told:
            told(len(found))
            missing = sorted(left.items(), key=lambda one: (len(one[0]), one[0]))  # the same files whatever the order
            for start in range(0, len(missing), TEXTS_AT_ONCE):
                some = missing[start : start + TEXTS_AT_ONCE]
                for (prompt, _), text in zip(some, self._generate(some, write), strict=True):
                    found[prompt] = text
                    if self.kept is not None:
                        self.kept.put_text(prompt, how, json.dumps([text.text, text.finished]))
                told(len(found))
        return [found[prompt] for prompt in prompts]

    def _generate(self, asked: Sequence[tuple[tuple[int, ...], int]], write: Write) -> list[Text]:
        sampling = write.sampling
        assert sampling is None or isinstance(sampling, (SamplingPart, SearchPart))
        found = decode.generate(
            self._model,
            self._params,
            [prompt for prompt, _ in asked],
            write.max_new_tokens,
            sampling=sampling,
            seed=self._seed,
            requests=[key for _, key in asked],
            bos=None,
            stop=self._vocabulary.eos_id,
            stop_strings=write.stop,
            vocabulary=self._vocabulary,
            mesh=self._mesh,
            rules=self._rules,
        )
        return [Text(one.text or "", one.finished) for one in found]


def _kept_texts(kept: Store, prompts: Sequence[tuple[int, ...]], how: str) -> dict[tuple[int, ...], Text]:
    found = {prompt: kept.get_text(prompt, how) for prompt in prompts}
    return {prompt: Text(*json.loads(text)) for prompt, text in found.items() if text is not None}


def _on_all_processes(
    prompts: Sequence[tuple[int, ...]], found: dict[tuple[int, ...], Text]
) -> dict[tuple[int, ...], Text]:
    """What process 0 has found; the others, which write nothing, know only for which prompts."""
    if jax.process_count() == 1 or not prompts:
        return found
    from jax.experimental import multihost_utils

    told = multihost_utils.broadcast_one_to_all(np.array([prompt in found for prompt in prompts]))
    return {prompt: found.get(prompt, Text("", True)) for prompt, known in zip(prompts, told, strict=True) if known}


def _progress(title: str, total: int, unit: str) -> Any:
    """On the first process only."""
    return Progress(title, total, unit) if jax.process_index() == 0 else _Silent()


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, *_: object) -> None: ...
