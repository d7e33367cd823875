"""A checkpoint as a model of EleutherAI's lm-evaluation-harness, 0.4.13. `lm_eval.py` has the verb.

Texts become tokens as lm-eval's own `hf` backend makes them (context and continuation are joined and split where the
context alone would end; what does not fit is cut from the left). Numbers come from `palmjax.evaluation.run`, which
schedules all requests of a kind, of all tasks, together. Of several hosts each runs the harness and sees one worker;
they share the work below it, and compare what they ask before they compute.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from palmjax import decode
from palmjax.config import ConfigError
from palmjax.data.vocabulary import HuggingFace
from palmjax.decode import BeamSearch, PowerOfLength, SearchPart
from palmjax.evaluation import schedule
from palmjax.evaluation.run import Scorer, ScorerConfig
from palmjax.evaluation.schedule import Request
from palmjax.evaluation.store import Store
from palmjax.interop.chat import ChatTemplate
from palmjax.progress import Progress
from palmjax.sampling import SamplingPart, Temperature
from palmjax.trained import Trained

TEXTS_AT_ONCE = 16
"""Prompts that are continued in one batch."""

COUNTED = ("cut_from_the_left", "merged_with_the_context", "no_context_left", "longer_than_a_row")
"""Requests that were not asked as they are written, by what was done."""


class PalmJax(TemplateLM):
    """The model of a checkpoint.

    opened: the checkpoint, and params: its parameters on the mesh. max_length: tokens that are read at most; what the
    checkpoint was trained on by default. add_bos_token: put BOS before every text (True) or none (False), None for what
    the tokenizer does. prefix_token_id: stands for an empty context; BOS by default, or EOS where there is none.
    max_gen_toks: new tokens of a task that does not say. seed: of sampled texts. chat_template: a file with a Jinja
    template, None for the one that came with the tokenizer. answers: a file of answers that are not computed again
    (`evaluation.store`). rows: `ScorerConfig.rows`. batch_size, max_batch_size and device are lm-eval's: an answer does
    not depend on what shares its batch, so they change nothing.
    """

    def __init__(
        self,
        opened: Trained,
        params: Any,
        *,
        trained_length: int,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        chat_template: str | None = None,
        answers: str | None = None,
        rows: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        # The harness would fork for its bootstrap, behind jax's threads.
        os.environ["DISABLE_MULTIPROC"] = "1"
        self._opened, self._params, self._seed = opened, params, seed
        self._vocabulary = opened.info.vocabulary
        self._bos, self._prefix = add_bos_token, prefix_token_id
        limits = [max_length or trained_length, opened.model.config.max_length]
        self.max_length = min(n for n in limits if n is not None)
        self.max_gen_toks = max_gen_toks
        config = ScorerConfig(rows=rows)
        rules = opened.experiment.sharding
        self._scorer = Scorer(opened.model, params, opened.mesh, rules, config=config, max_length=self.max_length)
        self._identity = self._scorer.identity(params)
        self._store = Store(answers, self._identity) if answers and jax.process_index() == 0 else None
        self._template = ChatTemplate.find(chat_template, Path(opened.path).parent, self._vocabulary)
        self._counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
        self._last_context: tuple[str | None, list[int]] = (None, [])

    # --- text and tokens -------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self._vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._vocabulary.bos_id if self._prefix is None else self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with BOS before them where the tokenizer puts it, unless the text brings it."""
        begins = self._bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and self._begins_with_bos(string):
            begins = False
        try:
            ids = self._vocabulary.encode(string)
        except UnicodeEncodeError as error:
            raise ConfigError(f"a task's text, {string[:40]!a}, is not UTF-8") from error
        bos = self._vocabulary.prompt_bos
        if self._bos and begins and bos is None:
            bos = self._vocabulary.bos_id
        return ids if bos is None or begins is False else [bos, *ids]

    def _begins_with_bos(self, text: str) -> bool:
        spelled = self._vocabulary.token(self.prefix_token_id) if isinstance(self._vocabulary, HuggingFace) else None
        return bool(spelled) and text.startswith(str(spelled))

    @property
    def tokenizer_name(self) -> str:
        return f"palmjax-{self._vocabulary.fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None if chat_template is False or chat_template is None else self._chat.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._chat.apply(chat_history, add_generation_prompt)

    @property
    def _chat(self) -> ChatTemplate:
        if self._template is None:
            raise ConfigError(
                "--apply_chat_template: the checkpoint's tokenizer brings no chat template; give a Jinja file with "
                "--model_args chat_template=FILE"
            )
        return self._template

    # --- requests --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's own. Raises ConfigError for an empty continuation."""
        for context, continuation in (request.args for request in requests):
            if not continuation:
                raise ConfigError(f"an empty continuation behind {context[-40:]!r}: there is nothing to score")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's own, but where the tokenizer joins the whole continuation with the context's last token, for
        which lm-eval has no score: that token is then the continuation, and counted.
        """
        kept = context.rstrip()
        whole = self.tok_encode(context + continuation)
        if self._last_context[0] != kept:  # the choices of a question ask for it again and again
            self._last_context = (kept, self.tok_encode(kept))
        alone = self._last_context[1]
        if len(whole) > len(alone):
            return alone, whole[len(alone) :]
        self._counts["merged_with_the_context"] += 1
        split = next((n for n, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(whole) - 1)
        return whole[:split], whole[split:]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._requests(*request) for request in requests]
        found = iter(self._score([request for some in asked for request in some], disable_tqdm))
        answers = []
        for (texts, _, _), some in zip(requests, asked, strict=True):
            parts = [next(found) for _ in some]
            answers.append((math.fsum(total for total, _ in parts), all(greedy for _, greedy in parts)))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def _requests(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> list[Request]:
        """As lm-eval's `hf` cuts it: the last max_length + 1 tokens, of which the continuation is never cut.

        What it has no score for (it ends) is scored by a rule and counted: where no context is left, because it was
        spaces alone, which go to the continuation, or one joined token, there is the prefix token; a continuation
        longer than a row is read in windows.
        """
        if not continuation:  # the prefix token alone
            raise ConfigError(f"nothing is left to score of {texts[1]!r} behind {texts[0][-40:]!r}")
        if not context:
            self._counts["no_context_left"] += 1
            context = [self.prefix_token_id]
        if len(continuation) > self.max_length:
            self._counts["longer_than_a_row"] += 1
            return schedule.rolling(continuation, context[-1], self.max_length)
        over = max(0, len(context) + len(continuation) - 1 - self.max_length)
        self._counts["cut_from_the_left"] += bool(over)
        return [Request(tuple(context[over:]), tuple(continuation))]

    def _score(self, requests: Sequence[Request], quiet: bool) -> list[tuple[float, bool]]:
        with _progress("lm-eval: log-likelihoods", len(set(requests)), quiet) as told:
            answers = self._scorer.score(requests, told, kept=self._store)
        return [(answer.log_likelihood, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in disjoint windows. Where the tokenizer begins a text with BOS, lm-eval 0.4.13 scores that
        BOS too, behind the prefix token; add_bos_token=False leaves it out.
        """
        texts = [request.args[0] for request in requests]
        windows = [schedule.rolling(self.tok_encode(text), self.prefix_token_id, self.max_length) for text in texts]
        found = iter(self._score([window for some in windows for window in some], disable_tqdm))
        totals = [sum(next(found)[0] for _ in some) for some in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string or EOS. A draw depends on the prompt and on how often it was asked
        before, not on the batch.
        """
        asked, seen = [], dict[tuple[Any, ...], int]()
        for request in requests:
            context, given = request.args
            how = _Generation.of(given, self.max_gen_toks)
            room = self.max_length - how.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks = {how.max_new_tokens} leaves no room for a prompt in max_length = {self.max_length}"
                )
            ids = self.tok_encode(context)
            self._counts["cut_from_the_left"] += len(ids) > room
            prompt = tuple(ids[-room:]) or (self.prefix_token_id,)
            number = seen[prompt, how] = seen.get((prompt, how), -1) + 1
            asked.append((how, prompt, number))
        found = self._generate(asked, disable_tqdm)
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _generate(self, asked: Sequence[tuple[_Generation, tuple[int, ...], int]], quiet: bool) -> list[str]:
        kept = self._kept_texts(asked)
        groups = dict[_Generation, list[tuple[_Generation, tuple[int, ...], int]]]()
        for one in sorted(set(asked) - set(kept), key=lambda one: (len(one[1]), one[1], one[2])):
            groups.setdefault(one[0], []).append(one)
        with _progress("lm-eval: texts", len(set(asked)), quiet) as told:
            told(len(kept))
            for how, some in groups.items():
                for start in range(0, len(some), TEXTS_AT_ONCE):
                    batch = some[start : start + TEXTS_AT_ONCE]
                    for one, text in zip(batch, self._texts(how, batch), strict=True):
                        kept[one] = text
                        if self._store is not None:
                            self._store.put_text(one[1], f"{how}, {one[2]}, {self._seed}", text)
                    told(len(kept))
        return [kept[one] for one in asked]

    def _kept_texts(self, asked: Sequence[Any]) -> dict[Any, str]:
        """What the answers' file has; nothing with several processes, of which only one reads it."""
        if self._store is None or jax.process_count() > 1:
            return {}
        found = {one: self._store.get_text(one[1], f"{one[0]}, {one[2]}, {self._seed}") for one in set(asked)}
        return {one: text for one, text in found.items() if text is not None}

    def _texts(self, how: _Generation, batch: Sequence[tuple[_Generation, tuple[int, ...], int]]) -> list[str]:
        numbers = [int.from_bytes(hashlib.sha256(repr(one[1:]).encode()).digest()[:4], "big") >> 1 for one in batch]
        found = decode.generate(
            self._opened.model,
            self._params,
            [prompt for _, prompt, _ in batch],
            how.max_new_tokens,
            sampling=how.sampling,
            seed=self._seed,
            requests=numbers,
            bos=None,
            stop=self.eot_token_id,
            stop_strings=how.until,
            vocabulary=self._vocabulary,
            behind_prompt=False,
            mesh=self._opened.mesh,
            rules=self._opened.experiment.sharding,
        )
        return [one.text or "" for one in found]

    @property
    def counts(self) -> dict[str, int]:
        """Of COUNTED, how many requests so far."""
        return dict(self._counts)

    def get_model_info(self) -> dict[str, Any]:
        """For the results' "config": what the numbers came from."""
        info, shape = self._opened.info, self._opened.mesh.shape
        return {
            "model_num_parameters": sum(leaf.size for leaf in jax.tree.leaves(self._params)),
            "model_dtype": self._opened.model.config.dtype,
            "palmjax_checkpoint": self._opened.path,
            "palmjax_step": info.step,
            "palmjax_numerics_sha256": self._identity,
            "palmjax_tokenizer": self._vocabulary.fingerprint,
            "palmjax_mesh": {axis: size for axis, size in shape.items() if size > 1},
            "palmjax_max_length": self.max_length,
            "palmjax_rolling": "disjoint windows of max_length, the first behind the prefix token; a BOS that the "
            "tokenizer puts before the text is scored with it",
            "palmjax_begins_with_bos": self.tok_encode("a", None) != self.tok_encode("a", False),
            **{f"palmjax_requests_{name}": count for name, count in self._counts.items()},
        }


class _Generation:
    """How a text is continued: hashable, equal for equal requests."""

    def __init__(self, until: tuple[str, ...], max_new_tokens: int, sampling: SamplingPart | SearchPart | None):
        self.until, self.max_new_tokens, self.sampling = until, max_new_tokens, sampling

    @classmethod
    def of(cls, given: dict[str, Any], max_gen_toks: int) -> _Generation:
        """Of a task's generation_kwargs. Raises ConfigError for one that is not known here."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(given, max_gen_toks))
        until = tuple(stop for stop in handle_stop_sequences(known.pop("until"), eos=None) if stop)
        new, draws = known.pop("max_gen_toks"), known.pop("do_sample", False)
        temperature = float(known.pop("temperature", 0.0))
        cuts = {name: known.pop(name, None) for name in ("top_k", "top_p")}
        beams, penalty = known.pop("num_beams", 1), known.pop("length_penalty", None)
        if known:
            raise ConfigError(
                f"generation_kwargs: {', '.join(sorted(known))} can't be set here; known are until, max_gen_toks, "
                "do_sample, temperature, top_k, top_p, num_beams, length_penalty"
            )
        if beams > 1 and draws:
            raise ConfigError("generation_kwargs: num_beams and do_sample: a beam search draws nothing here")
        sampling = Temperature(temperature=temperature or 1.0, **cuts) if draws else None
        if beams > 1:
            sampling = BeamSearch(beams=beams, length=PowerOfLength(alpha=1.0 if penalty is None else float(penalty)))
        return cls(until, new, sampling)

    def __repr__(self) -> str:
        return json.dumps([self.until, self.max_new_tokens, repr(self.sampling)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Generation) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def _progress(title: str, total: int, quiet: bool) -> Any:
    """On the first process only."""
    return _Silent() if quiet or jax.process_index() else Progress(title, total, "requests")


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, *_: object) -> None: ...
