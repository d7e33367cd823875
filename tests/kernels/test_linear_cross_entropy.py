"""Linear cross-entropy, by parts of the vocabulary and as a total by parts of the tokens, against float64 and all
logits, on one device and sharded; the TPU kernels interpreted.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # beside another test process that compiles

from pallas_kernels import aot
from pallas_kernels.linear_cross_entropy import (
    choice,
    explain_total,
    linear_cross_entropy,
    linear_cross_entropy_total,
    total,
    tpu,
)


def arrays(tokens: int, vocabulary: int, real: int, width: int = 8) -> Any:
    """hidden, table, targets, and weights of the loss and of the z-loss; some of them zero."""
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((tokens, width)), rng.standard_normal((vocabulary, width))
    weights = rng.random((2, tokens)) * (rng.random(tokens) < 0.7)
    return hidden, table, rng.integers(0, real, tokens).astype(np.int32), *weights


def results(op: Any, hidden: Any, table: Any, targets: Any, w: Any, z: Any) -> list[Any]:
    """loss, log Z, correct, and the gradients of sum(w loss + z log Z^2) with respect to hidden and table."""

    def total(hidden: Any, table: Any) -> Any:
        loss, log_z, correct = op(hidden, table, targets)
        return jnp.sum(w * loss + z * jnp.square(log_z)), (loss, log_z, correct)

    (_, found), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, table)
    return [np.asarray(x, np.float64) for x in (*found, *grads)]


def meaning(inputs: tuple[Any, ...], **keywords: Any) -> list[Any]:
    with jax.enable_x64(True):
        return results(functools.partial(linear_cross_entropy, impl="reference", **keywords), *inputs)


def close(got: list[Any], want: list[Any], tolerance: float = 2e-6) -> None:
    for mine, true in zip(got, want, strict=True):
        # Against 1 at least: a loss may be what two numbers of that size leave of each other.
        assert np.linalg.norm(mine - true) <= tolerance * max(np.linalg.norm(true), 1.0)


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    padding=st.integers(0, 5),
    part=st.sampled_from([1, 7, 16, 64]),
    soft_cap=st.sampled_from([None, 2.0]),
)
def test_parts_of_any_size_give_the_sums_and_gradients_of_all_logits(tokens, vocabulary, padding, part, soft_cap):
    inputs = arrays(tokens, vocabulary + padding, vocabulary)
    keywords: dict[str, Any] = {"scale": 0.7, "soft_cap": soft_cap, "rows": vocabulary}
    single = [x if x.dtype == np.int32 else x.astype(np.float32) for x in inputs]
    got = results(functools.partial(linear_cross_entropy, part=part, **keywords), *single)
    close(got, meaning(inputs, **keywords))
    assert np.all(got[4][vocabulary:] == 0.0), "padding has no gradient"


def test_ties_share_being_right():
    hidden, table = np.ones((1, 2), np.float32), np.zeros((6, 2), np.float32)
    _, log_z, correct = linear_cross_entropy(hidden, table, np.array([4], np.int32), rows=5, part=2)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(correct, [0.2])
    np.testing.assert_allclose(log_z, [np.log(5.0)], rtol=1e-6)


@pytest.mark.multidevice
def test_a_vocabulary_sharded_over_a_mesh_axis_gives_the_same():
    inputs = arrays(8, 48, 43)
    keywords: dict[str, Any] = {"scale": 0.7, "soft_cap": 3.0, "rows": 43}
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    tokens, vocabulary = PartitionSpec("data"), PartitionSpec("tensor")
    with jax.set_mesh(mesh):
        op = jax.shard_map(
            functools.partial(linear_cross_entropy, axis="tensor", part=5, **keywords),
            in_specs=(tokens, vocabulary, tokens),
            out_specs=(tokens,) * 3,
            check_vma=False,
        )
        specs = (tokens, vocabulary, tokens, tokens, tokens)
        placed = [
            jax.device_put(x if x.dtype == np.int32 else x.astype(np.float32), spec)
            for x, spec in zip(inputs, specs, strict=True)
        ]
        got = results(op, *placed)
    close(got, meaning(inputs, **keywords))


def test_compiled_memory_is_a_part_s_logits_and_not_all():
    """Temporaries, forward and backward, beside the table's own gradient: under a twentieth of the logits."""
    tokens, vocabulary, width = 512, 65536, 16
    operands = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((tokens, width), (vocabulary, width))]

    def temporaries(**keywords: Any) -> int:
        def total(hidden: Any, table: Any) -> Any:
            loss, log_z, _ = linear_cross_entropy(hidden, table, jnp.zeros(tokens, jnp.int32), **keywords)
            return jnp.sum(loss + jnp.square(log_z))

        memory: Any = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*operands).compile().memory_analysis()
        return memory.temp_size_in_bytes

    logits = 4 * tokens * vocabulary
    assert temporaries(impl="reference") > logits
    assert temporaries(part=1024) < logits / 20


