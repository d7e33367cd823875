"""Every layout computes the single device's numbers: loss, gradients and updated parameters on 8 virtual devices."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest

from palmjax import mesh, sharding
from palmjax.config import MeshConfig, ShardingRules
from palmjax.loss import CrossEntropy
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


def run(config: MeshConfig, residual: tuple[str, ...], devices: int, microbatches: int = 1, steps: int = 2):
    """Loss and gradients of the first step and the state after `steps`, as numpy."""
    model, loss, optimizer = MODEL.build(), CrossEntropy().build(MODEL.build()), Adafactor()
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_device(layout):
    assert_equal_to_single(run(*LAYOUTS[layout], devices=8))


@pytest.mark.parametrize("layout", ["2x4", "2x2x2"])
def test_microbatches_equal_the_whole_batch(layout):
    config, residual = LAYOUTS[layout]
    smaller = MeshConfig(data=config.data, fsdp=config.fsdp // 2, tensor=config.tensor)
    devices = math.prod((smaller.data, smaller.fsdp, smaller.tensor))
    assert_equal_to_single(run(smaller, residual, devices=devices, microbatches=2))


def test_initial_values_do_not_depend_on_the_mesh():
    model = MODEL.build()
    plain = jax.jit(lambda: model.init(jax.random.key(5)))()
    with sharding.activate(mesh.build(MeshConfig(data=2, fsdp=2, tensor=2)), ShardingRules()):
        placed = jax.jit(lambda: model.init(jax.random.key(5)))()
    # The same random bits; the last multiplication is fused differently for a shard, which moves one unit in the last
    # place.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.5e-7), plain, jax.tree.map(np.asarray, placed))
    assert not placed["decoder"]["layers"]["mlp"]["wi_0"]["kernel"].sharding.is_fully_replicated
