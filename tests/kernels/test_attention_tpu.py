"""The TPU kernels without a TPU: interpreted against float64 with every mask, on two cores with a race detector and
NaN in what nobody wrote, and their order of work.
"""

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
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import Mask, attention, tpu
from pallas_kernels.attention.masks import ranges
from pallas_kernels.attention.reference import EMPTY
from pallas_kernels.attention.table import chips
from pallas_kernels.attention.tpu_backward import block_of
from pallas_kernels.attention.tpu_forward import zigzag
from pallas_kernels.attention.tpu_plan import Blocks
from tests.kernels.cases import Example, check, gradients

SMALL = tpu.Tuning(
    forward=Blocks(rows=256, keys=256, cores=2),
    backward=Blocks(rows=128, keys=256, cores=2),
    forward_keys=4096,
    backward_keys=4096,
)
PARTS = dataclasses.replace(SMALL, forward_keys=256, backward_keys=128)


def kernels(example: Example, tuning: tpu.Tuning = SMALL, interpret: Any = True) -> Any:
    """(q, k, v) -> (out, lse) of the kernels, with bounds from data only where data decides."""
    bounds = ranges(example.mask, example.rows, example.length, example.segments, example.prefix)
    fixed = None if example.cuts is not None or example.prefixes is not None else example.mask
    reach = example.mask if example.prefixes is None else dataclasses.replace(example.mask, causal=False)

    def call(q: Any, k: Any, v: Any) -> Any:
        return tpu.attention(
            q,
            k,
            v,
            *bounds,
            mask=fixed,
            reach=reach,
            scale=example.width**-0.5,
            tuning=tuning,
            alibi_slopes=example.slopes,
            soft_cap=example.soft_cap,
            interpret=interpret,
        )

    return call


EXAMPLES = [
    # No block divides 300; the plain causal row, whose bounds are arithmetic on the grid's indices.
    (Example(length=300, heads=4, kv_heads=1, width=64, rows=1), SMALL),
    # Heads that divide no lane tile, a window whose far end is masked too, several key/value heads.
    (Example(length=263, heads=6, kv_heads=2, width=64, rows=1, mask=Mask(window=70), alibi=True), SMALL),
    # One-token segments, segments at the end, ids that come again; a part of the keys at a time.
    (Example(length=420, heads=4, kv_heads=1, width=64, rows=1, cuts=(1, 2, 200, 419), soft_cap=2.0), PARTS),
    # Each part of the keys meets only queries that may see it: of a window, of all that is behind, of all.
    (Example(length=420, heads=4, kv_heads=1, width=64, rows=1, mask=Mask(window=70), alibi=True), PARTS),
    (Example(length=390, heads=2, kv_heads=1, width=64, rows=1, mask=Mask(window=150), prefixes=(200,)), PARTS),
    (Example(length=300, heads=2, kv_heads=1, width=64, rows=1, mask=Mask(causal=False)), PARTS),
    # A prefix-LM, packed, with distances of both signs.
    (Example(length=300, heads=2, kv_heads=2, width=64, cuts=(130,), prefixes=(40, 170), alibi=True), SMALL),
    # A block of two segments whose keys are more than a tile beyond the shorter one's end: a whole tile is masked.
    (Example(length=520, heads=48, kv_heads=1, width=64, rows=1, mask=Mask(causal=False), cuts=(130,)), SMALL),
    # ALiBi in blocks with padding queries, whose scores would grow without bound over the whole tiles before them.
    (Example(length=330, heads=2, kv_heads=1, width=64, rows=1, alibi=True), SMALL),
    # Blocks of more tokens than a chunk has keys: several chunks are cut by the diagonal.
    (Example(length=390, heads=1, kv_heads=1, width=64, rows=1), SMALL),
    (Example(length=130, heads=1, kv_heads=1, width=256, rows=1, mask=Mask(causal=False)), SMALL),
]


@pytest.mark.parametrize(("example", "tuning"), EXAMPLES, ids=str)
def test_kernels_equal_float64_forward_and_backward(example, tuning):
    check(example, kernels(example, tuning))


