"""Answers against plain forward passes, and the same bits however requests come."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from palmjax.data.batch import Batch
from palmjax.evaluation.run import Scorer
from palmjax.evaluation.schedule import Request
from tests.models.families import FAMILIES, VOCAB, parameters


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


@pytest.mark.parametrize("name", FAMILIES)
def test_log_likelihoods_are_those_of_whole_rows_in_every_family(name: str) -> None:
    config = FAMILIES[name]
    model, params = config.build(), parameters(config)
    requests = questions(3)
    answers = Scorer(model, params).score(requests)
    for answer, want, request in zip(answers, plain(model, params, requests), requests, strict=True):
        assert answer.log_likelihood == pytest.approx(want, rel=1e-6, abs=1e-4), request
        assert answer.tokens == len(request.continuation)
    assert len({answer.log_likelihood for answer in answers}) == len(set(requests))
