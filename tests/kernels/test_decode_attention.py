"""Attention against a cache: every implementation against a float64 loop, and work only for what is filled."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside another test process that compiles

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.attention import Mask
from pallas_kernels.decode_attention import Case, decode_attention, explain, tpu, xla
from tests.kernels.cases import naive_decode, random_cache


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
        q, k, v = random_cache(rng, queries=queries, length=length, kv_heads=kv_heads)
        # Rows stand at different places; a position beyond the cache is a padded query, which may see all of it.
        positions = rng.integers(0, length + 1, (2, queries)).astype(np.int32)
        want = naive_decode(q, k[layer], v[layer], positions, window)
        np.testing.assert_allclose(op(q, k, v, positions, jnp.int32(layer)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_implementations_agree_on_long_caches(impl):
    rng = np.random.default_rng(0)
    q, k, v = random_cache(rng, queries=2, length=600, kv_heads=2)
    positions: Any = np.array([[3, 4], [598, 599]], np.int32)
    got = jax.jit(lambda *args: decode_attention(*args, mask=Mask(), impl=impl))(q, k, v, positions, 1)
    np.testing.assert_allclose(got, naive_decode(q, k[1], v[1], positions, None), rtol=1e-5, atol=1e-5)


def test_blocks_beyond_the_last_position_are_not_read():
    """What is not filled may be anything, even NaN, which a masked product would spread."""
    rng = np.random.default_rng(0)
    q, k, v = random_cache(rng, queries=1, length=64)
    positions: Any = np.array([[5], [15]], np.int32)
    want = naive_decode(q, k[0], v[0], positions, None)
    k[:, :, 16:], v[:, :, 16:] = np.nan, np.nan
    op = jax.jit(functools.partial(xla.decode_attention, mask=Mask(), scale=8**-0.5, block=16))
    got = op(q, k, v, positions, jnp.int32(0))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_wrong_shapes_and_names_are_refused():
    q, k, v = random_cache(np.random.default_rng(0), queries=1, length=8, kv_heads=3)
    positions: Any = np.zeros((2, 1), np.int32)
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 8\).*\(3, 2, 8, 3, 8\)"):
        decode_attention(q, k, v, positions, mask=Mask())
    with pytest.raises(ValueError, match=r"flash.*reference"):
        decode_attention(q[:, :, :3], k, v, positions, mask=Mask(), impl="flash")


@pytest.mark.parametrize(
    ("rows", "queries", "heads", "kv_heads", "entries", "width", "window", "size", "cores"),
    [
        (3, 1, 4, 1, 300, 64, None, 128, 1),  # the last block reaches beyond the cache
        (3, 1, 16, 1, 300, 64, 70, 128, 2),  # an odd number of rows: each is split over the cores
        (2, 3, 16, 8, 80, 128, None, 256, 2),  # grouped queries: all heads of a block, each with its own
        (1, 1, 48, 1, 520, 64, None, 128, 2),
    ],
)
def test_the_tpu_kernel_sees_what_is_filled_and_nothing_else(
    rows, queries, heads, kv_heads, entries, width, window, size, cores
):
    """Interpreted, on ragged rows; entries that nobody wrote are NaN, and so is scratch. No two cores race."""
    rng = np.random.default_rng(0)
    q, k, v = random_cache(
        rng, queries=queries, length=entries, kv_heads=kv_heads, layers=2, rows=rows, heads=heads, width=width
    )
    positions = np.sort(rng.integers(0, entries, (rows, queries)), axis=1).astype(np.int32)
    positions[0] = np.minimum(np.arange(queries), entries - 1)  # the shortest row there is
    want = naive_decode(q, k[1], v[1], positions, window)
    for row, last in enumerate(positions.max(axis=1)):
        k[:, row, last + 1 :], v[:, row, last + 1 :] = np.nan, np.nan
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
    op = functools.partial(tpu.decode_attention, mask=Mask(window=window), scale=width**-0.5, size=size, cores=cores)
    got = jax.jit(functools.partial(op, interpret=params))(q, k, v, positions, 1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found
    # A row's bits depend on no other row, nor on what the cache has room for.
    alone = jax.jit(functools.partial(op, interpret=True, cores=1))
    every = alone(q, k, v, positions, 1)
    for row in range(rows):
        mine = slice(row, row + 1)
        assert np.array_equal(every[mine], alone(q[mine], k[:, mine], v[:, mine], positions[mine], 1))


@pytest.mark.parametrize("paged", [False, True])
def test_the_tpu_kernel_with_prefix_slopes_and_cap_through_the_public_call(paged):
    """The table's blocks for a chip, against the whole row; pages lie anywhere."""
    rng = np.random.default_rng(0)
    heads, kv_heads = (4, 2) if paged else (4, 1)
    q, k, v = random_cache(rng, queries=2, length=256, kv_heads=kv_heads, layers=2, heads=heads, width=64)
    positions: Any = np.array([[3, 4], [200, 201]], np.int32)
    keywords: dict[str, Any] = {
        "mask": Mask(window=150),
        "prefix": np.array([9, 0], np.int32),
        "alibi_slopes": (2.0 ** -np.arange(1, heads + 1)).astype(np.float32),
        "soft_cap": 2.0,
    }
    want = decode_attention(q, k, v, positions, 1, impl="reference", **keywords)
    if paged:
        pages = rng.permutation(4).reshape(2, 2).astype(np.int32)
        store: Any = np.empty((2, 2, 4, kv_heads, 128, 64), np.float32)
        for whole, place in zip((k, v), store, strict=True):
            place[:, pages.reshape(-1)] = np.swapaxes(whole.reshape(2, 4, 128, kv_heads, 64), 2, 3)
        k, v = store[0], store[1]
        keywords["pages"] = pages
    got = decode_attention(q, k, v, positions, 1, impl="tpu", chip="TPU v4", interpret=True, **keywords)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros():
    q, k, v = random_cache(np.random.default_rng(0), queries=1, length=64, width=64)
    positions: Any = np.array([[-1], [5]], np.int32)
    for impl, chip in (("reference", None), ("xla", None), ("tpu", "TPU v5")):
        out = decode_attention(q, k, v, positions, mask=Mask(), impl=impl, chip=chip, interpret=True)
        assert np.all(np.asarray(out)[0] == 0.0) and np.all(np.isfinite(out)), impl


