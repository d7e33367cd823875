"""Log-likelihoods of continuations on the sharded model, the same bits whatever is asked beside them.

The compiled program has one shape: R pages of C tokens, read against a paged cache of keys and values. A request's
answer depends on its own tokens alone (`schedule`) as far as a product's rows do not depend on each other, which holds
for XLA on CPU and is measured elsewhere by `benchmarks/eval_invariance.py`.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from palmjax import distributed, provenance, sharding
from palmjax.config import ConfigError, ShardingRules, require, section
from palmjax.evaluation import schedule, weights
from palmjax.evaluation.schedule import Request, Schedule, Shape, Step
from palmjax.evaluation.store import Answer
from palmjax.loss import token_losses
from palmjax.models.api import LanguageModel
from palmjax.models.embeddings import RESIDUAL

BLOCK = 256
"""Tokens that a request's longest row is rounded up to a power of two times: attention goes over blocks of so many."""

EXACTLY: Any = {"xla_allow_excess_precision": False}
"""XLA's options: values are rounded to bfloat16 where the program says so. By default that depends on what is fused,
and so on the mesh.
"""

IN_FLIGHT = 2
"""Steps launched before the first one's numbers are fetched."""

Progress = Callable[[int, int], None]
"""Told (requests answered, requests in all)."""


class Answers(Protocol):
    """Where answers are kept, such as `store.Store`."""

    def get(self, request: Request) -> Answer | None: ...
    def put(self, request: Request, answer: Answer) -> None: ...


@section
class ScorerConfig:
    """Sizes of the compiled program. They enter the numbers' last bits, so equal runs have equal ones.

    rows: pages that each data-parallel shard reads in a step; None for 16 on CPU and 256 elsewhere. page: tokens a
    page; a shorter one shares more between requests, a longer one makes larger products. cache_tokens: of keys and
    values that a shard keeps, at most, if the longest request allows it.
    """

    rows: int | None = None
    page: int = 16
    cache_tokens: int = 1 << 16

    def __post_init__(self) -> None:
        require(self.rows is None or self.rows >= 1, self, "rows", "1 or more, or None")
        require(self.page >= 1 and BLOCK % self.page == 0, self, "page", f"a divisor of {BLOCK}")
        require(self.cache_tokens >= 1, self, "cache_tokens", "1 or more")