@settings(max_examples=5, deadline=None)
@given(
    example=st.builds(
        Example,
        length=st.integers(1, 400),
        rows=st.just(1),
        width=st.sampled_from([64, 128]),
        mask=st.builds(Mask, causal=st.just(True), window=st.sampled_from([None, 1, 50, 200])),
        cuts=st.none() | st.lists(st.integers(0, 400), max_size=4).map(tuple),
        prefixes=st.none() | st.lists(st.integers(0, 200), min_size=1, max_size=2).map(tuple),
        alibi=st.booleans(),
        soft_cap=st.sampled_from([None, 1.5]),
        heads=st.sampled_from([1, 3, 5, 16, 40]),
        kv_heads=st.just(1),
    ),
    tuning=st.sampled_from([SMALL, PARTS]),
)
def test_kernels_equal_float64_on_masks_combined(example, tuning):
    check(example, kernels(example, tuning))


def test_bfloat16_stays_near_float64():
    example = Example(length=300, heads=4, kv_heads=1, width=64, rows=1)
    check(example, kernels(example), jnp.bfloat16, 1e-2)


def test_two_cores_race_for_nothing_and_read_nothing_unwritten():
    """Interpreted on two cores, with NaN in scratch and outputs until they are written."""
    example = Example(length=300, heads=4, kv_heads=1, width=64, rows=1, cuts=(90,))
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
    check(example, kernels(example, interpret=params))
    races: Any = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found


def test_the_future_changes_nothing_and_two_runs_are_the_same_bits():
    example = Example(length=300, heads=4, kv_heads=1, width=64, rows=1)
    q, k, v, w, u = (np.asarray(x, np.float32) for x in example.arrays())
    run = jax.jit(functools.partial(gradients, kernels(example), dtype=np.float32))
    first = run([q, k, v, w, u])
    assert all(np.array_equal(a, b) for a, b in zip(first, run([q, k, v, w, u]), strict=True))
    k2, v2 = k.copy(), v.copy()
    k2[:, 170:], v2[:, 170:] = 7.0, -7.0
    w[:, 170:], u[:, 170:] = 0.0, 0.0
    before, after = run([q, k, v, w, u]), run([q, k2, v2, w, u])
    for a, b in zip(before[:3], after[:3], strict=True):
        assert np.array_equal(a[:, :170], b[:, :170])
    for gradient in after[3:]:
        assert np.all(np.asarray(gradient)[:, 170:] == 0.0)


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    example = Example(length=200, heads=4, kv_heads=1, width=64, rows=1)
    index = np.arange(200, dtype=np.int32)[None]
    first, stop = np.where(index % 3 == 1, index + 1, 0), index + 1

    def call(q: Any, k: Any, v: Any) -> Any:
        return tpu.attention(q, k, v, first, stop, mask=None, scale=1.0, tuning=SMALL, interpret=True)  # pyright: ignore[reportArgumentType]

    out, lse, dq, dk, dv = gradients(call, example.arrays(), np.float32)
    assert np.all(out[:, 1::3] == 0.0)
    assert np.all(lse[:, 1::3] == EMPTY)
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv))
    assert np.all(dq[:, 1::3] == 0.0)


@pytest.mark.parametrize("blocks", [2, 8, 32])
def test_both_cores_get_half_of_a_causal_masks_work(blocks):
    """Each block once, and the halves' sums of block numbers differ by no more than what one pair cannot share."""
    order = [int(zigzag(step, blocks)) for step in range(blocks)]
    halves = [[int(block_of(core, step, 2)) for step in range(blocks // 2)] for core in range(2)]
    assert sorted(order) == sorted(halves[0] + halves[1]) == list(range(blocks))
    assert abs(sum(order[: blocks // 2]) - sum(order[blocks // 2 :])) <= (blocks - 1 if blocks // 2 % 2 else 0)
    assert abs(sum(halves[0]) - sum(halves[1])) <= 1


def test_the_op_runs_the_table_s_block_sizes_for_its_chip():
    """Through the public call, for every chip: the same numbers as in plain XLA."""
    example = Example(length=140, heads=2, kv_heads=1, width=64, rows=1)
    q, k, v, *_ = (x.astype(np.float32) for x in example.arrays())
    want = attention(q, k, v, impl="einsum")
    for chip in chips():
        got = jax.jit(functools.partial(attention, chip=chip, interpret=True))(q, k, v)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
