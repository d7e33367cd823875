"""overrides.json in MODEL_DIR: what a person changes in a run that is on its way.

    {"learning_rate": [[12000, 5e-05], [20000, null]], "skip_rows": [[5120000, 5222400]]}

learning_rate: from each step on this one, null being the schedule's own again. skip_rows: rows [first, end) of the
run's global order, which the events in metrics.jsonl and `palmjax replay` name; they are skipped in whole batches from
the batch that the first of them falls in. The file is read when a run starts and after each checkpoint, so a change
takes effect at a checkpoint's step, and the checkpoints and events after it carry it.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any, Protocol

from palmjax.config import ConfigError, Experiment, section
from palmjax.data.order import Skips
from palmjax.model_dir import as_path, patiently
from palmjax.optim import OverriddenSchedule, ScheduledOptimizer

FILE = "overrides.json"
_SOME_ROW = "[first row, row behind the last]"
_SOME_RATE = "[from_step, learning rate or null]"


class Order(Protocol):
    """What of a dataset decides where its steps read."""

    def first_row(self, step: int, skips: Skips = ()) -> int: ...

    def batch_size(self, step: int) -> int: ...


@section
class Overrides:
    """learning_rate: (from_step, rate or None) with rising steps. skip_rows: (first, end) of global rows."""

    learning_rate: tuple[tuple[int, float | None], ...] = ()
    skip_rows: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, model_dir: str | os.PathLike[str]) -> Overrides:
        """What MODEL_DIR's file says; nothing if there is none. Raises ConfigError naming what is wrong in it."""
        path = as_path(model_dir) / FILE
        try:
            text = patiently(path, lambda file: file.read_bytes()).decode()
        except FileNotFoundError:
            text = "{}"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} can't be read: {error}") from error
        try:
            return cls.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, value: Any) -> Overrides:
        """Raises ConfigError unless `value` is what `to_json` would give."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, dict) or (unknown := [name for name in value if name not in names]):
            what = f"{unknown[0]!r} is not known" if isinstance(value, dict) else f"{value!r} is not an object"
            raise ConfigError(f"{what}; known are {' and '.join(names)}")
        rates = _pairs(
            value, "learning_rate", _SOME_RATE, lambda rate: rate is None or (_is_number(rate) and 0 < rate < math.inf)
        )
        if [step for step, _ in rates] != sorted({step for step, _ in rates}):
            raise ConfigError(f"learning_rate: {[list(one) for one in rates]}: the steps must rise")
        rows = _pairs(value, "skip_rows", _SOME_ROW, lambda end: type(end) is int)
        if bad := [pair for pair in rows if pair[1] <= pair[0]]:
            raise ConfigError(f"skip_rows: {list(bad[0])}: must be {_SOME_ROW}")
        return cls(learning_rate=rates, skip_rows=rows)

    def to_json(self) -> dict[str, Any]:
        """{} if nothing is overridden."""
        return {name: [list(pair) for pair in pairs] for name, pairs in dataclasses.asdict(self).items() if pairs}

    def apply(self, experiment: Experiment) -> Experiment:
        """`experiment` with these learning rates. Raises ConfigError if its optimizer has no schedule."""
        if not self.learning_rate:
            return experiment
        optimizer = experiment.optimizer
        if not isinstance(optimizer, ScheduledOptimizer):
            raise ConfigError(f"{FILE}: learning_rate: {type(optimizer).__name__} has no schedule to override")
        schedule = OverriddenSchedule(schedule=optimizer.schedule, values=self.learning_rate)
        return dataclasses.replace(experiment, optimizer=dataclasses.replace(optimizer, schedule=schedule))

    def check(self, step: int, recorded: Mapping[str, Any]) -> None:
        """Raises ConfigError if a learning rate was to hold before `step`, where the run stands, and didn't.

        recorded: the overrides in force until `step`, as `to_json` gave them.
        """
        before = Overrides.from_json(dict(recorded)).learning_rate
        for from_step, rate in self.learning_rate:
            if from_step < step and (from_step, rate) not in before:
                raise ConfigError(
                    f"{FILE}: learning_rate {rate} from step {from_step}: the run stands at step {step} and was "
                    f"trained without; give a step from {step} on"
                )

    def add_skips(self, skips: Skips, step: int, order: Order) -> Skips:
        """`skips` and what `skip_rows` adds to them from `step` on; rows that were read or skipped before add nothing.

        Adding them twice is adding them once, so nobody needs to remember which of them have been passed.
        """
        for first, end in sorted(self.skip_rows):
            at = step
            if order.first_row(step, skips) <= first:
                steps = range(step, 1 << 40)
                found = bisect.bisect_right(steps, first, key=lambda s, known=skips: order.first_row(s, known))
                at = steps[found - 1]
                # The row may lie in a gap that is skipped already.
                at += order.first_row(at, skips) + order.batch_size(at) <= first
            begin = order.first_row(at, skips)
            if begin < end:
                skips = (*skips, (at, end - begin))
        return skips


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pairs(value: Mapping[str, Any], name: str, wanted: str, second_is_right: Any) -> tuple[tuple[Any, Any], ...]:
    """The list of pairs under `name`. Raises ConfigError naming the first that is none."""
    listed = value.get(name, [])
    if not isinstance(listed, list):
        raise ConfigError(f"{name}: {listed!r}: must be a list of {wanted}")
    for pair in listed:
        right = isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and pair[0] >= 0
        if not right or not second_is_right(pair[1]):
            raise ConfigError(f"{name}: {pair!r}: must be {wanted}")
    return tuple((first, second) for first, second in listed)
