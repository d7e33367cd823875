"""Choosing a token: what top-k and top-p keep, against a numpy reference, and the frequencies of what is drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax.config import ConfigError
from palmjax.sampling import Greedy, Temperature


def kept_probabilities(logits, temperature, top_k=None, top_p=None):
    """float64, from the papers: temperature, then the k most probable, then the smallest set of mass top_p."""
    logits = np.asarray(logits, np.float64) / temperature
    p = np.exp(logits - logits.max())
    order = np.argsort(-p, kind="stable")
    keep = np.zeros(len(p), bool)
    keep[order[:top_k]] = True
    p = np.where(keep, p, 0.0) / p[keep].sum()
    if top_p is not None:
        total, chosen = 0.0, []
        for token in order:
            chosen.append(token)
            total += p[token]
            if total >= top_p:
                break
        keep = np.isin(np.arange(len(p)), chosen)
        p = np.where(keep, p, 0.0) / p[keep].sum()
    return p


CASES = {
    "plain": Temperature(),
    "cold": Temperature(temperature=0.3),
    "top_k": Temperature(temperature=0.9, top_k=7),
    "top_p": Temperature(temperature=1.3, top_p=0.8),
    "both": Temperature(temperature=1.1, top_k=12, top_p=0.6),
    "one left": Temperature(top_p=1e-6),
    "more than there are": Temperature(top_k=1000, top_p=1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_kept_tokens_and_their_probabilities_are_those_of_the_reference(name):
    part = CASES[name]
    for seed in range(5):
        logits = 3.0 * np.random.default_rng(seed).standard_normal(64, np.float32)
        got = jax.nn.softmax(part.kept(jnp.asarray(logits)))
        want = kept_probabilities(logits, part.temperature, part.top_k, part.top_p)
        np.testing.assert_array_equal(np.asarray(got) > 0, want > 0)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_draws_have_the_frequencies_of_the_probabilities():
    logits = np.random.default_rng(0).standard_normal(16, np.float32)
    part = Temperature(temperature=0.8, top_k=9, top_p=0.95)
    draws = 20_000
    tokens = jax.jit(jax.vmap(lambda key: part.build()(jnp.asarray(logits), key)))(
        jax.random.split(jax.random.key(0), draws)
    )
    p = kept_probabilities(logits, 0.8, 9, 0.95)
    counts = np.bincount(tokens, minlength=16)
    assert counts[p == 0].sum() == 0
    deviation = np.abs(counts - draws * p)[p > 0] / np.sqrt(draws * p * (1 - p))[p > 0]
    assert deviation.max() < 4.5, deviation


def test_tokens_as_probable_as_the_last_one_kept_stay():
    logits = jnp.array([2.0, 1.0, 1.0, 0.0])
    np.testing.assert_array_equal(np.isfinite(Temperature(top_k=2).kept(logits)), [True, True, True, False])


def test_greedy_takes_the_first_of_equals():
    assert Greedy().build()(jnp.array([0.0, 3.0, 3.0]), jax.random.key(0)) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 0.0}, ["temperature = 0.0", "Greedy"]),
        ({"temperature": -1.0}, ["temperature = -1.0"]),
        ({"temperature": float("inf")}, ["temperature = inf"]),
        ({"top_k": 0}, ["top_k = 0"]),
        ({"top_p": 0.0}, ["top_p = 0.0"]),
        ({"top_p": 1.5}, ["top_p = 1.5"]),
    ],
)
def test_impossible_values_are_refused_by_name(values, words):
    with pytest.raises(ConfigError) as error:
        Temperature(**values)
    assert all(word in str(error.value) for word in words)
