"""The attention ops against a float64 loop over queries: masks, segments, head groups, and rows that see nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import Mask, attention, check_name
from pallas_kernels.attention.reference import masked_softmax_attention
from pallas_kernels.decode_attention import decode_attention


def naive(q, k, v, seen):
    """Float64, one query at a time; seen: bool [B, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    B, T, H, N = q.shape
    for b, t, h in np.ndindex(B, T, H):
        keys = np.flatnonzero(seen[b, t])
        if keys.size:
            source = h * k.shape[2] // H
            scores = k[b, keys, source] @ q[b, t, h] / np.sqrt(N)
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, keys, source]
    return out


def random_qkv(T, S, H, K, seed=0, B=2, N=8) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, N), (B, S, K, N), (B, S, K, N))
    return [rng.standard_normal(s, np.float32) for s in shapes]


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 9),
    groups=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    cuts=st.lists(st.integers(0, 9), max_size=2),
)
def test_attention_equals_the_naive_loop(T, groups, causal, window, cuts):
    H, K = groups
    q, k, v = random_qkv(T, T, H, K)
    segments: Any = np.tile(np.searchsorted(sorted(cuts), np.arange(T), side="right").astype(np.int32), (2, 1))
    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    seen = np.ones((T, T), bool) & (~np.array(causal) | (j <= i)) & (i - j < (window or T + 1))
    seen = seen[None] & (segments[:, :, None] == segments[:, None, :])
    got = attention(q, k, v, mask=Mask(causal=causal, window=window), segments=segments)
    np.testing.assert_allclose(got, naive(q, k, v, seen), rtol=1e-5, atol=1e-5)


def test_decoding_sees_the_cache_up_to_its_own_position():
    q, k, v = random_qkv(2, 7, 4, 2)
    positions: Any = np.array([[2, 3], [5, 6]], np.int32)
    seen = np.arange(7)[None, None, :] <= positions[:, :, None]
    np.testing.assert_allclose(
        decode_attention(q, k[None], v[None], positions, mask=Mask()), naive(q, k, v, seen), rtol=1e-5, atol=1e-5
    )


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    q, k, v = random_qkv(3, 3, 2, 1)
    seen = jnp.array([[True, False, False], [False, False, False], [True, True, True]])[None]

    def total(q, k, v):
        return jnp.sum(masked_softmax_attention(q, k, v, seen, scale=1.0)[0])

    out, _ = masked_softmax_attention(q, k, v, seen, scale=1.0)
    assert np.all(out[:, 1] == 0.0)
    gradients = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert np.all(gradients[0][:, 1] == 0.0)


def test_what_cannot_work_is_refused_with_the_shapes():
    q, k, v = random_qkv(3, 4, 2, 1)
    with pytest.raises(ValueError, match=r"\(2, 3, 2, 8\)"):
        attention(q, k, v, mask=Mask())
    q, k, v = random_qkv(3, 3, 4, 3)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, k, v, mask=Mask())
    with pytest.raises(ValueError, match="unknown implementation 'flash'"):
        check_name("flash")
    with pytest.raises(ValueError, match=r"window = 0"):
        Mask(window=0)