def test_what_does_not_fit_is_refused():
    hidden, table, targets, *_ = arrays(3, 4, 4)
    with pytest.raises(ValueError, match=r"hidden \(3, 8\), table \(4, 7\)"):
        linear_cross_entropy(hidden, table[:, :7], targets)
    with pytest.raises(ValueError, match="unknown implementation 'tpu'; there is xla, reference"):
        linear_cross_entropy(hidden, table, targets, impl="tpu")
    with pytest.raises(ValueError, match="need one floating dtype"):
        linear_cross_entropy(hidden, table.astype(np.float16), targets)


SMALL = tpu.Tiles(tokens=128, rows=128, width=128, hidden_rows=256, hidden_width=128, table_rows=128, table_width=256)
"""Two steps of a product in `_scores`, two of its tiles in `_d_hidden`."""
ONE = tpu.Tiles(tokens=128, rows=128, width=256, hidden_rows=128, hidden_width=256, table_rows=256, table_width=128)


def static_of(tiles: tpu.Tiles | None, interpret: Any = True, **keywords: Any) -> total.Static:
    given: dict[str, Any] = dict(z_loss=0.01, scale=0.7, soft_cap=None, axis=None, tokens=128, part=64)
    return total.Static(**{**given, **keywords}, tiles=tiles, interpret=interpret)


def results_of_total(op: Any, inputs: Any) -> list[Any]:
    """loss, log Z, correct, and the gradients of 3 times the total with respect to hidden, table and weights."""
    hidden, table, targets, weights = inputs

    def scaled(hidden: Any, table: Any, weights: Any) -> Any:
        found, *rest = op(hidden, table, targets, weights)
        return 3.0 * jnp.sum(found), rest

    (_, found), grads = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1, 2), has_aux=True))(hidden, table, weights)
    return [np.asarray(x, np.float64) for x in (*found, *grads)]


def meaning_of_total(inputs: tuple[Any, ...], z_loss: float, **keywords: Any) -> list[Any]:
    def op(hidden: Any, table: Any, targets: Any, weights: Any) -> Any:
        loss, log_z, correct = linear_cross_entropy(hidden, table, targets, impl="reference", **keywords)
        return jnp.sum(weights * (loss + z_loss * jnp.square(log_z))), loss, log_z, correct

    with jax.enable_x64(True):
        return results_of_total(op, inputs)


