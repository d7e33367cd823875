"""Linear cross-entropy by parts of the vocabulary against float64 and all logits, on one device and sharded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.linear_cross_entropy import linear_cross_entropy


def arrays(tokens: int, vocabulary: int, real: int, width: int = 8) -> tuple[Any, ...]:
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
