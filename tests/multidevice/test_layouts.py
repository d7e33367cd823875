"""Every layout computes the single device's numbers: loss, gradients and updated parameters on 8 virtual devices."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import mesh, sharding
from palmjax.config import MeshConfig, ShardingRules
from palmjax.loss import CrossEntropy
from palmjax.models.decoder import (
    KeepProjections,
    ParallelBlock,
    RecomputeAll,
    RecomputeAttention,
    RecomputeElementwise,
    SerialBlock,
)
from palmjax.models.layers import RMSNorm
from palmjax.optim import Adafactor
from palmjax.state import init_state
from palmjax.step import accumulate, build_step
from tests.models.builders import random_batch, tiny_palm

pytestmark = pytest.mark.multidevice

LAYOUTS = {
    "1x8": (MeshConfig(data=1, fsdp=8), ()),
    "8x1": (MeshConfig(data=8, fsdp=1), ()),
    "2x4": (MeshConfig(data=2, fsdp=4), ()),
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), ()),
    "2x2x2 residual over tensor": (MeshConfig(data=2, fsdp=2, tensor=2), ("tensor",)),
    "1x2x4 residual over tensor": (MeshConfig(data=1, fsdp=2, tensor=4), ("tensor",)),
    "1x1x8": (MeshConfig(data=1, fsdp=1, tensor=8), ("tensor",)),
}
MODEL = tiny_palm(heads=8, vocab_size=90, vocab_multiple=8)


def run(
    config: MeshConfig,
    residual: tuple[str, ...],
    devices: int,
    microbatches: int = 1,
    steps: int = 2,
    **cut: int,
):
    """Loss and gradients of the first step and the state after `steps`, as numpy."""
    model, loss, optimizer = MODEL.build(), CrossEntropy(**cut).build(MODEL.build()), Adafactor()
    transformation = optimizer.build(model.axes)
    rules = ShardingRules(residual=residual)
    placed = mesh.build(config, jax.devices()[:devices])
    with sharding.activate(placed, rules):
        state = jax.jit(lambda: init_state(model.init(jax.random.key(0)), transformation, jax.random.key(1)))()
        put = functools.partial(_put, placed, rules)
        batches = [jax.tree.map(put, random_batch(vocab_size=90, seed=i)) for i in range(steps)]
        gradients, sums = jax.jit(lambda p, b: accumulate(loss, p, b, None, microbatches))(state.params, batches[0])
        step = jax.jit(build_step(loss, transformation, optimizer.learning_rate, microbatches=microbatches))
        for batch in batches:
            state, _ = step(state, batch)
    assert_sharded(state.params, gradients)
    return jax.tree.map(np.asarray, {"loss": sums["loss"], "gradients": gradients, "params": state.params})


def _put(placed, rules, x):
    return jax.device_put(x, sharding.named(placed, rules, ("batch", "length"), x.shape))


def assert_sharded(params, gradients):
    """A gradient carries its parameter's layout in its type."""
    jax.tree.map(
        lambda p, g: np.testing.assert_equal(jax.typeof(g).sharding.spec, jax.typeof(p).sharding.spec),
        params,
        gradients,
    )


@functools.cache
def single():
    return run(MeshConfig(), (), devices=1)


def assert_equal_to_single(got):
    want = single()
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    for name in ("gradients", "params"):
        for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x[name]) for x in (want, got)), strict=True):
            error = np.linalg.norm(a - b) / np.linalg.norm(a)
            assert error < 1e-5, f"{name}{jax.tree_util.keystr(path)}: relative error {error:.1e}"


@pytest.mark.parametrize("cut", ["part", "tokens"])
@pytest.mark.parametrize("layout", ["1x8", "1x2x4 residual over tensor"])
def test_the_loss_by_parts_of_a_sharded_vocabulary_is_that_of_all_logits(layout, cut):
    """Tables whose rows, and whose columns, are spread; parts that divide neither the vocabulary nor its shards."""
    assert_equal_to_single(run(*LAYOUTS[layout], devices=8, **{cut: 7}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_device(layout):
    assert_equal_to_single(run(*LAYOUTS[layout], devices=8))


@pytest.mark.parametrize("layout", ["2x4", "2x2x2"])
def test_microbatches_equal_the_whole_batch(layout):
    config, residual = LAYOUTS[layout]
    smaller = MeshConfig(data=config.data, fsdp=config.fsdp // 2, tensor=config.tensor)
    devices = math.prod((smaller.data, smaller.fsdp, smaller.tensor))
    assert_equal_to_single(run(smaller, residual, devices=devices, microbatches=2))


BLOCK = MODEL.block
assert isinstance(BLOCK, ParallelBlock)
SERIAL = dataclasses.replace(MODEL, block=SerialBlock(attention=BLOCK.attention, mlp=BLOCK.mlp, norm=RMSNorm()))
POLICIES = (None, RecomputeAttention(), RecomputeElementwise(), KeepProjections(), RecomputeAll())


@functools.cache
def gradients_of(model, remat, placed_on):
    """Loss and gradients with a policy, on a mesh of four devices or on one."""
    built = dataclasses.replace(model, remat=remat).build()
    loss, rules = CrossEntropy().build(built), ShardingRules(residual=("tensor",) if placed_on else ())
    config = MeshConfig(data=1, fsdp=2, tensor=2) if placed_on else MeshConfig(data=1)
    placed = mesh.build(config, jax.devices()[: 4 if placed_on else 1])
    with sharding.activate(placed, rules):
        params = jax.jit(lambda: built.init(jax.random.key(0)))()
        batch = jax.tree.map(functools.partial(_put, placed, rules), random_batch(vocab_size=90))
        total, gradients = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None)[0]))(params)
    return np.asarray(total), jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize("model", [MODEL, SERIAL], ids=["parallel", "serial"])