def single(inputs: tuple[Any, ...]) -> Any:
    return [x if x.dtype == np.int32 else x.astype(np.float32) for x in inputs]


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    padding=st.integers(0, 5),
    part=st.sampled_from([1, 4, 16]),
    soft_cap=st.sampled_from([None, 2.0]),
)
def test_a_total_by_parts_of_the_tokens_has_the_gradients_of_all_logits(tokens, vocabulary, padding, part, soft_cap):
    inputs = arrays(tokens, vocabulary + padding, vocabulary)[:4]
    keywords: dict[str, Any] = {"scale": 0.7, "soft_cap": soft_cap, "rows": vocabulary, "z_loss": 0.3}
    op = functools.partial(linear_cross_entropy_total, tokens=part, **keywords)
    got = results_of_total(op, single(inputs))
    close(got, meaning_of_total(inputs, **keywords))
    assert np.all(got[4][vocabulary:] == 0.0), "padding has no gradient"
    # Without a gradient another program runs.
    alone = jax.jit(op)(*single(inputs))
    np.testing.assert_allclose(alone[1], got[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tiles", "soft_cap"), [(SMALL, 3.0), (ONE, None)])
def test_the_tpu_kernels_of_a_total_equal_float64_and_race_for_nothing(tiles, soft_cap):
    """Interpreted on two cores, NaN in what nobody wrote; tokens and rows that no tile divides."""
    inputs = arrays(200, 700, 690, width=256)[:4]
    inputs = (inputs[0] / 4, *inputs[1:])
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
    op = functools.partial(total.total, static_of(tiles, params, rows=690, soft_cap=soft_cap))
    got = results_of_total(op, single(inputs))
    close(got, meaning_of_total(inputs, scale=0.7, soft_cap=soft_cap, rows=690, z_loss=0.01))
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(("tiles", "kept"), [(SMALL, "bfloat16"), (SMALL, "float32"), (None, "float32")])
def test_a_total_in_bfloat16_stays_near_float64(tiles, kept):
    """kept: the table's dtype."""
    inputs = arrays(130, 300, 300, width=256)[:4]
    op = functools.partial(total.total, static_of(tiles, rows=300))
    rounded: Any = [x if x.dtype == np.int32 else jnp.asarray(x, "bfloat16") for x in inputs[:3]]
    exact = tuple(x if x.dtype == np.int32 else np.asarray(x, np.float64) for x in rounded)
    rounded[1] = rounded[1].astype(kept)
    got = results_of_total(op, (*rounded, inputs[3].astype(np.float32)))
    close(got, meaning_of_total((*exact, inputs[3]), scale=0.7, rows=300, z_loss=0.01), 1e-2)
    assert np.array_equal(got[4], got[4].astype("bfloat16")) == (kept == "bfloat16"), "a float32 sum is not rounded"


@pytest.mark.multidevice
@pytest.mark.parametrize("tiles", [None, ONE])
def test_a_total_of_a_sharded_vocabulary_is_the_same(tiles):
    inputs = arrays(8, 48, 43, width=256)[:4]
    inputs = (inputs[0] / 8, *inputs[1:])
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    tokens, vocabulary = PartitionSpec("data"), PartitionSpec("tensor")
    static = static_of(tiles, rows=43, soft_cap=3.0, axis="tensor", tokens=128 if tiles else 3)

    def local(*given: Any) -> Any:
        found, *rest = total.total(static, *given)
        return found[None], *rest

    with jax.set_mesh(mesh):
        specs = (tokens, vocabulary, tokens, tokens)
        op = jax.shard_map(local, in_specs=specs, out_specs=(tokens,) * 4, check_vma=False)
        got = results_of_total(op, [jax.device_put(x, spec) for x, spec in zip(single(inputs), specs, strict=True)])
    close(got, meaning_of_total(inputs, scale=0.7, soft_cap=3.0, rows=43, z_loss=0.01))


def test_what_a_total_reports_beside_itself_is_not_differentiated_in_silence():
    inputs = single(arrays(5, 12, 12)[:4])
    with pytest.raises(ValueError, match="only its total is differentiable"):
        jax.grad(lambda x: jnp.sum(linear_cross_entropy_total(x, *inputs[1:])[1]))(inputs[0])
    hidden, table, targets, weights = inputs
    got = jax.grad(lambda w: linear_cross_entropy_total(hidden, table, targets, w)[0])(weights)
    np.testing.assert_allclose(got, linear_cross_entropy_total(hidden, table, targets, weights)[1], rtol=1e-5)
    assert explain_total("auto", 4096, "bfloat16") == (
        "linear_cross_entropy_total: xla (on cpu) for width 4096 bfloat16"
    )
    assert "tpu (TPU v4; parts of 1024 tokens, bundles)" in explain_total("auto", 4096, "bfloat16", "TPU v4")
    assert "xla (on NVIDIA H200: there is no kernel for it)" in explain_total("auto", 4096, "bfloat16", "NVIDIA H200")
    assert "xla (not tpu: width 96: multiples of 128)" in explain_total("auto", 96, "bfloat16", "TPU v4")
    with pytest.raises(ValueError, match=r"tpu cannot do width 4096 float32 on TPU v4: chip .* Could: xla"):
        explain_total("tpu", 4096, "float32", "TPU v4")
    with pytest.raises(ValueError, match=r"weights \(3,\) for targets \(5,\)"):
        linear_cross_entropy_total(hidden, table, targets, weights[:3])
    narrow = hidden.astype("bfloat16")
    with pytest.raises(ValueError, match="table float16; need one floating dtype or a table in float32"):
        linear_cross_entropy_total(narrow, table.astype("float16"), targets, weights)
    with pytest.raises(ValueError, match=r"table float32; need one floating dtype$"):
        linear_cross_entropy(narrow, table, targets)
    with pytest.raises(ValueError, match="tokens must be a multiple of 128"):
        tpu.Tiles(tokens=100, rows=128, width=128, hidden_rows=128, hidden_width=128, table_rows=128, table_width=128)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=row.chip) for row in choice.rows()])
def test_a_total_compiles_for_its_chip_and_holds_a_part_s_weights(row):
    """The whole op and its gradient, of float32 parameters: beside the table in bfloat16, temporaries are under a
    twentieth of the logits. The sum of the table's gradient is made where it is returned.
    """
    tokens, vocabulary, width = 16384, 65536, 4096

    def gradient(hidden: Any, table: Any, targets: Any, weights: Any) -> Any:
        op = functools.partial(linear_cross_entropy_total, z_loss=1e-4, impl="tpu", chip=row.chip)
        return jax.grad(lambda h, t: op(h, t, targets, weights)[0], argnums=(0, 1))(hidden, table)

    operands = [jax.ShapeDtypeStruct((tokens, width), "bfloat16"), jax.ShapeDtypeStruct((vocabulary, width), "float32")]
    operands += [jax.ShapeDtypeStruct((tokens,), dtype) for dtype in ("int32", "float32")]
    memory = aot.compile_for(row.chip, gradient, operands).memory_analysis()
    beside = memory.temp_size_in_bytes - 2 * vocabulary * width
    assert beside < 4 * tokens * vocabulary / 20
