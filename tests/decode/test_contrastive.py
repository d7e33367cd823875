"""Contrastive search against the paper's equation 5, every candidate by a full forward pass of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import decode
from palmjax.config import ConfigError
from palmjax.data.batch import Batch
from palmjax.decode import ContrastiveSearch
from palmjax.models.embeddings import Embedding, LearnedPositions
from tests.decode.models import PROMPTS, built, greedy, texts
from tests.models.builders import tiny_palm

LENGTH = 64


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    """Hidden states and logits of whole rows."""
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = Batch(tokens=tokens, targets=tokens, weights=ones, segments=ones, positions=positions)
    hidden = model.hidden(params, batch)
    return hidden, model.logits(params, hidden)


def by_the_equation(model, params, prompt, count, alpha, top_k, stop=None, least=0):
    """Tokens and the margins between the best two candidates. float64 on the host; no cache."""

    row, margins = [0, *prompt], []
    for done in range(count):
        tokens = np.zeros((top_k, LENGTH), np.int32)
        tokens[:, : len(row)] = row
        _, logits = forward(model, params, tokens)
        logits = np.asarray(logits[0, len(row) - 1], np.float64)
        if stop is not None and done < least:
            logits[stop] = -np.inf
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        candidates = np.argsort(-p, kind="stable")[:top_k]
        tokens[:, len(row)] = candidates
        hidden = np.asarray(forward(model, params, tokens)[0], np.float64)
        hidden /= np.linalg.norm(hidden, axis=-1, keepdims=True)
        alike = np.array([(hidden[i, : len(row)] @ hidden[i, len(row)]).max() for i in range(top_k)])
        scores = (1 - alpha) * p[candidates] - alpha * alike
        margins.append(np.subtract(*np.sort(scores)[::-1][:2]))
        row.append(int(candidates[scores.argmax()]))
        if row[-1] == stop:
            break
    return row[1 + len(prompt) :], margins


@pytest.mark.parametrize(("alpha", "top_k"), [(0.6, 4), (1.0, 3)])
def test_tokens_are_those_of_the_equation(alpha, top_k):
    prompts = PROMPTS[:4]
    found = decode.generate(*built(), prompts, 24, sampling=ContrastiveSearch(alpha=alpha, top_k=top_k), stop=None)
    for prompt, one in zip(prompts, found, strict=True):
        want, margins = by_the_equation(*built(), prompt, 24, alpha, top_k)
        assert min(margins) > 1e-6, "two candidates are alike: another rounding may choose the other"
        assert one.tokens.tolist() == want
    assert texts(found) != [row[:24] for row in texts(greedy())[:4]], "the search changed nothing"


def test_the_stop_token_ends_a_row_but_not_too_early():
    part = ContrastiveSearch(alpha=0.5, top_k=4)
    (free,) = texts(decode.generate(*built(), PROMPTS[:1], 24, sampling=part, stop=None))
    for least in (0, free.index(free[7]) + 3):
        (one,) = decode.generate(*built(), PROMPTS[:1], 24, sampling=part, stop=free[7], min_new_tokens=least)
        want, _ = by_the_equation(*built(), PROMPTS[0], 24, 0.5, 4, stop=free[7], least=least)
        assert one.tokens.tolist() == want
        assert one.finished == (want[-1] == free[7])


@pytest.mark.parametrize("part", [ContrastiveSearch(alpha=0.0, top_k=5), ContrastiveSearch(alpha=0.9, top_k=1)])
def test_without_a_penalty_or_a_choice_it_is_greedy(part):
    found = decode.generate(*built(), PROMPTS[:4], 40, sampling=part, stop=None)
    for one, want in zip(found, greedy(), strict=False):
        assert one.tokens.tolist() == want.tokens[:40].tolist()
        np.testing.assert_allclose(one.log_probs, want.log_probs[:40], rtol=1e-4, atol=1e-5)


def test_the_last_token_needs_a_position_too():
    model = tiny_palm(embedding=Embedding(positions=LearnedPositions(length=32))).build()
    with pytest.raises(ConfigError, match="32 positions"):
        decode.generate(model, None, [[5] * 24], 8, sampling=ContrastiveSearch())


@pytest.mark.parametrize("values", [{"alpha": -0.1}, {"alpha": 1.5}, {"top_k": 0}])
def test_impossible_values_are_refused_by_name(values):
    (name, value), *_ = values.items()
    with pytest.raises(ConfigError, match=rf"ContrastiveSearch.{name} = {value}"):
        ContrastiveSearch(**values)
