"""The Hopper kernels without a GPU: interpreted against float64 with every mask, with races looked for and NaN in what
nobody wrote; compiled for sm_90a, with no register in memory; and what is chosen.

Interpreted, they take float32 too, in which a wrong mask or sum shows far above the rounding.
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
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels import aot_gpu
from pallas_kernels.attention import Case, Mask, attention, explain, gpu, gpu_backward, gpu_forward, gpu_table
from pallas_kernels.attention.gpu_plan import Ring, Stream, Tuning, key_bounds, parts_of, row_bounds
from pallas_kernels.attention.masks import ranges
from pallas_kernels.attention.reference import EMPTY
from pallas_kernels.decode_attention import gpu_table as decode_table
from tests.kernels.cases import Example, check, gradients
from tests.kernels.interpreted_gpu import ENDS, detectors, one_compilation_a_kernel, rows_of

SMALL = Tuning(forward=Ring(keys=16, slots=3), dq=Ring(keys=16, slots=3), dkv=Stream(queries=32, stages=2))


pytestmark = ENDS


@pytest.fixture(scope="module", autouse=True)
def _one_compilation_a_kernel() -> Iterator[None]:
    with one_compilation_a_kernel():
        yield


def kernels(example: Example, tuning: Tuning = SMALL, interpret: Any = True) -> Any:
    """(q, k, v) -> (out, lse) of the kernels."""
    first, stop = ranges(example.mask, example.rows, example.length, example.segments, example.prefix)
    return functools.partial(
        gpu.attention,
        first=first,
        stop=stop,
        scale=example.width**-0.5,
        tuning=tuning,
        ranged=bool(np.any(np.asarray(first) > 0)),
        alibi_slopes=example.slopes,
        soft_cap=example.soft_cap,
        interpret=interpret,
    )


EXAMPLES = [
    # One key/value head, a length that no block divides, more tiles than slots, rows in two parts; a row of 128 keys.
    Example(length=53, heads=5, kv_heads=1, width=24, rows=1, alibi=True),
    # A window, whose far end is masked too; as many key/value heads as query heads; two rows.
    Example(length=70, heads=2, kv_heads=2, width=64, mask=Mask(window=20), soft_cap=2.0),
    # A prefix-LM, packed, with one-token segments and ids that come again; two query heads a key/value head.
    Example(length=75, heads=4, kv_heads=2, width=64, rows=1, cuts=(1, 2, 40), prefixes=(4, 20), alibi=True),
    Example(length=40, heads=6, kv_heads=1, width=130, rows=1, mask=Mask(causal=False), cuts=(20,)),
    Example(length=1, heads=1, kv_heads=1, width=8, rows=1),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_kernels_equal_float64_forward_and_backward(example):
    check(example, kernels(example))


def test_the_op_runs_the_table_s_block_sizes_in_bfloat16():
    """Through the public call, near float64."""
    example = Example(length=140, heads=2, kv_heads=1, width=64, rows=1, cuts=(70,))
    call = functools.partial(
        attention, **example.keywords(), with_lse=True, impl="gpu", chip="NVIDIA H200", interpret=True
    )
    check(example, call, jnp.bfloat16, 1e-2)


def test_warpgroups_race_for_nothing_and_read_nothing_unwritten(monkeypatch):
    """With NaN in scratch and outputs until they are written. Each kernel has a detector of its own."""
    found = detectors(monkeypatch)
    example = Example(length=53, heads=5, kv_heads=1, width=16, rows=1, cuts=(20,))
    params = InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    check(example, kernels(example, interpret=params))
    assert len(found) == 3
    assert not any(detector.races_found for detector in found)


def test_the_future_changes_nothing_and_two_runs_are_the_same_bits():
    example = Example(length=70, heads=4, kv_heads=1, width=16, rows=1)
    q, k, v, w, u = (np.asarray(x, np.float32) for x in example.arrays())
    run = jax.jit(functools.partial(gradients, kernels(example), dtype=np.float32))
    first = run([q, k, v, w, u])
    assert all(np.array_equal(a, b) for a, b in zip(first, run([q, k, v, w, u]), strict=True))
    k2, v2 = k.copy(), v.copy()
    k2[:, 41:], v2[:, 41:] = 7.0, -7.0
    w[:, 41:], u[:, 41:] = 0.0, 0.0
    before, after = run([q, k, v, w, u]), run([q, k2, v2, w, u])
    for a, b in zip(before[:3], after[:3], strict=True):
        assert np.array_equal(a[:, :41], b[:, :41])
    for gradient in after[3:]:
        assert np.all(np.asarray(gradient)[:, 41:] == 0.0)


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    example = Example(length=70, heads=2, kv_heads=1, width=16, rows=1)
    index = jnp.arange(70, dtype=np.int32)[None]
    first, stop = jnp.where(index % 3 == 1, index + 1, 0), index + 1
    call = functools.partial(gpu.attention, first=first, stop=stop, scale=1.0, tuning=SMALL, interpret=True)
    out, lse, dq, dk, dv = gradients(call, example.arrays(), np.float32)
    assert np.all(out[:, 1::3] == 0.0)
    assert np.all(lse[:, 1::3] == EMPTY)
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv))
    assert np.all(dq[:, 1::3] == 0.0)


@given(
    spans=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), min_size=12, max_size=12),
    causal=st.booleans(),
    parts=st.integers(1, 3),
)
def test_blocks_visit_all_that_is_seen_and_mask_all_that_is_not(spans, causal, parts):
    """12 rows in blocks of 4 against 24 keys in tiles of 8; by keys, tiles of 4 rows shared out in parts."""
    first, stop = (jnp.asarray([x], jnp.int32) for x in zip(*spans, strict=True))
    if causal:
        first, stop = jnp.zeros_like(first), jnp.sort(stop)
    keys = np.arange(24)
    seen = np.asarray((keys >= first[..., None]) & (keys < stop[..., None])).reshape(3, 4, 3, 8)
    some, whole = np.any(seen, (1, 3)), np.all(seen, (1, 3))

    def visited(bounds: Any, stride: int = 1, begin: int = 0) -> tuple[set[int], set[int]]:
        low, full, high, end = (int(x) for x in bounds)
        assert low <= full <= high <= end
        return {begin + stride * i for i in range(low, end)}, {begin + stride * i for i in range(full, high)}

    for block, bounds in enumerate(key_bounds(first, stop, 4, 8, 24)[0]):
        all_tiles, unmasked = visited(bounds)
        assert set(np.flatnonzero(some[block])) <= all_tiles <= set(range(3))
        assert unmasked <= set(np.flatnonzero(whole[block]))
    for block, shares in enumerate(row_bounds(first, stop, 4, 8, 24, parts)[0]):
        found = [visited(bounds, parts, part) for part, bounds in enumerate(shares)]
        all_tiles = set().union(*(tiles for tiles, _ in found))
        assert sum(len(tiles) for tiles, _ in found) == len(all_tiles)
        assert set(np.flatnonzero(some[:, block])) <= all_tiles <= set(range(3))
        assert set().union(*(unmasked for _, unmasked in found)) <= set(np.flatnonzero(whole[:, block]))


def test_rows_are_shared_out_until_the_chip_is_full():
    assert parts_of(blocks=32, tiles=512) * 32 >= 132 * 2
    assert parts_of(blocks=512, tiles=512) == 1
    assert parts_of(blocks=1, tiles=3) == 1


CASE = Case(rows=1, length=8192, heads=16, kv_heads=1, head_dim=256, dtype="bfloat16", mask=Mask())


@pytest.mark.parametrize("row", [*gpu_table.rows(), *decode_table.rows()], ids=lambda row: f"{row.chip}-{row.head_dim}")
def test_every_row_says_how_it_was_found(row):
    assert set(row.provenance) >= {"jax", "date", {"compiled": "ptxas", "measured": "device"}[row.source]}


def test_what_was_never_timed_runs_when_it_is_named(monkeypatch):
    monkeypatch.setattr(gpu_table, "rows", rows_of(gpu_table.rows(), "compiled"))
    for chip in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert "head_dim 256, compiled for sm_90a, not timed" in explain("gpu", CASE, chip)
        chosen = explain("auto", CASE, chip)
        assert chosen.startswith("attention: xla ")
        assert "gpu, which could, is compiled for sm_90a, not timed" in chosen


def test_what_was_measured_runs_by_itself(monkeypatch):
    monkeypatch.setattr(gpu_table, "rows", rows_of(gpu_table.rows(), "measured"))
    assert explain("auto", CASE, "NVIDIA H200").startswith("attention: gpu ")


@pytest.mark.parametrize(
    ("change", "chip", "reason"),
    [
        ({"dtype": "float32"}, "NVIDIA H200", "float32: it has bfloat16 and float16"),
        ({"head_dim": 320}, "NVIDIA H200", "head_dim 320: at most 256"),
        ({"bias": True}, "NVIDIA H200", "no dense bias"),
        ({}, "NVIDIA A100-SXM4-40GB", "the table has NVIDIA H100, NVIDIA H200"),
        ({}, None, "chip None: the table has NVIDIA H100, NVIDIA H200"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(change, chip, reason):
    with pytest.raises(ValueError, match=reason):
        explain("gpu", dataclasses.replace(CASE, **change), chip)


PROGRAMS = {(row.head_dim, row.tuning): row for row in gpu_table.rows()}
"""One row of those that are the same program: the chips' instructions are the same."""


@pytest.mark.slow
@pytest.mark.skipif(aot_gpu.compiler() is None, reason="no CUDA compiler: `make test` puts it into .venv/gpu-compiler")
@pytest.mark.parametrize(
    ("everything", "dtype"), [(False, "bfloat16"), (True, "float16")], ids=["causal", "everything-float16"]
)
@pytest.mark.parametrize("row", PROGRAMS.values(), ids=lambda row: f"{row.chip}-{row.head_dim}")
def test_every_tuned_row_is_assembled_for_hopper_without_a_spill(row, everything, dtype):
    given = dict(chip=row.chip, head_dim=row.head_dim, everything=everything, dtype=dtype)
    found = aot_gpu.assemblies("pallas_kernels.attention.gpu_table:program", **given)
    assert set(found) == {gpu_forward.NAME, gpu_backward.DQ, gpu_backward.DKV}
    for name, assembly in found.items():
        assert assembly.spill_stores == assembly.spill_loads == 0, name
        assert not assembly.serialized, name
        assert "LDL" not in assembly.instructions
        assert "STL" not in assembly.instructions
        assert assembly.instructions["HGMMA"] >= 2 * row.head_dim // 16, name
