"""Reads the metrics of every step, one step late: what happened, and whether the run must rewind or stop.

All processes of a job watch the same numbers and come to the same verdict at the same step. What a watch remembers
(`memory`) is saved with every checkpoint, so that a run that goes on from one decides as it would have without a break.

Events, each a line of kind "event" in metrics.jsonl; `step` counts as the train lines do, `rows` are [first, end) of
the global order, `why` is a sentence:
    nonfinite   step, rows, tensor, in_a_row, skipped (of the run so far), why
    overflow    step, rows, tensor, loss_scale, overflows (of the run so far), why
    loss scale  step, old, new, why
    spike       step, first_step, rows (of all its high steps), loss, median, z, why
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from palmjax.config import GuardConfig, SpikeRule, section
from palmjax.data.order import Skips
from palmjax.guard.record import Rewind

EXIT_STOPPED = 65
"""Exit code of a run that its guard has stopped (EX_DATAERR): a person must look; run again, it stops again."""

NORMAL = 1.4826
"""The standard deviation of normal values over their median absolute deviation."""

FLOOR = 1e-3
"""The least spread, as a share of the median, that losses are taken to have."""

Events = list[tuple[str, dict[str, Any]]]


@section
class Stop:
    """The run must end. why: the error, in one or two lines."""

    step: int
    why: str


@section
class Position:
    """Where the run reads: the global row that a step's batch begins with. step: counted as the train lines do."""

    order: Order
    skips: Skips = ()

    def rows(self, first_step: int, last_step: int) -> tuple[int, int]:
        """[first, end) of the batches that gave the train lines `first_step` .. `last_step`."""
        last = last_step - 1
        begin = self.order.first_row(first_step - 1, self.skips)
        return begin, self.order.first_row(last, self.skips) + self.order.batch_size(last)


class Order(Protocol):
    """What of a dataset decides where its steps read."""

    def first_row(self, step: int, skips: Skips = ()) -> int: ...

    def batch_size(self, step: int) -> int: ...


class LossScale(Protocol):
    """What of a loss scale decides when a run must end."""

    @property
    def minimum(self) -> float: ...

    @property
    def max_at_minimum(self) -> int: ...


