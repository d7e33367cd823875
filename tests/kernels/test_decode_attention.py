"""Attention against a cache: every implementation against a float64 loop, and work only for what is filled."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask
from pallas_kernels.decode_attention import decode_attention, explain, xla


def naive(q, k, v, positions, window):
    """Float64, one query and head at a time, over [B, S, K, D] caches."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        last = min(positions[b, t], k.shape[1] - 1)
        first = 0 if window is None else max(positions[b, t] - window + 1, 0)
        source = h * k.shape[2] // q.shape[2]
        if first <= last:
            scores = k[b, first : last + 1, source] @ q[b, t, h] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, first : last + 1, source]
    return out


def random_case(rng, *, queries, length, kv_heads=1, layers=3, rows=2, heads=4, width=8) -> tuple[Any, Any, Any]:
    q = rng.standard_normal((rows, queries, heads, width), np.float32)
    k, v = rng.standard_normal((2, layers, rows, length, kv_heads, width), np.float32)
    return q, k, v


@pytest.mark.parametrize(
    ("length", "queries", "block", "kv_heads", "window"),
    [
        (37, 1, 5, 1, None),  # the last block overlaps the one before
        (32, 3, 8, 2, None),
        (37, 3, 16, 4, 12),  # the first blocks are out of every window
        (32, 1, 8, 1, 1),
        (7, 2, 256, 2, 3),
        (1, 1, 1, 1, None),
    ],
)
def test_blocks_of_any_size_give_the_sum_over_what_is_seen(length, queries, block, kv_heads, window):
    rng = np.random.default_rng(0)
    op = jax.jit(functools.partial(xla.decode_attention, mask=Mask(window=window), scale=8**-0.5, block=block))
    for layer in (0, 2, 1):
        q, k, v = random_case(rng, queries=queries, length=length, kv_heads=kv_heads)
        # Rows stand at different places; a position beyond the cache is a padded query, which may see all of it.
        positions = rng.integers(0, length + 1, (2, queries)).astype(np.int32)
        want = naive(q, k[layer], v[layer], positions, window)
        np.testing.assert_allclose(op(q, k, v, positions, jnp.int32(layer)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_implementations_agree_on_long_caches(impl):
    rng = np.random.default_rng(0)
    q, k, v = random_case(rng, queries=2, length=600, kv_heads=2)
    positions: Any = np.array([[3, 4], [598, 599]], np.int32)
    got = jax.jit(lambda *args: decode_attention(*args, mask=Mask(), impl=impl))(q, k, v, positions, 1)
    np.testing.assert_allclose(got, naive(q, k[1], v[1], positions, None), rtol=1e-5, atol=1e-5)


def test_blocks_beyond_the_last_position_are_not_read():
    """What is not filled may be anything, even NaN, which a masked product would spread."""
    rng = np.random.default_rng(0)
    q, k, v = random_case(rng, queries=1, length=64)
    positions: Any = np.array([[5], [15]], np.int32)
    want = naive(q, k[0], v[0], positions, None)
    k[:, :, 16:], v[:, :, 16:] = np.nan, np.nan
    op = jax.jit(functools.partial(xla.decode_attention, mask=Mask(), scale=8**-0.5, block=16))
    got = op(q, k, v, positions, jnp.int32(0))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_wrong_shapes_and_names_are_refused():
    q, k, v = random_case(np.random.default_rng(0), queries=1, length=8, kv_heads=3)
    positions: Any = np.zeros((2, 1), np.int32)
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 8\).*\(3, 2, 8, 3, 8\)"):
        decode_attention(q, k, v, positions, mask=Mask())
    with pytest.raises(ValueError, match=r"flash.*reference"):
        explain("flash")
