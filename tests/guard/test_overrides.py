"""overrides.json: what it may say, what it does to skips and to learning rates."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmjax.config import ConfigError
from palmjax.guard import Overrides
from palmjax.optim import Adafactor, Constant, OverriddenSchedule
from tests.guard.test_watch import ORDER
from tests.test_step import experiment


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "is not an object; known are learning_rate and skip_rows"),
        ('{"lr": []}', "'lr' is not known; known are learning_rate and skip_rows"),
        ('{"learning_rate": 3}', "learning_rate: 3: must be a list of [from_step, learning rate or null]"),
        ('{"learning_rate": [[1, 0.0]]}', "learning_rate: [1, 0.0]: must be"),
        ('{"learning_rate": [[1, true]]}', "learning_rate: [1, True]: must be"),
        ('{"learning_rate": [[-1, 1e-3]]}', "learning_rate: [-1, 0.001]: must be"),
        ('{"learning_rate": [[5, 1e-3], [5, 1e-4]]}', "the steps must rise"),
        ('{"skip_rows": [[8, 8]]}', "skip_rows: [8, 8]: must be [first row, row behind the last]"),
        ('{"skip_rows": [[1, "9"]]}', "skip_rows: [1, '9']: must be"),
        ('{"skip_rows": [1, 9]}', "skip_rows: 1: must be"),
        ("\udcff", "can't be read"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, text, words):
    (tmp_path / "overrides.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as error:
        Overrides.read(tmp_path)
    assert words in str(error.value) and "overrides.json" in str(error.value) and "\n" not in str(error.value)


def test_no_file_says_nothing_and_json_comes_back(tmp_path):
    assert Overrides.read(tmp_path) == Overrides() and Overrides().to_json() == {}
    value = {"learning_rate": [[12, 5e-5], [20, None]], "skip_rows": [[100, 200], [40, 50]]}
    (tmp_path / "overrides.json").write_text(json.dumps(value))
    assert Overrides.read(tmp_path).to_json() == value


def test_the_learning_rate_holds_from_its_step_on():
    config = Overrides(learning_rate=((3, 0.5), (5, None), (7, 0.25))).apply(experiment())
    schedule = OverriddenSchedule(schedule=Constant(value=1.0), values=((3, 0.5), (5, None), (7, 0.25))).build()
    assert [float(schedule(step)) for step in range(9)] == [1, 1, 1, 0.5, 0.5, 1, 1, 0.25, 0.25]
    assert isinstance(config.optimizer, Adafactor) and float(config.optimizer.learning_rate(3)) == 0.5
    plain = experiment()
    assert Overrides(skip_rows=((1, 2),)).apply(plain) is plain


def test_a_learning_rate_of_the_past_is_refused_unless_it_was_in_force():
    overrides = Overrides(learning_rate=((10, 0.5), (30, 0.25)))
    overrides.check(10, {})
    overrides.check(20, {"learning_rate": [[10, 0.5]]})
    for recorded in ({}, {"learning_rate": [[10, 0.4]]}):
        with pytest.raises(ConfigError, match="from step 10: the run stands at step 20"):
            overrides.check(20, recorded)


@given(
    ranges=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 300)), max_size=4),
    earlier=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 200)), max_size=2),
    step=st.integers(0, 60),
)
def test_no_row_of_a_skipped_range_is_read_and_nothing_more_than_a_batch_around_it(ranges, earlier, step):
    overrides = Overrides(skip_rows=tuple((first, first + count) for first, count in ranges))
    before = tuple((at, rows) for at, rows in earlier if at <= step)
    skips = overrides.add_skips(before, step, ORDER)

    def read(skips):
        rows = [ORDER.first_row(s, skips) + np.arange(ORDER.batch_size(s)) for s in range(step, 300)]
        return np.concatenate(rows)

    after, whole = read(skips), set(read(before).tolist())
    for first, count in ranges:
        assert not ((after >= first) & (after < first + count)).any()
    lost = [row for row in whole - set(after.tolist()) if row < after.max()]
    for row in lost:
        assert any(first - 16 < row < first + count for first, count in ranges), "lost without need"
    assert overrides.add_skips(skips, step, ORDER) == skips, "twice is once"
