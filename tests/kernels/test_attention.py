"""Attention in plain XLA, whole and by blocks, against float64: masks, segments, prefixes, head groups, gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import Case, Mask, attention, check_name, explain, xla
from pallas_kernels.attention.masks import ranges
from pallas_kernels.attention.reference import EMPTY, masked_softmax_attention
from pallas_kernels.decode_attention import decode_attention
from tests.kernels.cases import Example, check, gradients

examples = st.builds(
    Example,
    length=st.integers(1, 21),
    rows=st.integers(1, 2),
    mask=st.builds(Mask, causal=st.just(True), window=st.sampled_from([None, 1, 3, 30])),
    cuts=st.none() | st.lists(st.integers(0, 21), max_size=4).map(tuple),
    prefixes=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    alibi=st.booleans(),
    soft_cap=st.sampled_from([None, 1.5]),
    heads=st.just(4),
    kv_heads=st.sampled_from([1, 2, 4]),
)
bidirectional = st.builds(
    Example,
    length=st.integers(1, 21),
    mask=st.builds(Mask, causal=st.just(False), window=st.sampled_from([None, 4])),
    cuts=st.none() | st.lists(st.integers(0, 21), max_size=3).map(tuple),
    alibi=st.booleans(),
    heads=st.just(3),
    kv_heads=st.just(1),
)


@settings(max_examples=12, deadline=None)
@given(example=examples | bidirectional)
def test_the_whole_score_matrix_means_what_the_masks_say(example):
    check(example, functools.partial(attention, impl="einsum", with_lse=True, **example.keywords()))


@settings(max_examples=12, deadline=None)
@given(example=examples | bidirectional, queries=st.sampled_from([1, 4, 7, 32]), keys=st.sampled_from([3, 8, 32]))
def test_blocks_of_any_size_give_the_same(example, queries, keys):
    bounds = ranges(example.mask, example.rows, example.length, example.segments, example.prefix)

    def by_blocks(q: Any, k: Any, v: Any) -> Any:
        shared: dict[str, Any] = {"alibi_slopes": example.slopes, "soft_cap": example.soft_cap}
        sizes = {"queries": queries, "keys": keys}
        return xla.attention(q, k, v, *bounds, scale=example.width**-0.5, **shared, **sizes)

    check(example, by_blocks)


def test_blocks_never_hold_a_score_matrix():
    """Compiled memory, forward and backward, grows with the length and not with its square."""

    def temporaries(T: int, impl: str) -> int:
        q, k = jax.ShapeDtypeStruct((1, T, 2, 8), "float32"), jax.ShapeDtypeStruct((1, T, 1, 8), "float32")
        step = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, impl=impl)), argnums=(0, 1, 2))
        memory: Any = jax.jit(step).lower(q, k, k).compile().memory_analysis()
        return memory.temp_size_in_bytes

    short, long = temporaries(1024, "xla"), temporaries(4096, "xla")
    assert long < 5 * short
    assert long < 4096 * 4096
    assert temporaries(4096, "einsum") > 2 * 4 * 4096 * 4096


def test_bfloat16_stays_near_float64():
    example = Example(length=300, heads=4, kv_heads=1, width=16, cuts=(70, 200))
    for impl in ("einsum", "xla"):
        call = functools.partial(attention, impl=impl, with_lse=True, **example.keywords())
        check(example, call, jnp.bfloat16, 1e-2)


def test_a_bias_is_added_and_differentiated():
    example = Example(length=5, heads=4, kv_heads=2)
    q, k, v, w, _ = (x.astype(np.float32) for x in example.arrays())
    bias: Any = np.random.default_rng(1).standard_normal((1, 4, 5, 5)).astype(np.float32)

    def total(bias: Any) -> Any:
        return jnp.sum(w * attention(q, k, v, bias=bias))

    step = np.zeros_like(bias)
    step[0, 2, 4, 1] = 1e-2
    slope = (total(bias + step) - total(bias - step)) / 2e-2
    np.testing.assert_allclose(jax.grad(total)(bias)[0, 2, 4, 1], slope, rtol=1e-2, atol=1e-4)
    far: Any = np.where(np.arange(5)[None, :] == 2, 50.0, 0.0) * np.ones((1, 4, 5, 5), np.float32)
    np.testing.assert_allclose(attention(q, k, v, bias=far)[:, 4], np.repeat(v[:, 2], 2, axis=1), rtol=1e-5)


@pytest.mark.parametrize("impl", ["einsum", "xla"])
def test_packed_rows_equal_separate_ones_and_two_runs_are_the_same_bits(impl):
    example = Example(length=40, heads=4, kv_heads=1, rows=1, cuts=(1, 14), alibi=True)
    q, k, v, *_ = (x.astype(np.float32) for x in example.arrays())
    run = jax.jit(functools.partial(attention, impl=impl, **example.keywords()))
    packed = run(q, k, v)
    separate = jax.jit(functools.partial(attention, impl=impl, alibi_slopes=example.slopes))
    for part in example.runs:
        alone = separate(*(x[:, part.start : part.stop] for x in (q, k, v)))
        np.testing.assert_allclose(packed[:, part.start : part.stop], alone, rtol=2e-5, atol=2e-6)
    assert np.array_equal(packed, run(q, k, v))


def test_decoding_sees_the_cache_up_to_its_own_position():
    example = Example(length=7, heads=4, kv_heads=2)
    q, k, v, *_ = (x.astype(np.float32) for x in example.arrays())
    want = np.asarray(example.meaning(q, k, v)[0])
    positions: Any = np.array([[2, 3], [5, 6]], np.int32)
    picked = np.take_along_axis(q, positions[:, :, None, None], axis=1)
    got = jax.jit(functools.partial(decode_attention, mask=Mask()))(picked, k[None], v[None], positions)
    np.testing.assert_allclose(got, np.take_along_axis(want, positions[:, :, None, None], axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_decoding_with_prefix_slopes_cap_and_bias_equals_the_whole_row(impl):
    example = Example(length=9, heads=4, kv_heads=2, mask=Mask(window=6), prefixes=(3,), alibi=True, soft_cap=2.0)
    q, k, v, *_ = (x.astype(np.float32) for x in example.arrays())
    bias: Any = np.random.default_rng(1).standard_normal((1, 4, 9, 9)).astype(np.float32)
    want = attention(q, k, v, bias=bias, **example.keywords())
    got = decode_attention(
        q,
        k[None],
        v[None],
        np.tile(np.arange(9, dtype=np.int32), (2, 1)),  # pyright: ignore[reportArgumentType]
        mask=example.mask,
        prefix=np.array([3, 3], np.int32),  # pyright: ignore[reportArgumentType]
        alibi_slopes=example.slopes,
        soft_cap=2.0,
        bias=bias,  # pyright: ignore[reportArgumentType]
        impl=impl,
    )
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["einsum", "xla"])
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(name):
    example = Example(length=3, heads=2, kv_heads=1)
    first, stop = np.array([[0, 0, 0]] * 2, np.int32), np.array([[1, 0, 3]] * 2, np.int32)

    def call(q: Any, k: Any, v: Any) -> Any:
        if name == "xla":
            return xla.attention(q, k, v, first, stop, scale=1.0)  # pyright: ignore[reportArgumentType]
        index = jnp.arange(3)
        return masked_softmax_attention(q, k, v, (index >= first[..., None]) & (index < stop[..., None]), scale=1.0)

    out, lse, dq, dk, dv = gradients(call, example.arrays(), np.float32)
    assert np.all(out[:, 1] == 0.0)
    assert np.all(lse[:, 1] == EMPTY)
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv))
    assert np.all(dq[:, 1] == 0.0)


def test_what_cannot_work_is_refused_with_the_shapes():
    q, k, v, *_ = (x.astype(np.float32) for x in Example(length=3, heads=4, kv_heads=2).arrays())
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 8\), k \(2, 2, 2, 8\)"):
        attention(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, *(jnp.repeat(x, 2, axis=2)[:, :, :3] for x in (k, v)))
    with pytest.raises(ValueError, match="need one floating dtype"):
        attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(ValueError, match=r"segments \(2, 2\)"):
        attention(q, k, v, segments=np.zeros((2, 2), np.int32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"alibi_slopes \(2,\)"):
        attention(q, k, v, alibi_slopes=np.zeros(2, np.float32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"soft_cap = 0"):
        attention(q, k, v, soft_cap=0.0)
    with pytest.raises(ValueError, match=r"bias \(1, 3, 3, 3\)"):
        attention(q, k, v, bias=np.zeros((1, 3, 3, 3), np.float32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown implementation 'flash'"):
        check_name("flash")
    with pytest.raises(ValueError, match=r"window = 0"):
        Mask(window=0)


def test_a_named_implementation_works_or_says_every_reason():
    case = Case(rows=1, length=100, heads=4, kv_heads=1, head_dim=64, dtype="float32", mask=Mask(), alibi=True)
    with pytest.raises(
        ValueError, match=r"jax_flash cannot do q \[1,100,4,64\].*alibi.*no TPU.*100.*64.*Could: einsum"
    ):
        explain("jax_flash", case)
    with pytest.raises(ValueError, match=r"chip None: the table has .*TPU v4"):
        explain("tpu", case)
    assert "einsum (100 tokens on cpu: fewer than 256)" in explain("auto", case)
    assert "tpu (TPU v4; block sizes of the row for causal T=2048" in explain("auto", case, "TPU v4")
    odd = dataclasses.replace(case, heads=71)
    assert "xla (not tpu: 71 query heads a key/value head make blocks of 9088 rows" in explain("auto", odd, "TPU v4")
    assert "xla (not tpu: chip 'TPU v2'" in explain("auto", case, "TPU v2")
