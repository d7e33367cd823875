"""The model behind `evaluate.Backend`: the scorer for likelihoods, `decode` for texts, answers kept as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from palmjax.config import ConfigError, ShardingRules
from palmjax.data.vocabulary import Vocabulary
from palmjax.decode import continuation_text, generate
from palmjax.evaluation import run
from palmjax.evaluation.forms import Likelihood, Text, Write
from palmjax.evaluation.kept import Kept
from palmjax.evaluation.schedule import Request
from palmjax.models.api import LanguageModel
from palmjax.progress import Progress
from palmjax.sampling import SamplingPart

TEXTS_AT_ONCE = 64
"""Prompts that are decoded before what they gave is kept."""


class ModelBackend:
    """One model on one mesh. `use` says with which parameters, and where their answers are kept.

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
        self._kept: Kept | None = None
        self.title = "evaluating"

    def use(self, params: Any, kept: Kept | None = None) -> None:
        """Answers with `params` from here on; what was compiled stays. kept: where answers are looked up and put."""
        self._params, self._kept = params, kept
        if self._scorer is None:
            self._scorer = run.Scorer(self._model, params, self._mesh, self._rules, max_length=self._max_length)
        else:
            self._scorer = self._scorer.with_params(params)

    def likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """As `evaluate.Backend`. All processes of a job call it together."""
        assert self._scorer is not None, "`use` comes first"
        with _progress(f"{self.title}: log-likelihoods", len(requests), "requests") as told:
            answers = self._scorer.score(requests, told, kept=cast("run.Answers | None", self._kept))
        return [Likelihood(float(a.log_likelihood), bool(a.greedy), int(a.tokens)) for a in answers]

    def texts(self, prompts: Sequence[tuple[int, ...]], write: Write, keys: Sequence[int]) -> list[Text]:
        """As `evaluate.Backend`. All processes of a job call it together."""
        if write.sampling is not None and not isinstance(write.sampling, SamplingPart):
            raise ConfigError(
                f"Generate.sampling = {write.sampling!r}: must be a way to sample, such as @Temperature()"
            )
        how = f"{write.max_new_tokens}, {write.stop}, {write.sampling}, seed {self._seed}"
        found = {} if self._kept is None else self._kept.texts(prompts, how)
        found = _as_on_the_first_process(prompts, found)
        missing = [(prompt, key) for prompt, key in zip(prompts, keys, strict=True) if prompt not in found]
        with _progress(f"{self.title}: texts", len(prompts), "texts") as told:
            told(len(found))
            for start in range(0, len(missing), TEXTS_AT_ONCE):
                some = missing[start : start + TEXTS_AT_ONCE]
                for (prompt, _), text in zip(some, self._generate(some, write), strict=True):
                    found[prompt] = text
                    if self._kept is not None:
                        self._kept.put_text(prompt, how, text)
                told(len(found))
        return [found[prompt] for prompt in prompts]

    def _generate(self, asked: Sequence[tuple[tuple[int, ...], int]], write: Write) -> list[Text]:
        sampling = write.sampling
        assert sampling is None or isinstance(sampling, SamplingPart)
        found = generate(
            self._model,
            self._params,
            [prompt for prompt, _ in asked],
            write.max_new_tokens,
            sampling=sampling,
            seed=self._seed,
            requests=[key for _, key in asked],
            bos=None,
            stop=self._vocabulary.eos_id,
            mesh=self._mesh,
            rules=self._rules,
        )
        return [
            self._cut(continuation_text(self._vocabulary, prompt, one.tokens.tolist()), one.finished, write.stop)
            for (prompt, _), one in zip(asked, found, strict=True)
        ]

    def _cut(self, text: str, finished: bool, stops: Sequence[str]) -> Text:
        ends = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        return Text(text[: min(ends)], True) if ends else Text(text, finished)


def _as_on_the_first_process(
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
