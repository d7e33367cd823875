"""Requests into batches of one shape, and the loop over tokens on the host.

A request runs in the program of its own length: always `rows` requests, a cache whose room is the next power of two
that holds it, prompts read in chunks at fixed places. Rows that nobody asked for fill a batch up. So the program, and
with it every bit of the result, is a function of the request alone: not of how many others there are, how long they
are, or where in the batch it stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from palmjax import sharding
from palmjax.config import SEEDS, ConfigError, ShardingRules
from palmjax.data.vocabulary import Vocabulary
from palmjax.decode import programs
from palmjax.decode.search import Asked, SearchPart, View
from palmjax.decode.text import continuation_text, first_stop
from palmjax.decode.tokenwise import TokenByToken
from palmjax.models.api import LanguageModel
from palmjax.sampling import Greedy, SamplingPart

ROWS = 8
"""Requests a batch, where nothing else is said: a matrix is read once for 8 rows at about the time of one."""

CHUNK = 64
"""Tokens of a prompt read at once: with ROWS, 512 rows of a matrix product."""

SMALLEST_ROOM = 256
"""Entries of the smallest cache. Attention goes through a cache in blocks of so many and stops at the last filled one,
so that room costs memory and no time.
"""

STOP_EVERY = 16
"""Tokens between two looks for stop strings."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What followed a prompt. tokens: int32 [n], what ended it included. finished: whether the stop token or a stop
    string came. log_probs: float32 [n], log p(token | all before it) of the model itself, before temperature and cuts
    (nats). text: of the tokens, up to a stop string; None without a vocabulary.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    finished: bool
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests that share a program: their indices, room in the cache, and tokens of a prompt read at once."""

    members: tuple[int, ...]
    room: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class _Stops:
    """What ends a row besides the number of its tokens."""

    token: int | None
    strings: tuple[str, ...]
    vocabulary: Vocabulary | None
    least: int

    def cut(self, tokens: np.ndarray) -> np.ndarray:
        """A row up to its first stop token, which it keeps."""
        ends = np.flatnonzero(tokens == self.token) if self.token is not None else np.zeros(0, int)
        return tokens[: ends[0] + 1] if ends.size else tokens

    def look(self, prompt: Sequence[int], tokens: np.ndarray, seen: int) -> tuple[int, str] | None:
        """`first_stop` in a row, of whose tokens the first `seen` hold none."""
        if not self.strings:
            return None
        return first_stop(self._text_behind(prompt), self.cut(tokens).tolist(), seen, self.strings, self.least)

    def continuation(
        self, prompt: Sequence[int], tokens: np.ndarray, log_probs: np.ndarray, stop: tuple[int, str] | None
    ) -> Continuation:
        """The row's result. stop: where a stop string was found."""
        if stop is not None:
            count, text = stop
            return Continuation(tokens=tokens[:count], log_probs=log_probs[:count], finished=True, text=text)
        tokens = self.cut(tokens)
        text = None if self.vocabulary is None else self._text_behind(prompt)(tokens.tolist())
        finished = self.token is not None and tokens[-1:].tolist() == [self.token]
        return Continuation(tokens=tokens, log_probs=log_probs[: len(tokens)], finished=finished, text=text)

    def _text_behind(self, prompt: Sequence[int]) -> Callable[[Sequence[int]], str]:
        assert self.vocabulary is not None
        return functools.partial(continuation_text, self.vocabulary, prompt)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the batches of one call have in common."""

    model: LanguageModel
    params: Any
    search: SearchPart
    key: np.ndarray
    stops: _Stops
    most: int
    as_prefix: bool
    rows: int
    mesh: Mesh | None
    rules: ShardingRules

    def run(
        self, batch: Batch, prompts: Sequence[Sequence[int]], ids: Sequence[int], texts: Sequence[Sequence[int]]
    ) -> list[Continuation]:
        """The continuations of a batch. Of all requests: prompts with BOS, ids of draws, what their text is behind."""
        prompts, texts = ([values[index] for index in batch.members] for values in (prompts, texts))
        count = len(prompts)
        tokens = np.zeros((self.rows, batch.room), np.int32)
        lengths, names = np.ones(self.rows, np.int32), np.zeros(self.rows, np.uint32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        lengths[:count] = [len(prompt) for prompt in prompts]
        names[:count] = [ids[index] for index in batch.members]
        stop = -1 if self.stops.token is None else self.stops.token
        asked = Asked(self._place(names), self.key, *map(np.int32, (stop, self.stops.least, self.most)))
        static = {"model": self.model, "search": self.search, "rules": self.rules}
        # Rows that only fill the batch up are done before they begin.
        arrays = [self._place(values) for values in (tokens, lengths, np.arange(self.rows) >= count)]
        shapes = {"room": batch.room, "new_length": _power(self.most, 16), "chunk": batch.chunk}
        state, seen = programs.begin(self.params, *arrays, asked, **static, **shapes, as_prefix=self.as_prefix)
        view, before, stopped = jax.device_get(seen), 0, {}
        looks = self.search.grows and bool(self.stops.strings)
        while True:
            if looks:
                stopped |= self._look(view, texts, before, stopped)
            ended = np.isin(np.arange(self.rows), list(stopped))
            if np.all(view.done | ended) or view.count >= self.most:
                break
            before, upto = int(view.count), min(int(view.count) + STOP_EVERY, self.most) if looks else self.most
            state, seen = programs.advance(self.params, state, self._place(ended), np.int32(upto), asked, **static)
            view = jax.device_get(seen)
        if not looks:
            stopped = self._look(view, texts, 0, {})
        ends = [(row, int(view.lengths[row])) for row in range(count)]
        return [
            self.stops.continuation(texts[row], view.tokens[row, :end], view.log_probs[row, :end], stopped.get(row))
            for row, end in ends
        ]

    def _look(
        self, view: View, texts: Sequence[Sequence[int]], seen: int, stopped: dict[int, tuple[int, str]]
    ) -> dict[int, tuple[int, str]]:
        """Rows in which a stop string has come up since `seen` tokens, and where."""
        rows = [row for row in range(len(texts)) if row not in stopped]
        tokens = [np.asarray(view.tokens[row, : view.lengths[row]]) for row in range(len(texts))]
        found = {row: self.stops.look(texts[row], tokens[row], seen) for row in rows}
        return {row: stop for row, stop in found.items() if stop is not None}

    def _place(self, values: np.ndarray) -> Any:
        """`values` [R, ...] over the devices by rows, the same on every process."""
        if self.mesh is None:
            return values
        axes: sharding.Axes = ("batch", *[None] * (values.ndim - 1))
        placed = sharding.named(self.mesh, self.rules, axes, values.shape, "prompts")
        return jax.make_array_from_callback(values.shape, placed, values.__getitem__)


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: SamplingPart | SearchPart | None = None,
    min_new_tokens: int = 0,
    seed: int = 0,
    requests: Sequence[int] | None = None,
    bos: int | None = 0,
    stop: int | None = 1,
    stop_strings: Sequence[str] = (),
    vocabulary: Vocabulary | None = None,
    behind_prompt: bool = True,
    as_prefix: bool = False,
    rows: int = ROWS,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    on_found: Callable[[int, Continuation], None] | None = None,
) -> list[Continuation]:
    """Continues each prompt by at most `max_new_tokens` tokens: any number of prompts, of any lengths.

    prompts: token ids without BOS, never cut. bos: the id put before each, so that an empty prompt is BOS alone; None
    for none, as other stacks prompt some models. as_prefix: prompts are read as the inputs of a prefix language model,
    each of whose tokens sees all of them. sampling: Greedy() by default; Temperature, BeamSearch, ContrastiveSearch.
    seed, requests: request i draws from the key of (seed, requests[i], position); requests are 0, 1, ... by default,
    each below 2^32. So the continuation of a prompt with its first tokens of continuation is the rest of the same
    continuation.
    stop: the id that ends a row (EOS), or None. stop_strings: a row ends where its text, by `vocabulary`, holds one of
    them, however its tokens spell it; the text is cut before it. (A beam search cuts its best continuation so.)
    behind_prompt: whether the text is what the new tokens add to the prompt's; otherwise it is theirs alone, which some
    tokenizers begin without its space.
    min_new_tokens: how many there must be before anything ends a row.
    rows: requests in a batch, rounded up to what divides among the mesh. What a request gets depends on its own values,
    `rows` and the mesh, and not on the other requests; see this module's docstring. mesh, rules: where `params` lie;
    None for one device. All processes of a job call it together with equal arguments.
    on_found: called with index and continuation of each request when its batch has ended.

    Raises ConfigError for no prompts, ids outside the vocabulary, a row longer than the positions that the model has,
    a `max_new_tokens` below one or below `min_new_tokens`, stop strings that are empty or have no vocabulary, or a seed
    or request that is negative or longer than 32 bits.
    """
    search = sampling if isinstance(sampling, SearchPart) else TokenByToken(sampling=sampling or Greedy())
    ids = list(range(len(prompts)) if requests is None else requests)
    whole = [[*([] if bos is None else [bos]), *prompt] for prompt in prompts]
    _check(model, search, whole, max_new_tokens)
    _check_settings(max_new_tokens, min_new_tokens, [seed, *ids], stop_strings, vocabulary, rows)
    rules = rules or ShardingRules()
    texts = prompts if behind_prompt else [()] * len(prompts)
    found: dict[int, Continuation] = {}
    with contextlib.nullcontext() if mesh is None else sharding.activate(mesh, rules):
        job = _Job(
            model=model,
            params=model.in_compute_dtype(params),
            search=search,
            key=np.asarray(jax.random.key_data(jax.random.key(seed))),
            stops=_Stops(stop, tuple(stop_strings), vocabulary, min_new_tokens),
            most=max_new_tokens,
            as_prefix=as_prefix,
            rows=_whole_rows(rows, mesh, rules),
            mesh=mesh,
            rules=rules,
        )
        for batch in batches([len(prompt) for prompt in whole], max_new_tokens, job.rows, as_prefix):
            for index, one in zip(batch.members, job.run(batch, whole, ids, texts), strict=True):
                found[index] = one
                if on_found is not None:
                    on_found(index, one)
    return [found[index] for index in range(len(prompts))]


def batches(lengths: Sequence[int], new_tokens: int, rows: int, as_prefix: bool = False) -> list[Batch]:
    """Requests with prompts of `lengths` tokens in batches of at most `rows`, the longest first.

    Those of a batch have their program in common, and are alike in length as far as there is a choice.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, length in enumerate(lengths):
        # A prefix language model must read a prompt in one piece.
        chunk = _power(length, CHUNK) if as_prefix else CHUNK
        groups.setdefault((_power(max(length + new_tokens, chunk), SMALLEST_ROOM), chunk), []).append(index)
    out = []
    for (room, chunk), members in sorted(groups.items(), reverse=True):
        members.sort(key=lambda index: (-lengths[index], index))
        out += [Batch(tuple(members[i : i + rows]), room, chunk) for i in range(0, len(members), rows)]
    return out


