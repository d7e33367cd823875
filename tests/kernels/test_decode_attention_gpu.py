"""Attention against a cache on Hopper, without a GPU: interpreted against float64 on ragged rows, with races looked for
and NaN in what nobody wrote; assembled for sm_90a, with no register in memory; and what is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels import aot_gpu
from pallas_kernels.attention import Mask
from pallas_kernels.decode_attention import Case, decode_attention, explain, gpu, gpu_kernel, gpu_table
from pallas_kernels.decode_attention.gpu_plan import Tuning, shares
from tests.kernels.cases import naive_decode, random_cache
from tests.kernels.interpreted_gpu import ENDS, detectors, one_compilation_a_kernel, rows_of

SMALL = Tuning(keys=64, stages=1, rounds=2, blocks=2)


pytestmark = ENDS


@pytest.fixture(scope="module", autouse=True)
def _one_compilation_a_kernel() -> Iterator[None]:
    with one_compilation_a_kernel():
        yield


def paged(k: Any, v: Any, page: int, rng: Any, filled: Any) -> tuple[Any, Any, Any]:
    """Caches [L, B, S, K, D] in pages that lie anywhere, and the table of them; it says nonsense of those behind the
    entries that are `filled` [B].
    """
    L, B, S, K, D = k.shape
    count = S // page
    table = rng.permutation(B * count).reshape(B, count).astype(np.int32)
    stores = [np.empty((L, B * count, K, page, D), k.dtype) for _ in range(2)]
    for whole, store in zip((k, v), stores, strict=True):
        store[:, table.reshape(-1)] = np.swapaxes(whole.reshape(L, B * count, page, K, D), 2, 3)
    for row, entries in enumerate(filled):
        table[row, -(-entries // page) :] = 10**6
    return stores[0], stores[1], table


@pytest.mark.parametrize(
    ("rows", "queries", "heads", "kv_heads", "entries", "width", "window", "page"),
    [
        (3, 1, 4, 1, 296, 64, None, None),  # the last tile begins early; more parts than blocks
        (3, 3, 8, 2, 200, 128, 70, None),  # grouped queries behind a window
        (2, 1, 16, 1, 192, 256, None, None),
        (2, 5, 16, 1, 128, 64, None, None),  # more query rows than a product has
        (3, 1, 6, 2, 256, 64, 100, 16),  # pages smaller than a tile
        (2, 1, 4, 2, 256, 64, None, 128),  # and larger
    ],
)
def test_the_kernel_sees_what_is_filled_and_nothing_else(
    monkeypatch, rows, queries, heads, kv_heads, entries, width, window, page
):
    rng = np.random.default_rng(0)
    q, k, v = random_cache(
        rng, queries=queries, length=entries, kv_heads=kv_heads, layers=2, rows=rows, heads=heads, width=width
    )
    positions = np.sort(rng.integers(0, entries, (rows, queries)), axis=1).astype(np.int32)
    positions[0] = np.arange(queries)  # the shortest row there is
    positions[1] = entries - 1 - np.arange(queries)[::-1]  # and a full one
    if rows > 2:
        positions[2, 0] = -1  # sees nothing
    want = naive_decode(q, k[1], v[1], positions, window)
    filled = positions.max(axis=1) + 1
    for row, last in enumerate(filled):
        k[:, row, last:], v[:, row, last:] = np.nan, np.nan
    pages = None
    if page is not None:
        k, v, pages = paged(k, v, page, rng, filled)
    found = detectors(monkeypatch)
    op = functools.partial(gpu.decode_attention, mask=Mask(window=window), scale=width**-0.5, tuning=SMALL)
    run = jax.jit(functools.partial(op, interpret=InterpretGPUParams(detect_races=True, uninitialized_memory="nan")))
    got = run(q, k, v, positions, 1, pages=pages)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert len(found) == 1 and not found[0].races_found
    # The bits are the same again, and depend on no other row.
    others = positions.copy()
    others[1] = np.arange(queries)
    np.testing.assert_array_equal(got[:1], run(q, k, v, others, 1, pages=pages)[:1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prefix_slopes_and_cap_through_the_public_call(dtype):
    """With the table's sizes."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(x, dtype) for x in random_cache(rng, queries=2, length=256, layers=2, width=64))
    positions: Any = np.array([[3, 4], [200, 201]], np.int32)
    keywords: dict[str, Any] = {
        "mask": Mask(window=150),
        "prefix": np.array([9, 0], np.int32),
        "alibi_slopes": (2.0 ** -np.arange(1, 5)).astype(np.float32),
        "soft_cap": 2.0,
    }
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want = decode_attention(wide[0], wide[1], wide[2], positions, 1, impl="reference", **keywords)
    got = decode_attention(q, k, v, positions, 1, impl="gpu", chip="NVIDIA H200", interpret=True, **keywords)
    assert got.dtype == dtype
    assert np.linalg.norm(np.asarray(got, np.float32) - want) < 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("heads", [16, 48])
