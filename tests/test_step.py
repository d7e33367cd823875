"""The train step: a pure function of (state, batch), its metrics, gradient accumulation, dropout keys, dtypes."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import mesh, sharding
from palmjax.config import (
    CheckpointConfig,
    ConfigError,
    DatasetConfig,
    Experiment,
    MeshConfig,
    ShardingRules,
    TrainConfig,
)
from palmjax.data.batch import ConcatenateAndCut
from palmjax.loss import CrossEntropy
from palmjax.optim import Adafactor
from palmjax.step import program
from tests.models.builders import random_batch, tiny_palm


def experiment(**changes) -> Experiment:
    data = DatasetConfig(
        mixture_or_task_name="none",
        task_feature_lengths={"targets": 24},
        batch_size=8,
        packing=ConcatenateAndCut(),
        store_dir="none",
    )
    parts = {"model": tiny_palm(), "train": TrainConfig(steps=4)} | changes
    return Experiment(
        model_dir="none",
        optimizer=Adafactor(),
        loss=CrossEntropy(),
        train_dataset=data,
        train_eval_dataset=None,
        checkpoint=CheckpointConfig(),
        **parts,
    )


def run(config: Experiment, devices: int = 1, steps: int = 3):
    """Metrics of each step and the last state, as numpy."""
    prog = program(config, mesh.build(config.mesh, jax.devices()[:devices]))
    compiled, state = prog.lower(8, 24).compile(), prog.initial_state()
    seen = []
    for i in range(steps):
        batch = jax.device_put(random_batch(seed=i), prog.batch_sharding(8, 24))
        state, metrics = compiled(state, batch)
        seen.append(jax.tree.map(np.asarray, metrics))
    return seen, jax.tree.map(np.asarray, state)


def test_the_first_loss_is_that_of_the_initial_parameters_and_training_lowers_it():
    config = experiment()
    prog = program(config, mesh.build(MeshConfig(), jax.devices()[:1]))
    state, batch = prog.initial_state(), jax.device_put(random_batch(), prog.batch_sharding(8, 24))
    with sharding.activate(prog.mesh, prog.rules):
        sums = CrossEntropy().build(prog.model)(state.params, batch)[1]
    compiled = prog.lower(8, 24).compile()
    state, first = compiled(state, batch)
    assert first["loss"] == pytest.approx(float(sums["loss"] / sums["weight"]), rel=1e-5)
    assert first["accuracy"] == pytest.approx(float(sums["correct"] / sums["weight"]), abs=1e-6)
    assert first["weight"] == batch.weights.sum()
    assert first["learning_rate"] == np.float32(1e-2)
    for _ in range(30):
        state, metrics = compiled(state, batch)
    assert metrics["loss"] < first["loss"] - 1.0


def test_the_same_bits_twice_and_no_dtype_changes():
    config = experiment(model=tiny_palm(dropout=0.1), train=TrainConfig(steps=4, microbatches=2))
    (first, one), (second, two) = run(config), run(config)
    jax.tree.map(np.testing.assert_array_equal, (first, one), (second, two))
    assert (one.step, one.step.dtype) == (3, np.int32)
    assert one.rng.dtype == np.uint32
    abstract = program(config, mesh.build(MeshConfig(), jax.devices()[:1])).abstract_state
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), abstract, one)


def test_microbatches_give_the_gradient_of_the_whole_batch():
    whole, parts = (run(experiment(train=TrainConfig(steps=4, microbatches=m)))[0] for m in (1, 4))
    for a, b in zip(whole, parts, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-5), name


def test_dropout_depends_on_the_step_and_the_seed_only():
    def losses(seed, dropout):
        config = experiment(model=tiny_palm(dropout=dropout), train=TrainConfig(steps=4, seed=seed))
        prog = program(config, mesh.build(MeshConfig(), jax.devices()[:1]))
        compiled, state = prog.lower(8, 24).compile(), prog.initial_state()
        batch = jax.device_put(random_batch(), prog.batch_sharding(8, 24))
        at = [dataclasses.replace(state, step=jnp.asarray(k, jnp.int32)) for k in (0, 0, 1)]
        keep = [jax.tree.map(lambda x: jnp.array(x, copy=True), s) for s in at]
        return [
            float(
                compiled(jax.device_put(s, jax.tree.map(lambda a: a.sharding, prog.abstract_state)), batch)[1]["loss"]
            )
            for s in keep
        ]

    same, again, later = losses(0, 0.3)
    assert same == again != later
    plain, _, plain_later = losses(0, 0.0)
    assert plain == plain_later


def test_a_mesh_that_does_not_fit_names_the_axis_and_the_dimension():
    config = experiment(model=tiny_palm(heads=3), mesh=MeshConfig(data=1, fsdp=1, tensor=2))
    with pytest.raises(ConfigError) as error:
        program(config, mesh.build(config.mesh, jax.devices()[:2]))
    assert "'heads' of size 3" in str(error.value) and "tensor=2" in str(error.value)
    config = experiment(mesh=MeshConfig(data=3))
    prog = program(config, mesh.build(config.mesh, jax.devices()[:3]))
    with pytest.raises(ConfigError, match="'batch' of size 8 is not divisible by mesh axes data=3"):
        prog.batch_sharding(8, 24)


def test_the_state_is_sharded_over_the_mesh():
    config = experiment(mesh=MeshConfig(data=1, fsdp=4, tensor=2), sharding=ShardingRules(residual=("tensor",)))
    prog = program(config, mesh.build(config.mesh))
    total = sum(leaf.size for leaf in jax.tree.leaves(prog.abstract_state))
    one = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(prog.abstract_state))
    assert one < 1.2 * total / 8
    state = prog.initial_state()
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), prog.abstract_state, state)
