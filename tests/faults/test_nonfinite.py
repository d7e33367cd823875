"""NaN in one gradient: refused on the devices, counted, named; too many in a row stop the run."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from palmjax import configure, guard, mesh, model_dir, train
from palmjax.config import GuardConfig, MeshConfig, NonFiniteRule, ShardingRules
from palmjax.loss import CrossEntropy
from palmjax.run import Description
from palmjax.step import program, tensor_names
from tests.e2e import jobs
from tests.faults import nonfinite, runs
from tests.faults.nonfinite import BrokenGradient
from tests.models.builders import random_batch
from tests.test_step import experiment

SCALE = "the gradient of decoder/decoder_norm/scale"


def run(job, folder, rows, rule, in_loss=False, steps=30):
    loaded = configure.load([jobs.GIN], runs.bindings(job, folder, f"TRAIN_STEPS={steps}"))
    broken = dataclasses.replace(
        loaded.experiment,
        loss=BrokenGradient(loss=loaded.experiment.loss, in_loss=in_loss),
        guard=GuardConfig(nonfinite=rule),
    )
    with nonfinite.marking(*rows):
        return train.train(broken, Description(operative=loaded.operative))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("in_loss", [False, True])
def test_a_step_with_nan_in_one_gradient_changes_the_step_counter_only(devices, in_loss):
    config = dataclasses.replace(
        experiment(),
        loss=BrokenGradient(loss=CrossEntropy(), in_loss=in_loss),
        mesh=MeshConfig(data=1, fsdp=4, tensor=2) if devices == 8 else MeshConfig(),
        sharding=ShardingRules(residual=("tensor",)) if devices == 8 else ShardingRules(),
    )
    prog = program(config, mesh.build(config.mesh, jax.devices()[:devices]))
    compiled, state = prog.lower(8, 24).compile(), prog.initial_state()
    placed, batch = prog.batch_sharding(8, 24), random_batch()
    state, first = compiled(state, jax.device_put(batch, placed))
    before = jax.tree.map(np.array, state)
    state, metrics = compiled(state, jax.device_put(nonfinite.marked(batch), placed))
    after = jax.tree.map(np.array, state)
    for a, b in zip(jax.tree.leaves(before.replace(step=0)), jax.tree.leaves(after.replace(step=0)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first["nonfinite"] == 0 and after.step == before.step + 1 == 2
    names = tensor_names(prog.abstract_state.params)
    assert names[int(metrics["nonfinite"]) - 1] == ("the loss" if in_loss else SCALE)
    assert np.isfinite(metrics["loss"]) != in_loss
    state, metrics = compiled(state, jax.device_put(batch, placed))
    assert metrics["nonfinite"] == 0 and metrics["loss"] < first["loss"], "it goes on to learn"


def test_without_the_rule_the_parameters_are_lost():
    config = dataclasses.replace(
        experiment(), loss=BrokenGradient(loss=CrossEntropy()), guard=GuardConfig(nonfinite=None)
    )
    prog = program(config, mesh.build(MeshConfig(), jax.devices()[:1]))
    batch = jax.device_put(nonfinite.marked(random_batch()), prog.batch_sharding(8, 24))
    state, metrics = prog.lower(8, 24).compile()(prog.initial_state(), batch)
    assert "nonfinite" not in metrics
    assert np.isnan(np.asarray(state.params["decoder"]["decoder_norm"]["scale"])).any()


def test_the_rule_keeps_no_copy_of_parameters_or_moments():
    """Old and new side by side would take their memory, and a step's time to move it."""

    def copies(rule: NonFiniteRule | None) -> int:
        config = dataclasses.replace(experiment(), guard=GuardConfig(nonfinite=rule))
        text = program(config, mesh.build(MeshConfig(), jax.devices()[:1])).lower(8, 24).compile().as_text()
        return len(re.findall(r"= f32\[\d+,\d[^ ]* copy\(", text or ""))

    without, with_it = copies(None), copies(NonFiniteRule())
    assert without > 0 and with_it <= without


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_passes_over_what_is_not_finite_and_says_so(job, tmp_path, capsys):
    assert run(job, tmp_path, (160, 160 + 3 * 16), NonFiniteRule(max_in_a_row=3)) == 0
    found = runs.events(tmp_path, "nonfinite")
    assert [(e["step"], e["rows"], e["in_a_row"], e["tensor"]) for e in found] == [
        (11 + i, [160 + 16 * i, 176 + 16 * i], 1 + i, SCALE) for i in range(3)
    ]
    assert f"nonfinite: {SCALE} is not finite" in capsys.readouterr().err
    assert all(np.isfinite(loss) for loss in runs.losses(tmp_path).values())
    assert all(np.isfinite(array).all() for array in jobs.final_state(tmp_path, 30).values())


@pytest.mark.e2e
@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_a_restart_stops_at_the_same_step(job, tmp_path, capsys):
    for _ in range(2):
        code = run(job, tmp_path, (160, 400), NonFiniteRule(max_in_a_row=3), in_loss=True)
        assert code == guard.EXIT_STOPPED not in (0, 1, 2, guard.EXIT_PREEMPTED)
        text = capsys.readouterr().err
        assert "error: step 14: the loss is not finite, in 4 steps in a row, the last with rows 208..224" in text
        assert max(model_dir.steps(tmp_path)) == 10
        assert [e["step"] for e in runs.events(tmp_path, "nonfinite")] == [11, 12, 13, 14]