def _power(size: int, smallest: int) -> int:
    """The next power of two, at least `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def _whole_rows(rows: int, mesh: Mesh | None, rules: ShardingRules) -> int:
    """`rows`, or the next multiple that the mesh axes of a batch divide."""
    ways = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in rules.batch)
    return -(-rows // ways) * ways


def _check(model: LanguageModel, search: SearchPart, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts:
        raise ConfigError("no prompts to continue")
    if not model.config.attention.causal:
        raise ConfigError("Attention.causal = False: an encoder has no next token to continue a prompt with")
    vocab_size = model.config.vocab_size
    for row, prompt in enumerate(prompts):
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"prompt {row} has token {token}; the model's ids are 0 to {vocab_size - 1}")
        if not prompt:
            raise ConfigError(f"prompt {row} is empty, and no BOS is put before it")
        read = len(prompt) + max_new_tokens - (not search.reads_last)
        if (longest := model.config.max_length) is not None and read > longest:
            raise ConfigError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens = {max_new_tokens} it passes the "
                f"{longest} positions that the model has"
            )


def _check_settings(
    most: int, least: int, seeds: Sequence[int], stops: Sequence[str], vocabulary: Vocabulary | None, rows: int
) -> None:
    if most < 1:
        raise ConfigError(f"max_new_tokens = {most}: must be at least 1")
    if not 0 <= least <= most:
        raise ConfigError(f"min_new_tokens = {least}: must be from 0 to max_new_tokens = {most}")
    for name, value in zip(["seed", *["request"] * (len(seeds) - 1)], seeds, strict=True):
        if not 0 <= value < SEEDS:  # jax.random.key would drop the higher bits
            raise ConfigError(f"{name} = {value}: must be from 0 to {SEEDS - 1}")
    if isinstance(stops, str):
        raise ConfigError(f"stop_strings = {stops!r}: must be a list of strings")
    if not all(stops):
        raise ConfigError("an empty stop string would end every row before it begins")
    if stops and vocabulary is None:
        raise ConfigError("stop strings are looked for in text: give the vocabulary")
    if rows < 1:
        raise ConfigError(f"rows = {rows}: must be at least 1")
