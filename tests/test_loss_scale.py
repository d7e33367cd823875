"""The dynamic loss scale against a plain transcription of its rule, and float16 training with it."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmjax import mesh
from palmjax.config import ConfigError, MeshConfig, TrainConfig
from palmjax.loss_scale import DynamicLossScale
from palmjax.step import program
from tests.models.builders import random_batch, tiny_palm
from tests.test_step import experiment


class Transcribed:
    """Megatron-LM's DynamicGradScaler in plain Python: tracks growth and hysteresis as it does."""

    def __init__(self, config: DynamicLossScale):
        self.config, self.scale = config, config.init
        self.growth_tracker, self.hysteresis_tracker = 0, config.hysteresis

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = max(self.scale * 0.5, self.config.minimum)
        else:
            self.growth_tracker += 1
            if self.growth_tracker == self.config.window:
                self.growth_tracker = 0
                self.hysteresis_tracker = self.config.hysteresis
                self.scale = self.scale * 2.0


@given(
    overflows=st.lists(st.booleans(), max_size=60),
    window=st.integers(1, 6),
    hysteresis=st.integers(1, 3),
    steps_above_minimum=st.integers(0, 4),
)
def test_any_trace_is_that_of_the_transcription(overflows, window, hysteresis, steps_above_minimum):
    config = DynamicLossScale(
        init=2.0**steps_above_minimum, window=window, hysteresis=hysteresis, minimum=1.0, max_at_minimum=1
    )
    ours, theirs = config.build(), Transcribed(config)

    def trace(flags):
        return jax.lax.scan(lambda s, f: (new := ours.update(s, f), new.scale), ours.init(), flags)[1]

    flags = np.zeros(60, bool)  # one shape, one program
    flags[: len(overflows)] = overflows
    expected = []
    for flag in flags:
        theirs.update(bool(flag))
        expected.append(theirs.scale)
    np.testing.assert_array_equal(trace(flags), np.asarray(expected, np.float32))


def test_the_defaults_are_those_of_bloom_560m():
    config = DynamicLossScale()
    assert (config.init, config.window, config.hysteresis, config.minimum) == (2**12, 500, 2, 1)


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"hysteresis": 0}, {"minimum": 0.0}, {"init": 0.5}, {"max_at_minimum": 0}]
)
def test_what_cannot_be(wrong):
    (field,) = wrong
    with pytest.raises(ConfigError, match=rf"DynamicLossScale\.{field} = "):
        DynamicLossScale(**wrong)


def float16(**changes):
    return experiment(model=tiny_palm(dtype="float16"), loss_scale=DynamicLossScale(**changes))


def trained(config, steps: int, devices: int = 1):
    """Metrics of each step, and the states before the first and after each."""
    prog = program(config, mesh.build(config.mesh, jax.devices()[:devices]))
    compiled, state = prog.lower(8, 24).compile(), prog.initial_state()
    metrics, states = [], [jax.tree.map(np.array, state)]
    for i in range(steps):
        state, values = compiled(state, jax.device_put(random_batch(seed=i % 2), prog.batch_sharding(8, 24)))
        metrics.append({name: float(value) for name, value in values.items()})
        states.append(jax.tree.map(np.array, state))
    return metrics, states


@pytest.fixture(scope="module")
def half():
    return trained(float16(), 12)


def test_float16_trains_as_float32_does(half):
    half, states = half
    full, _ = trained(experiment(model=tiny_palm(dtype="float32")), 12)
    for a, b in zip(half, full, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.1)
        assert a["loss_scale"] == 4096 and a["nonfinite"] == 0
    assert half[-1]["loss"] < half[0]["loss"] - 0.3
    assert states[-1].loss_scale.clean == 12


@pytest.mark.parametrize("devices", [1, 8])
def test_an_overflow_changes_the_scale_and_the_step_only(devices):
    config = dataclasses.replace(
        float16(init=2.0**36, hysteresis=2), mesh=MeshConfig(data=1, fsdp=4, tensor=2) if devices == 8 else MeshConfig()
    )
    metrics, states = trained(config, 3, devices)
    for before, after in itertools.pairwise(states):
        jax.tree.map(np.testing.assert_array_equal, (before.params, before.opt_state), (after.params, after.opt_state))
    assert [m["loss_scale"] for m in metrics] == [2.0**36, 2.0**36, 2.0**35], "the first overflow is forgiven"
    assert all(m["nonfinite"] > 1 and np.isfinite(m["loss"]) for m in metrics)
    assert states[-1].step == 3 and states[-1].loss_scale.scale == 2.0**34


def test_it_finds_a_scale_that_fits_and_trains_from_there():
    metrics, states = trained(float16(init=2.0**28, hysteresis=1), 25)
    scales = [m["loss_scale"] for m in metrics]
    overflows = [m["nonfinite"] > 0 for m in metrics]
    assert overflows[0] and not any(overflows[-5:]) and 1 < scales[-1] < 2.0**28
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert states[-1].params is not None and all(np.isfinite(x).all() for x in jax.tree.leaves(states[-1].params))


def test_float16_without_a_scale_is_refused():
    config = experiment(model=tiny_palm(dtype="float16"), train=TrainConfig(steps=1))
    with pytest.raises(ConfigError, match=r"Experiment\.loss_scale = @DynamicLossScale"):
        program(config, mesh.build(MeshConfig(), jax.devices()[:1]))


def test_microbatches_scale_once(half):
    config = dataclasses.replace(float16(), train=TrainConfig(steps=4, microbatches=4))
    parts, whole = trained(config, 2)[0], half[0][:2]
    for a, b in zip(parts, whole, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)
        assert jnp.isfinite(a["loss"])