class Watch:
    """Told of each step in order by `observe`. verdict: None as long as the run may go on."""

    def __init__(
        self,
        config: GuardConfig,
        *,
        position: Position,
        save_period: int,
        tensors: Sequence[str],
        rewinds: Sequence[Rewind] = (),
        memory: Mapping[str, Any] | None = None,
        loss_scale: LossScale | None = None,
    ):
        """tensors: what the metric `nonfinite` numbers from 1 on. save_period: a rewind goes to a multiple of it.

        memory: `memory()` of the checkpoint that the run goes on from.
        """
        kept = dict(memory or {})
        self.verdict: Rewind | Stop | None = None
        self._config, self._position, self._period = config, position, save_period
        self._tensors, self._rewinds, self._scale_rule = tensors, tuple(rewinds), loss_scale
        window = config.spike.window if config.spike else 0
        self._losses: collections.deque[float] = collections.deque(kept.get("losses", ()), maxlen=window)
        self._high: list[int] = list(kept.get("high", ()))
        self._counts: dict[str, int] = {
            name: kept.get(name, 0) for name in ("skipped", "in_a_row", "overflows", "at_minimum")
        }
        self._scale: float | None = kept.get("loss_scale")

    def memory(self) -> dict[str, Any]:
        """A JSON value from which a new watch goes on."""
        return {"losses": list(self._losses), "high": self._high, **self._counts, "loss_scale": self._scale}

    def observe(self, step: int, values: Mapping[str, float]) -> Events:
        """Takes a step's metrics; returns the events to be logged. After a verdict nothing counts any more."""
        if self.verdict is not None:
            return []
        events: Events = []
        if "loss_scale" in values:
            events += self._watch_scale(step, values)
        place = int(values.get("nonfinite", 0))
        overflow = place > 1 and self._scale_rule is not None
        if overflow:
            events += self._overflow(step, place)
        elif place:
            events += self._nonfinite(step, place)
        else:
            self._counts["in_a_row"] = 0
        if self.verdict is None and self._config.spike is not None:
            events += self._watch_loss(self._config.spike, step, values["loss"], refused=place > 0)
        return events

    def _nonfinite(self, step: int, place: int) -> Events:
        rule, rows, counts = self._config.nonfinite, self._position.rows(step, step), self._counts
        counts["skipped"] += 1
        counts["in_a_row"] += 1
        tensor, in_a_row = self._tensors[place - 1], counts["in_a_row"]
        why = f"{tensor} is not finite: the update of step {step} (rows {rows[0]}..{rows[1]}) was left out"
        if rule is not None and in_a_row > rule.max_in_a_row:
            self.verdict = Stop(
                step=step,
                why=f"step {step}: {tensor} is not finite, in {in_a_row} steps in a row, the last with rows "
                f"{rows[0]}..{rows[1]}; NonFiniteRule.max_in_a_row = {rule.max_in_a_row}",
            )
        fields = {"tensor": tensor, "in_a_row": in_a_row, "skipped": counts["skipped"]}
        return [("nonfinite", {"step": step, "rows": rows, **fields, "why": why})]

    def _overflow(self, step: int, place: int) -> Events:
        assert self._scale_rule is not None and self._scale is not None
        rows, counts, scale = self._position.rows(step, step), self._counts, self._scale
        counts["overflows"] += 1
        counts["at_minimum"] += scale <= self._scale_rule.minimum
        if counts["at_minimum"] >= self._scale_rule.max_at_minimum:
            self.verdict = Stop(
                step=step,
                why=f"step {step}: the loss scale is at its minimum of {scale:g} and {self._tensors[place - 1]} "
                f"overflowed there {counts['at_minimum']} times, the last with rows {rows[0]}..{rows[1]}: the run "
                "diverges, or float16 is too narrow for it",
            )
        tensor = self._tensors[place - 1]
        why = f"{tensor} overflowed at loss scale {scale:g}: the update of step {step} was left out"
        fields = {"tensor": tensor, "loss_scale": scale, "overflows": counts["overflows"]}
        return [("overflow", {"step": step, "rows": rows, **fields, "why": why})]

    def _watch_scale(self, step: int, values: Mapping[str, float]) -> Events:
        old, self._scale = self._scale, values["loss_scale"]
        if old is None or old == self._scale:
            return []
        if self._scale > old:
            self._counts["at_minimum"] = 0
        why = f"the loss scale is {self._scale:g} from step {step} on, after {old:g}"
        return [("loss scale", {"step": step, "old": old, "new": self._scale, "why": why})]

    def _watch_loss(self, rule: SpikeRule, step: int, loss: float, refused: bool) -> Events:
        if refused and not math.isfinite(loss):
            return []  # the step has changed nothing
        if len(self._losses) < rule.window:
            if math.isfinite(loss):
                self._losses.append(loss)
            return []
        median, z = robust_z(loss, self._losses)
        if not z > rule.threshold:
            self._losses.append(loss)
            self._high = []
            return []
        self._high.append(step)
        if len(self._high) < rule.steps:
            return []
        first, rows = self._high[0], self._position.rows(self._high[0], step)
        what = (
            f"the loss of {loss:.4g} at step {step} is {z:.3g} robust standard deviations above the median of "
            f"{median:.4g}, the last of {rule.steps} so high in a row"
        )
        fields = {"first_step": first, "rows": rows, "loss": loss, "median": median, "z": z}
        events: Events = [("spike", {"step": step, **fields, "why": f"{what} (rows {rows[0]}..{rows[1]})"})]
        if len(self._rewinds) >= rule.max_rewinds:
            self.verdict = Stop(
                step=step,
                why=f"{what}, with rows {rows[0]}..{rows[1]}; SpikeRule.max_rewinds = {rule.max_rewinds} are used up",
            )
        else:
            self.verdict = self._rewind(rule, first, step, loss, z)
        return events

    def _rewind(self, rule: SpikeRule, first: int, step: int, loss: float, z: float) -> Rewind:
        """Where to go back to and what to skip: of the spike and the configuration alone, not of which checkpoints
        happen to be there, so that a run that was killed or preempted in between takes the same way.
        """
        order, skips = self._position.order, self._position.skips
        to = max(first - rule.rewind_steps, 0) // self._period * self._period
        until = to + rule.skip_steps
        # In rows of the global order, so what was skipped before on this stretch stays skipped.
        rows = order.first_row(until, skips) - order.first_row(to, skips)
        others = [(at, count) for at, count in skips if at <= to or at > until]
        return Rewind(step=step, to=to, skips=tuple(sorted([*others, (to, rows)])), loss=loss, z=z)


def robust_z(value: float, values: Sequence[float] | collections.deque[float]) -> tuple[float, float]:
    """The median of `values`, and how many robust standard deviations `value` lies above it: (x - median) / (1.4826
    MAD), Iglewicz and Hoaglin 1993; infinite for a value that is not finite.
    """
    median = statistics.median(values)
    deviation = statistics.median(abs(other - median) for other in values)
    spread = max(NORMAL * deviation, FLOOR * abs(median))
    if not math.isfinite(value):
        return median, math.inf
    return median, (value - median) / spread if spread else math.copysign(math.inf, value - median)