@pytest.mark.parametrize("remat", POLICIES, ids=lambda r: type(r).__name__)
def test_every_remat_policy_keeps_sums_and_no_parts_of_them(model, remat):
    """Partial sums over the tensor axis can't be stacked over layers: a policy must keep the sum or neither."""
    (want, want_gradients), (got, gradients) = (gradients_of(model, None, False), gradients_of(model, remat, True))
    assert got == pytest.approx(want, rel=1e-5)
    for a, b in zip(jax.tree.leaves(want_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)


def test_initial_values_do_not_depend_on_the_mesh():
    model = MODEL.build()
    plain = jax.jit(lambda: model.init(jax.random.key(5)))()
    with sharding.activate(mesh.build(MeshConfig(data=2, fsdp=2, tensor=2)), ShardingRules()):
        placed = jax.jit(lambda: model.init(jax.random.key(5)))()
    # The same random bits; the last multiplication is fused differently for a shard, which moves one unit in the last
    # place.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.5e-7), plain, jax.tree.map(np.asarray, placed))
    assert not placed["decoder"]["layers"]["mlp"]["wi_0"]["kernel"].sharding.is_fully_replicated


@pytest.mark.parametrize("remat", [None, RecomputeAttention(), RecomputeAll()], ids=["none", "attention", "all"])
def test_no_device_ever_holds_the_gathered_weights_of_all_layers(remat):
    model = tiny_palm(num_layers=6, d_model=64, remat=remat).build()
    loss, rules = CrossEntropy().build(model), ShardingRules()
    placed = mesh.build(MeshConfig(data=1, fsdp=8))
    with sharding.activate(placed, rules):
        params = jax.jit(lambda: model.init(jax.random.key(0)))()
        batch = jax.tree.map(functools.partial(_put, placed, rules), random_batch())
        text = str(jax.jit(jax.grad(loss, has_aux=True)).lower(params, batch).compile().as_text())
    assert "f32[6,8,128]" in text, "the sharded stack of wi_0, so that the next line can fail"
    for whole in ("f32[6,64,128]", "f32[6,128,64]", "f32[6,64,4,16]", "f32[6,4,16,64]"):
        assert whole not in text, f"{whole} is a whole stack of weights on one device"


def test_bfloat16_gradients_of_the_embedding_add_up_in_float32():
    """One token 2,048 times: each occurrence is one part in 2,048 of its gradient, which bfloat16 sums would lose."""
    table = jax.random.normal(jax.random.key(0), (8, 16))
    ids = np.full((8, 256), 3, np.int32)
    cotangent = 1 + jax.random.normal(jax.random.key(1), (8, 256, 16))

    def total(table, ids, cotangent):
        x = sharding.take(table, ids, ("batch", "length", "residual"), "bfloat16")
        return jnp.sum(x.astype(jnp.float32) * cotangent.astype(jnp.bfloat16).astype(jnp.float32))

    want = np.asarray(cotangent.astype(jnp.bfloat16), np.float64).sum((0, 1))
    placed, rules = mesh.build(MeshConfig(data=2, fsdp=2, tensor=2)), ShardingRules()
    np.testing.assert_allclose(jax.grad(total)(table, ids, cotangent)[3], want, rtol=1e-5)
    with sharding.activate(placed, rules):
        sharded = jax.device_put(table, sharding.named(placed, rules, ("vocab", "embed"), table.shape))
        rows = [
            jax.device_put(x, sharding.named(placed, rules, ("batch", None, None)[: x.ndim], x.shape))
            for x in (ids, cotangent)
        ]
        got = jax.jit(jax.grad(total))(sharded, *rows)
    np.testing.assert_allclose(np.asarray(got)[3], want, rtol=1e-5)
