"""Answers against plain forward passes, and the same bits however requests come."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from palmjax import decode, mesh, sharding
from palmjax.config import ConfigError, MeshConfig, ShardingRules
from palmjax.data.batch import Batch
from palmjax.evaluation.run import Scorer, ScorerConfig
from palmjax.evaluation.schedule import Request
from palmjax.evaluation.store import Store
from tests.models.families import BERT, FAMILIES, VOCAB, parameters


def questions(count: int, seed: int = 0, longest: int = 70) -> list[Request]:
    """Three choices each behind one context, of which every third begins like the one before it."""
    rng = np.random.default_rng(seed)
    ids = lambda n: tuple(rng.integers(0, VOCAB, n).tolist())  # noqa: E731
    found, shots = [], ids(40)
    for number in range(count):
        context = (shots if number % 3 else ()) + ids(rng.integers(1, longest - 40))
        found += [Request(context, ids(rng.integers(1, 9))) for _ in range(3)]
    return found


def plain(model: Any, params: Any, requests: list[Request]) -> list[float]:
    """Log-likelihoods by whole rows without a cache, one request a row; the softmax in float64."""
    rows, length = len(requests), max(request.read for request in requests)
    tokens = np.zeros((rows, length), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: request.read] = (*request.context, *request.continuation)[:-1]
    real = np.arange(length) < np.asarray([request.read for request in requests])[:, None]
    positions = (np.arange(length) * real).astype(np.int32)
    batch = Batch(tokens=tokens, targets=tokens, weights=real, segments=real.astype(np.int32), positions=positions)
    logits = np.asarray(jax.jit(lambda p, b: model.logits(p, model.hidden(p, b)))(params, batch), np.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for row, request in zip(logits, requests, strict=True):
        places = np.arange(len(request.context) - 1, request.read)
        found.append(float(row[places, request.continuation].sum()))
    return found


@pytest.mark.parametrize(
    "name", ["gpt3", "gopher", "glam", "bloom", "falcon_40b", "gpt_j", "mistral", "t5", "capped", "gated_experts"]
)
def test_log_likelihoods_are_those_of_whole_rows_in_every_family(name: str) -> None:
    config = FAMILIES[name]
    model, params = config.build(), parameters(config)
    requests = questions(3)
    scorer = Scorer(model, params, config=ScorerConfig(rows=4))
    answers = scorer.score(requests)
    for answer, want, request in zip(answers, plain(model, params, requests), requests, strict=True):
        assert answer.log_likelihood == pytest.approx(want, rel=1e-6, abs=1e-4), request
        assert answer.tokens == len(request.continuation)
    assert len({answer.log_likelihood for answer in answers}) == len(set(requests))
    alone = [scorer.score([request])[0] for request in requests[::-1]]
    assert alone[::-1] == answers, "other bits, alone"
    assert len(scorer.compiled) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_at_any_batch_size_in_any_order_with_any_neighbours_at_any_length(dtype: Any) -> None:
    """And packed or alone, with shared prefixes or without: alone, nothing is shared."""
    config = dataclasses.replace(FAMILIES["llama"], dtype=dtype)
    model, params = config.build(), parameters(config)
    requests, rng = questions(11), np.random.default_rng(1)
    scorer = Scorer(model, params)
    want = dict(zip(requests, scorer.score(requests), strict=True))
    for size in (1, 3, 8, 32):
        mixed = [requests[place] for place in rng.permutation(len(requests))]
        for start in range(0, len(mixed), size):
            some = mixed[start : start + size]
            assert scorer.score(some) == [want[request] for request in some], size
    assert len(scorer.compiled) == 1
    # A neighbour of 300 tokens: the program for rows of up to 512.
    long = Request(tuple(rng.integers(0, VOCAB, 300).tolist()), (1, 2))
    assert scorer.score([long, *requests])[1:] == list(want.values())
    assert len(scorer.compiled) == 2
    fractions = {answer.log_likelihood % 2**-8 for answer in want.values()}
    assert len(fractions) > len(requests) / 2, "log-probabilities are not float32"


def on_mesh(config: Any, layout: tuple[int, ...], **changes: Any) -> tuple[Scorer, Any]:
    """A scorer on the first devices, and the parameters, the same values on every mesh."""
    model = config.build()
    placed = mesh.build(MeshConfig(**dict(zip(mesh.AXES, layout, strict=True))), jax.devices()[: math.prod(layout)])
    abstract = sharding.abstract_state(lambda: model.init(jax.random.key(0)), placed, ShardingRules())
    params = jax.device_put(parameters(config), jax.tree.map(lambda leaf: leaf.sharding, abstract))
    return Scorer(model, params, placed, ShardingRules(), **changes), params


@pytest.mark.multidevice
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_under_any_data_parallelism_and_nearly_under_tensor_parallelism(dtype: Any) -> None:
    config = dataclasses.replace(FAMILIES["llama"], dtype=dtype)
    requests = questions(20)
    one, params = on_mesh(config, (1, 1, 1))
    want = one.score(requests)
    assert Scorer(config.build(), parameters(config)).score(requests) == want, "a mesh of one is no mesh"
    identities = {one.identity(params)}
    for layout in ((8, 1, 1), (2, 2, 1)):
        scorer, params = on_mesh(config, layout)
        assert scorer.score(requests) == want, layout
        identities.add(scorer.identity(params))
    assert len(identities) == 1
    scorer, params = on_mesh(config, (2, 1, 2))
    near = 1e-5 if dtype == "float32" else 0.1  # a sum split in two is rounded to bfloat16 twice
    for answer, wanted in zip(scorer.score(requests), want, strict=True):
        assert answer.log_likelihood == pytest.approx(wanted.log_likelihood, rel=near, abs=near)
    assert scorer.identity(params) not in identities


def test_the_greedy_continuation_is_greedy_and_no_other_is() -> None:
    config = FAMILIES["llama"]
    model, params = config.build(), parameters(config)
    prompts = [(1, 2, 3), (4, 5), (6,) * 20]
    found = decode.generate(model, params, prompts, 6, bos=None, stop=None)
    greedy = [Request(prompt, tuple(one.tokens.tolist())) for prompt, one in zip(prompts, found, strict=True)]
    other = [Request(r.context, (*r.continuation[:-1], (r.continuation[-1] + 1) % VOCAB)) for r in greedy]
    answers = Scorer(model, params).score([*greedy, *other, greedy[0]])
    assert [answer.greedy for answer in answers] == [True] * 3 + [False] * 3 + [True]
    for answer, one in zip(answers, found, strict=False):
        assert answer.log_likelihood == pytest.approx(float(np.sum(one.log_probs, dtype=np.float64)), abs=1e-4)


def test_what_is_kept_is_not_computed_again(tmp_path: Path) -> None:
    config = FAMILIES["falcon_7b"]
    model, params = config.build(), parameters(config)
    scorer, requests = Scorer(model, params), questions(4)
    told = list[tuple[int, int]]()
    with Store(tmp_path / "answers.jsonl", scorer.identity(params)) as store:
        want = scorer.score(requests, lambda *now: told.append(now), kept=store)
        assert told[0] == (0, 12) and told[-1] == (12, 12) and len(store) == 12
        told.clear()
        assert scorer.score(requests[::-1], lambda *now: told.append(now), kept=store) == want[::-1]
        assert told == [(12, 12)]
    changed = jax.tree.map(lambda leaf: leaf, params)
    table = changed["token_embedder"]["embedding"]
    changed["token_embedder"]["embedding"] = table.at[3, 5].add(1e-6)
    assert scorer.identity(changed) != scorer.identity(params)
    other = scorer.with_params(changed)
    with Store(tmp_path / "answers.jsonl", scorer.identity(changed)) as store:
        assert other.score(requests, kept=store) != want and len(store) == 24


def test_what_can_not_be_scored_is_refused() -> None:
    config = FAMILIES["gpt2"]
    scorer = Scorer(config.build(), parameters(config), max_length=50)
    assert scorer.score([]) == []
    with pytest.raises(ConfigError, match="request 1 has 50 tokens of context and 2 of continuation"):
        scorer.score([Request((1,) * 49, (2, 3)), Request((1,) * 50, (2, 3))])
    assert Scorer(config.build(), parameters(config), max_length=1000).max_length == 128, "the model has no more"
    with pytest.raises(ConfigError, match="an encoder has no log-likelihood"):
        Scorer(BERT.build(), parameters(BERT))
    with pytest.raises(ConfigError, match="page = 48: must be a divisor of 256"):
        ScorerConfig(page=48)
