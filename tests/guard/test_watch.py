"""The watch: what is a spike, where to go back to, what stops a run; and that a break in the run changes none of it."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from palmjax.config import (
    ConfigError,
    GuardConfig,
    NonFiniteRule,
    SaveCheckpointConfig,
    SpikeRule,
)
from palmjax.data.order import BatchRamp, Ramp
from palmjax.guard import Position, Rewind, Stop, Watch
from palmjax.guard.watch import robust_z
from palmjax.loss_scale import DynamicLossScale

RULE = SpikeRule(window=32, steps=3, rewind_steps=20, skip_steps=60, max_rewinds=2)
TENSORS = ("the loss", "the gradient of a", "the gradient of b")


class Data:
    """An order of rows with a ramp, as a Dataset has it."""

    def __init__(self, ramp: Ramp):
        self._ramp = ramp

    def first_row(self, step, skips=()):
        return self._ramp.first_row(step, skips)

    def batch_size(self, step):
        return self._ramp.rows(step)


ORDER = Data(BatchRamp(stages=((0, 8), (100, 16))).build())


def watch(rule: SpikeRule | None = RULE, skips=(), **options) -> Watch:
    given = {"save_period": 10, "tensors": TENSORS, **options}
    rules = GuardConfig(nonfinite=NonFiniteRule(max_in_a_row=2), spike=rule)
    return Watch(rules, position=Position(order=ORDER, skips=skips), **given)


def noisy(step: int) -> float:
    return 3.0 + 2.0 / step + random.Random(step).gauss(0, 0.02)


def feed(to: Watch, losses, first: int = 1):
    events = []
    for step, loss in enumerate(losses, first):
        events += to.observe(step, {"loss": loss})
    return events


def test_robust_z_is_the_textbook_one():
    values = [float(v) for v in np.random.default_rng(0).normal(5, 0.3, 101)]
    median, z = robust_z(6.5, values)
    mad = np.median(np.abs(np.asarray(values) - np.median(values)))
    assert (median, z) == pytest.approx((np.median(values), 0.6745 * (6.5 - np.median(values)) / mad), rel=1e-4)
    assert robust_z(math.nan, values)[1] == robust_z(math.inf, values)[1] == math.inf
    assert robust_z(2.0, [1.0] * 9)[1] == pytest.approx(1000), "constant losses still have a spread"


def test_a_noisy_falling_loss_is_no_spike():
    to = watch()
    assert feed(to, [noisy(step) for step in range(1, 3000)]) == [] and to.verdict is None


def test_a_spike_goes_back_to_a_multiple_of_the_period_and_skips_from_there():
    to = watch()
    ((name, event),) = feed(to, [noisy(step) for step in range(1, 93)] + [3.6, 3.7, 3.9])
    assert name == "spike" and (event["first_step"], event["step"]) == (93, 95)
    assert event["rows"] == (92 * 8, 95 * 8)
    # 93 - 20 = 73, down to 70; 60 batches from there, 30 of 8 rows and 30 of 16
    assert to.verdict == Rewind(step=95, to=70, skips=((70, 30 * 8 + 30 * 16),), loss=3.9, z=event["z"])
    assert feed(to, [9.0] * 9, 96) == [], "after the verdict nothing counts"


def test_outliers_that_do_not_last_are_no_spike():
    losses = [noisy(step) for step in range(1, 200)]
    for step in (50, 51, 80, 120, 121):
        losses[step] = 9.0
    assert feed(watch(), losses) == []


def test_what_lay_on_the_stretch_that_is_skipped_stays_skipped():
    """A second spike on the way again: its rows lie behind those of the first, and all of them are passed over."""
    skips = ((70, 720),)
    to = watch(skips=skips, rewinds=[Rewind(step=95, to=70, skips=skips, loss=9.0, z=9.0)])
    feed(to, [noisy(step) for step in range(1, 93)] + [5.0, 5.0, 5.0])
    assert isinstance(to.verdict, Rewind) and to.verdict.to == 70
    assert dict([to.verdict.skips[-1]]) == {70: 720}
    assert ORDER.first_row(70, to.verdict.skips) == ORDER.first_row(130, skips)
    earlier = watch(skips=((85, 400),))
    feed(earlier, [noisy(step) for step in range(1, 93)] + [5.0, 5.0, 5.0])
    assert isinstance(earlier.verdict, Rewind)
    assert earlier.verdict.skips == ((70, 30 * 8 + 30 * 16 + 400),), "one entry, which covers the 400 too"


def test_rewinds_run_out():
    done = [Rewind(step=1, to=0, skips=(), loss=9.0, z=9.0)] * 2
    to = watch(rewinds=done)
    feed(to, [noisy(step) for step in range(1, 60)] + [5.0, 5.0, 5.0])
    assert isinstance(to.verdict, Stop) and "SpikeRule.max_rewinds = 2" in to.verdict.why
    assert "step 62" in to.verdict.why and "rows 472..496" in to.verdict.why


@pytest.mark.parametrize("pause", [5, 31, 32, 60, 93, 94])
def test_a_watch_that_goes_on_from_its_memory_decides_the_same(pause):
    losses = [noisy(step) for step in range(1, 93)] + [5.0, 5.0, 5.0]
    whole = watch()
    feed(whole, losses)
    first = watch()
    feed(first, losses[:pause])
    second = watch(memory=json.loads(json.dumps(first.memory())))
    feed(second, losses[pause:], pause + 1)
    assert second.verdict == whole.verdict is not None and second.memory() == whole.memory()


def test_not_finite_in_a_row_stops_and_what_is_between_starts_anew():
    to, good = watch(rule=None), {"loss": 1.0, "nonfinite": 0.0}
    values = [good, {"loss": 1.0, "nonfinite": 3.0}, {"loss": math.nan, "nonfinite": 1.0}, good]
    events = [event for step, one in enumerate(values, 1) for event in to.observe(step, one)]
    assert [(name, e["tensor"], e["in_a_row"], e["skipped"]) for name, e in events] == [
        ("nonfinite", "the gradient of b", 1, 1),
        ("nonfinite", "the loss", 2, 2),
    ]
    for step in (5, 6):
        to.observe(step, values[1])
    assert to.verdict is None
    to.observe(7, values[1])
    assert isinstance(to.verdict, Stop) and to.verdict.step == 7
    for part in ("step 7", "the gradient of b", "3 steps in a row", "rows 48..56", "max_in_a_row = 2"):
        assert part in to.verdict.why


def test_a_refused_loss_is_no_spike():
    to = watch()
    feed(to, [noisy(step) for step in range(1, 60)])
    for step in (60, 61):
        to.observe(step, {"loss": math.nan, "nonfinite": 1.0})
    assert to.verdict is None and to.memory()["high"] == []


def scaled(to: Watch, steps) -> list:
    events = []
    for step, (scale, place) in enumerate(steps, 1):
        events += to.observe(step, {"loss": 1.0, "loss_scale": scale, "nonfinite": float(place)})
    return events


def test_overflows_are_counted_and_are_no_anomaly():
    to = watch(rule=None, loss_scale=DynamicLossScale().build())
    events = scaled(to, [(4096.0, 2), (4096.0, 2), (2048.0, 2), (1024.0, 0), (2048.0, 0)])
    assert [name for name, _ in events] == [
        "overflow",
        "overflow",
        "loss scale",
        "overflow",
        "loss scale",
        "loss scale",
    ]
    assert events[3][1]["overflows"] == 3 and events[3][1]["tensor"] == "the gradient of a" and to.verdict is None


def test_a_scale_that_sits_at_its_minimum_stops_the_run():
    rule = DynamicLossScale(init=4.0, minimum=2.0, max_at_minimum=3).build()
    to = watch(rule=None, loss_scale=rule)
    scaled(to, [(4.0, 2), (2.0, 2), (2.0, 0), (2.0, 2), (4.0, 0), (2.0, 2), (2.0, 2)])
    assert to.verdict is None, "the scale has grown in between"
    to.observe(8, {"loss": 1.0, "loss_scale": 2.0, "nonfinite": 2.0})
    assert isinstance(to.verdict, Stop) and "at its minimum of 2" in to.verdict.why and "3 times" in to.verdict.why


def test_a_loss_that_is_not_finite_is_an_anomaly_under_a_scale_too():
    to = watch(rule=None, loss_scale=DynamicLossScale().build())
    for step in (1, 2, 3):
        to.observe(step, {"loss": math.inf, "loss_scale": 4096.0, "nonfinite": 1.0})
    assert isinstance(to.verdict, Stop) and "the loss is not finite" in to.verdict.why


def test_too_few_checkpoints_for_a_rewind_is_said_at_the_start():
    rules = GuardConfig(spike=SpikeRule())
    rules.check(SaveCheckpointConfig(period=100, keep=3))
    rules.check(SaveCheckpointConfig(period=100, keep=None))
    with pytest.raises(ConfigError, match=r"SaveCheckpointConfig\.keep = 2: .*period = 100 needs the newest 3"):
        rules.check(SaveCheckpointConfig(period=100, keep=2))
    with pytest.raises(ConfigError, match=r"SpikeRule\.skip_steps = 300: must be 304 or more"):
        rules.check(SaveCheckpointConfig(period=200, keep=3))