def test_what_runs_and_why():
    case = Case(
        rows=8, queries=1, heads=16, kv_heads=1, entries=2048, head_dim=256, dtype="bfloat16", cache_dtype="bfloat16"
    )
    assert "xla (on cpu)" in explain("auto", case)
    assert "tpu (TPU v4; blocks of" in explain("auto", case, "TPU v4")
    for change, reason in (
        ({"page": 16}, "pages of 16 entries: multiples of 128"),
        ({"bias": True}, "no dense bias"),
        ({"queries": 256}, "256 queries of 16 heads: at most 256 rows"),
        ({"kv_heads": 4}, "4 key/value heads of 256: one, or multiples of 8"),
        ({"dtype": "float32"}, "q float32, cache bfloat16"),
    ):
        odd = dataclasses.replace(case, **change)
        assert f"xla (not tpu: {reason}" in explain("auto", odd, "TPU v4")
        with pytest.raises(ValueError, match=rf"tpu cannot do q \[8,.*{reason}.*Could: xla, reference"):
            explain("tpu", odd, "TPU v4")
    with pytest.raises(ValueError, match=r"chip None: the table has .*TPU v4"):
        explain("tpu", case)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["TPU v4", "TPU v5", "TPU v6 lite"])
def test_the_cache_is_read_where_it_lies(chip):
    """Compiled for a chip inside a scan over layers that writes to both caches: they are not laid out anew. Keys or
    values, which are not donated here, may be copied once before the loop, so that it can write in place.
    """
    shape = (2, 8, 1024, 8, 128)

    def layers(q: Any, k: Any, v: Any, new: Any, positions: Any) -> Any:
        def layer(carry: Any, index: Any) -> Any:
            q, k, v = carry
            at = (index, jnp.arange(8)[:, None], positions)
            k, v = (x.at[at].set(new) for x in (k, v))
            return (decode_attention(q, k, v, positions, index, mask=Mask(), chip=chip, impl="tpu"), k, v), None

        return jax.lax.scan(layer, (q, k, v), jnp.arange(2))[0]

    structs = [((8, 1, 32, 128), "bfloat16"), *[(shape, "bfloat16")] * 2, ((8, 1, 8, 128), "bfloat16")]
    operands = [jax.ShapeDtypeStruct(*x) for x in (*structs, ((8, 1), "int32"))]
    memory = aot.compile_for(chip, layers, operands).memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 2 * int(np.prod(shape))