class Scorer:
    """Answers requests with one model. Compiled at the first call, once for each power of two of the longest request.

    All processes of a job make it and call it alike; each gets all answers.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Any,
        mesh: Mesh | None = None,
        rules: ShardingRules | None = None,
        *,
        config: ScorerConfig | None = None,
        max_length: int | None = None,
    ):
        """params: as they lie on `mesh` under `rules`, or on one device. max_length: the longest row that is read, the
        last token of a request being unread; None for what the model has positions for.

        Raises ConfigError for a model that does not predict the next token.
        """
        if not all(layer.attention.causal for layer in model.config.block.layers):
            raise ConfigError("Attention.causal = False: an encoder has no log-likelihood of a continuation")
        limits = [n for n in (max_length, model.config.max_length) if n is not None]
        self.max_length = min(limits) if limits else None
        self._model, self._mesh, self._rules = model, mesh, rules or ShardingRules()
        self.config = config or ScorerConfig()
        axes = () if mesh is None else self._rules.batch
        self._shards = math.prod(mesh.shape.get(axis, 1) for axis in axes) if mesh is not None else 1
        with self._active():
            self._params = jax.jit(model.in_compute_dtype)(params)
        self.compiled: dict[Shape, Any] = {}
        """The program of each shape that was needed."""
        self._caches: dict[Shape, Any] = {}

    def with_params(self, params: Any) -> Scorer:
        """The same scorer of other parameters that lie alike: what was compiled is shared."""
        other = copy.copy(self)
        other._caches = {}
        with self._active():
            other._params = jax.jit(self._model.in_compute_dtype)(params)
        return other

    def identity(self, params: Any) -> str:
        """A hash of all that decides an answer's bits but its tokens: weights, model, sizes, code, devices.

        Of the mesh only what splits a product counts: on CPU more data-parallel devices change nothing (elsewhere see
        `benchmarks/eval_invariance.py`). All processes of a job call it together.
        """
        split = {axis: size for axis, size in (self._mesh.shape.items() if self._mesh else ()) if size > 1}
        device = jax.devices()[0] if self._mesh is None else self._mesh.devices.flat[0]
        decides = {
            "weights": weights.fingerprint(params),
            "model": repr(self._model.config),
            "sizes": [self.config.page, self._rows],
            "split": {axis: size for axis, size in split.items() if axis not in self._rules.batch},
            "device": device.device_kind,
            "code": provenance.code_version()["source"],
            "libraries": provenance.library_versions(),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def score(
        self, requests: Sequence[Request], progress: Progress | None = None, *, kept: Answers | None = None
    ) -> list[Answer]:
        """An answer to each request, in their order; equal requests are computed once.

        kept: answers found there are not computed again, and new ones are put there as they come, in the order of the
        requests' tokens; of several processes, the first one's counts. Raises ConfigError for a request that is empty,
        longer than `max_length` or of unknown ids.
        """
        schedule.check(requests, self._model.config.vocab_size, self.max_length)
        different = list(dict.fromkeys(requests))
        found = _kept(different, kept)
        left = [request for request in different if request not in found]
        done = len(found)
        if progress is not None:
            progress(done, len(different))
        for number, request, answer in self._compute(left):
            found[request] = answer
            if kept is not None and jax.process_index() == 0:
                kept.put(request, answer)
            if progress is not None:
                progress(done + number, len(different))
        return [found[request] for request in requests]

    def _compute(self, requests: Sequence[Request]) -> Any:
        """(how many, request, answer), in the order of the schedule."""
        if not requests:
            return
        plan = Schedule(requests, self._shape(max(request.read for request in requests)))
        if jax.process_count() > 1:
            distributed.agree("requests to score", plan.digest)
        program, cache = self._program(plan.shape)
        log_probs, greedy = np.zeros(plan.results[-1], np.float32), np.zeros(plan.results[-1], bool)
        complete, told = np.zeros(len(requests), bool), 0
        launched: collections.deque[tuple[Step, jax.Array]] = collections.deque()
        steps = plan.steps()
        while True:
            step = next(steps, None)
            if step is not None:
                with self._active():
                    cache, out = program(self._params, cache, *self._place(step))
                launched.append((step, out))
                if len(launched) < IN_FLIGHT:
                    continue
            if not launched:
                break
            behind, out = launched.popleft()
            values = np.asarray(jax.device_get(out)).reshape(2, -1)
            log_probs[behind.result] = values[0, behind.source]
            greedy[behind.result] = values[1, behind.source] > 0
            complete[list(behind.done)] = True
            while told < len(requests) and complete[plan.order[told]]:
                number = plan.order[told]
                mine = slice(int(plan.results[number]), int(plan.results[number + 1]))
                total = math.fsum(log_probs[mine].tolist())
                told += 1
                yield told, requests[number], Answer(total, bool(greedy[mine].all()), mine.stop - mine.start)
        assert told == len(requests)
        self._caches[plan.shape] = cache  # the next call's, which needs no empty one

    def _shape(self, longest: int) -> Shape:
        """Of the program for requests of at most `longest` tokens read."""
        c, rows = self.config, self._rows
        depth = BLOCK // c.page << max(0, math.ceil(math.log2(longest / BLOCK)))
        pool = min((rows + 1) * depth, max(c.cache_tokens // c.page, 2 * depth))
        tile = max(1, rows * c.page // 8)
        return Shape(shards=self._shards, rows=rows, page=c.page, depth=depth, pool=pool + 1, tile=tile)

    @property
    def _rows(self) -> int:
        return self.config.rows or (16 if _platform(self._mesh) == "cpu" else 256)

    def _program(self, shape: Shape) -> tuple[Any, Any]:
        """The compiled step, and a cache, whose pages hold anything."""
        model, pages = self._model, shape.shards * shape.pool
        with self._active():
            cache = self._caches.pop(shape, None)
            if cache is None:
                cache = jax.jit(functools.partial(model.init_pages, pages, shape.page))()
            if shape not in self.compiled:
                rows, ids = shape.shards * shape.rows, jnp.int32
                sizes = (
                    (rows, shape.page),
                    (rows,),
                    (rows, shape.depth),
                    *[(shape.shards, shape.tiles, shape.tile)] * 2,
                )
                inputs = [jax.ShapeDtypeStruct(size, ids, sharding=self._sharding(size)) for size in sizes]
                step = jax.jit(functools.partial(_step, model), donate_argnums=1)
                lowered = step.lower(self._params, cache, *inputs, jax.ShapeDtypeStruct((), ids))
                self.compiled[shape] = lowered.compile(EXACTLY)
        return self.compiled[shape], cache

    def _place(self, step: Step) -> tuple[Any, ...]:
        arrays = (step.tokens, step.number, step.pages, step.picks, step.targets)
        return *[self._put(array) for array in arrays], np.int32(step.tiles)

    def _put(self, array: np.ndarray) -> Any:
        placed = self._sharding(array.shape)
        return array if placed is None else jax.make_array_from_callback(array.shape, placed, array.__getitem__)

    def _sharding(self, shape: Sequence[int]) -> Any:
        """By the first dimension over the shards; None on one device."""
        axes: sharding.Axes = ("batch", *[None] * (len(shape) - 1))
        return None if self._mesh is None else sharding.named(self._mesh, self._rules, axes, shape, "pages to score")

    def _active(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else sharding.activate(self._mesh, self._rules)


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _kept(requests: Sequence[Request], kept: Answers | None) -> dict[Request, Answer]:
    """The answers that process 0 has kept."""
    table = np.zeros((len(requests), 3), np.float64)
    if kept is not None:
        for row, request in zip(table, requests, strict=True):
            if (answer := kept.get(request)) is not None:
                row[:] = answer.log_likelihood, answer.greedy, answer.tokens
    if jax.process_count() > 1 and len(requests):
        from jax.experimental import multihost_utils

        # As bytes: without x64 a float64 would be rounded on the way.
        sent = multihost_utils.broadcast_one_to_all(table.view(np.uint8))
        table = np.asarray(sent, np.uint8).view(np.float64)
    return {
        request: Answer(float(total), bool(greedy), int(tokens))
        for request, (total, greedy, tokens) in zip(requests, table, strict=True)
        if tokens
    }


def _step(
    model: LanguageModel,
    params: Any,
    cache: Any,
    tokens: jax.Array,
    number: jax.Array,
    pages: jax.Array,
    picks: jax.Array,
    targets: jax.Array,
    tiles: jax.Array,
) -> tuple[Any, jax.Array]:
    """Reads pages and scores targets, arrays as in `schedule.Step`.

    Returns the cache and float32 [2, shards, tiles, tile] on every device: log-probabilities, and 1 for the most
    probable token; 0 behind the tiles that hold any.
    """
    size = tokens.shape[1]
    positions = number[:, None] * size + jnp.arange(size)
    hidden, cache = model.read_pages(params, tokens, positions, pages, cache)
    shape = (*picks.shape, hidden.shape[-1])
    axes = ("batch", None, *RESIDUAL[1:])

    def pick(hidden: jax.Array, picks: jax.Array) -> tuple[jax.Array]:
        return (hidden.reshape(-1, hidden.shape[-1])[picks],)

    (scored,) = sharding.local_many(pick, (RESIDUAL, ("batch", None, None)), ((axes, shape),), hidden, picks)

    def score(tile: jax.Array, out: jax.Array) -> jax.Array:
        mine, wanted = (jax.lax.dynamic_index_in_dim(x, tile, axis=1, keepdims=False) for x in (scored, targets))
        found = _log_probs(model.logits(params, mine), wanted)
        return jax.lax.dynamic_update_index_in_dim(out, found, tile, axis=2)

    whole = (2, *picks.shape)
    spec = sharding.out_spec((None, "batch", None, None), whole)
    out = jax.lax.fori_loop(0, tiles, score, jnp.zeros(whole, out_sharding=spec))
    return cache, sharding.constrain(out, (None, None, None, None))


def _log_probs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 [2, B, T]: log-probabilities, and whether the target is the first of the most probable tokens.

    logits: float32 [B, T, V], its vocabulary may be sharded.
    """
    losses, _, _ = token_losses(logits, targets)
    vocabulary = sharding.constrain(jnp.arange(logits.shape[-1]), ("vocab",))
    top = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == top, vocabulary, logits.shape[-1]), axis=-1)
    return jnp.stack([-losses, (first == targets).astype(jnp.float32)])