@pytest.mark.parametrize(("rows", "entries"), [(1, 64), (1, 2000), (4, 8192), (33, 8192), (8, 32768), (512, 8192)])
def test_work_is_shared_out_over_the_chip(rows, entries, heads):
    work = shares(Tuning(keys=64, stages=1, rounds=4), (rows, 1, heads, 256), 1, entries, None, rows)
    tiles = -(-entries // 64)
    assert work.parts * work.part >= tiles > (work.parts - 1) * work.part
    assert (work.rows, work.row_blocks) == (heads, 1)
    assert work.blocks == min(132, work.items)
    if rows * tiles >= 2 * 132:
        # Nobody waits for the last block, and little is written beside what is read.
        assert -(-work.items // work.blocks) * work.part * work.blocks < 1.1 * rows * tiles
        assert work.parts * heads * 256 * 4 < 0.2 * entries * 256 * 2 * 2
    else:
        assert work.part == 2  # a tile for each computing warpgroup


CASE = Case(
    rows=8, queries=1, heads=16, kv_heads=1, entries=2048, head_dim=256, dtype="bfloat16", cache_dtype="bfloat16"
)


def test_what_was_never_timed_runs_when_it_is_named(monkeypatch):
    rows = gpu_table.rows()
    monkeypatch.setattr(gpu_table, "rows", rows_of(rows, "compiled"))
    for chip in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert "head_dim 256, compiled for sm_90a, not timed" in explain("gpu", CASE, chip)
        chosen = explain("auto", CASE, chip)
        assert chosen.startswith("decode_attention: xla ")
        assert "gpu, which could, is compiled for sm_90a, not timed" in chosen
    monkeypatch.setattr(gpu_table, "rows", rows_of(rows, "measured"))
    assert explain("auto", CASE, "NVIDIA H200").startswith("decode_attention: gpu ")
    assert explain("auto", dataclasses.replace(CASE, bias=True), "NVIDIA H200").startswith("decode_attention: xla ")


@pytest.mark.parametrize(
    ("change", "chip", "reason"),
    [
        ({"dtype": "float32"}, "NVIDIA H200", "q float32, cache bfloat16: it has bfloat16 and float16, both alike"),
        ({"head_dim": 320}, "NVIDIA H200", "head_dim 320: multiples of 64 up to 256"),
        ({"head_dim": 80}, "NVIDIA H200", "head_dim 80: multiples of 64 up to 256"),
        ({"bias": True}, "NVIDIA H200", "no dense bias"),
        ({"entries": 2001}, "NVIDIA H200", "2001 entries: multiples of 8 from 64 on"),
        ({"entries": 48, "page": 16}, "NVIDIA H200", "48 entries: multiples of 8 from 64 on"),
        ({"entries": 2400, "page": 24}, "NVIDIA H200", r"pages of 24 entries: multiples of 8 that divide \d+"),
        ({"queries": 256}, "NVIDIA H200", "256 queries of 16 heads: at most 256 rows"),
        ({}, "NVIDIA A100-SXM4-40GB", "the table has NVIDIA H100, NVIDIA H200"),
        ({}, None, "chip None: the table has NVIDIA H100, NVIDIA H200"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(change, chip, reason):
    with pytest.raises(ValueError, match=rf"gpu cannot do .*{reason}.*Could: xla, reference"):
        explain("gpu", dataclasses.replace(CASE, **change), chip)


PROGRAMS = {(row.head_dim, row.tuning): row for row in gpu_table.rows()}
"""One row of those that are the same program: the chips' instructions are the same."""

PAGED_FLOAT16 = {"everything": False, "dtype": "float16", "page": 16}
ASSEMBLED = [(row, {"everything": True}) for row in PROGRAMS.values()] + [(gpu_table.rows()[-1], PAGED_FLOAT16)]


@pytest.mark.slow
@pytest.mark.skipif(aot_gpu.compiler() is None, reason="no CUDA compiler: `make test` puts it into .venv/gpu-compiler")
@pytest.mark.parametrize(("row", "given"), ASSEMBLED, ids=lambda x: "-".join(x) if isinstance(x, dict) else x.head_dim)
def test_every_tuned_row_is_assembled_for_hopper_without_a_spill(row, given):
    target = "pallas_kernels.decode_attention.gpu_table:program"
    [(name, assembly)] = aot_gpu.assemblies(target, chip=row.chip, head_dim=row.head_dim, **given).items()
    assert name == gpu_kernel.NAME
    assert assembly.spill_stores == assembly.spill_loads == 0
    assert not assembly.serialized
    assert "LDL" not in assembly.instructions
    assert "STL" not in assembly.instructions
    # Both computing warpgroups' products: D/16 steps of the scores, keys/16 of the values.
    assert assembly.instructions["HGMMA"] == 2 * (row.head_dim + row.tuning.keys) // 16
