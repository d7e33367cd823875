"""The recorder of a training run: every number one step late, to every sink."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax

from palmjax.metrics.lines import FILE, JsonLines
from palmjax.metrics.remote import RemoteLines
from palmjax.metrics.sinks import Bar, Console, Lines, TensorBoard
from palmjax.metrics.throughput import Throughput, clock
from palmjax.metrics.uploader import Pace
from palmjax.model_dir import as_path

Observer = Callable[[int, Mapping[str, float]], Iterable[tuple[str, Mapping[str, Any]]]]
"""Told of a step and its metrics; returns events (name, fields, with `why` in words) to be logged with it."""

_RECENT_STEPS = 50
_PACE = Pace()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Launched:
    """A step on its way: its number, its metrics still on the devices, and what the host knows of it."""

    step: int
    metrics: Mapping[str, jax.Array]
    tokens: int
    data_wait: float
    checkpoint_block: float


class Recorder:
    """Writes a training run's metrics, one step late. A context manager: leaving it closes it.

    model_dir: gets metrics.jsonl, train/ and training_eval/<task>/. On a remote folder (gs://), which can't be appended
    to, the lines lie in part files in metrics/; a thread uploads them and TensorBoard's files at the given pace, and a
    network that fails is reported and never ends the run. `read_metrics` reads either. A local metrics.jsonl that can't
    be written (a full disk) is a ConfigError; TensorBoard's files that can't be are one message, and the run goes on.
    start_step: steps already done when this process begins; what a killed process logged of later steps is removed.
    log_period: steps between lines of the log and between TensorBoard's points (the JSON lines have every step).
    rewinds: how many the run has made; what was logged before the last is history, of which nothing is removed.
    observer: told of every step when its metrics are known, on every process; the events that it returns are written.
    is_primary: only this process writes; the others fetch the same numbers at the same time and return them. stream: of
    the console, standard error by default.

    A step's JSON line: kind "train", step (steps done after it), each metric, tokens, seconds (between
    the completion of the step before and its own), tokens_per_second, mfu, hfu, data_wait, checkpoint_block (seconds).
    The other kinds are "eval" (step, task, each metric, seconds) and "event" (event, time, monotonic, what came with
    it). time is the wall clock, which people and the network set; monotonic counts on through that, from an origin that
    is the same within a process.
    """

    def __init__(
        self,
        model_dir: str,
        throughput: Throughput,
        *,
        total_steps: int,
        start_step: int = 0,
        log_period: int = 10,
        tensorboard: bool = True,
        rewinds: int = 0,
        observer: Observer | None = None,
        is_primary: bool = True,
        stream: IO[str] | None = None,
        pace: Pace = _PACE,
    ):
        self._throughput, self._observer = throughput, observer
        self._total_steps, self._start_step, self._log_period = total_steps, start_step, log_period
        self._pending: _Launched | None = None
        self._completed = time.perf_counter()
        self._first_step = True
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=_RECENT_STEPS)
        self._seconds: list[float] = []
        self._tokens = 0
        self._data_wait = 0.0
        self._lines: JsonLines | RemoteLines | None = None
        self._board: TensorBoard | None = None
        self._console: Console | None = None
        self._every_step_shown = False
        if is_primary:
            out = stream or sys.stderr
            folder = as_path(model_dir)
            if isinstance(folder, Path):
                self._lines = JsonLines(str(folder / FILE), start_step, rewinds)
            else:
                self._lines = RemoteLines(folder, start_step, self.message, pace, rewinds)
                folder = self._lines.spool
            self._board = TensorBoard(str(folder), start_step, self.message) if tensorboard else None
            self._every_step_shown = out.isatty() and os.environ.get("TERM") != "dumb"
            self._console = Bar(out, total_steps, start_step) if self._every_step_shown else Lines(out, total_steps)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        # After an exception the pending step is not fetched: the devices may be what failed.
        if kind is None:
            self.close()
        else:
            self._release()

    def record(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        *,
        tokens: int,
        data_wait: float = 0.0,
        checkpoint_block: float = 0.0,
    ) -> dict[str, float] | None:
        """Takes the metrics of the step just launched; writes and returns those of the step before, None if none.

        step: steps done once this one has finished. metrics: scalars on the devices, `loss` (nats a token) and more.
        tokens: target tokens of the step over all hosts. data_wait, checkpoint_block: seconds that the loop stood
        still before launching it, waiting for the batch and for a save.
        """
        earlier = self._pending
        self._pending = _Launched(
            step=step, metrics=metrics, tokens=tokens, data_wait=data_wait, checkpoint_block=checkpoint_block
        )
        return self._settle(earlier) if earlier else None

    def flush(self) -> dict[str, float] | None:
        """Waits for the last step launched; writes and returns its metrics, None if there is none."""
        earlier, self._pending = self._pending, None
        values = self._settle(earlier) if earlier else None
        if self._lines is not None:
            self._lines.flush()
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training (an evaluation): flushes first, and keeps its time out of the next step's."""
        self.flush()
        try:
            yield
        finally:
            self._completed = time.perf_counter()

    def evaluation(self, step: int, task: str, metrics: Mapping[str, float], *, seconds: float) -> None:
        """Writes the results of an evaluation on `task` after `step` steps, which took `seconds`."""
        self._write({"kind": "eval", "step": step, "task": task, **metrics, "seconds": seconds})
        if self._board is not None:
            values = {**_aliased(metrics), "timing/evaluate_seconds": seconds}
            self._board.scalars(f"training_eval/{task}", step, values)
        self.message("  ".join([f"eval {task} at step {step}", *(f"{name} {v:.4g}" for name, v in metrics.items())]))

    def event(self, name: str, **values: Any) -> None:
        """Writes that something happened, with what belongs to it (`step` if it belongs to one): JSON values."""
        clocks = {"time": time.time(), "monotonic": time.monotonic()}
        self._write({"kind": "event", "event": name, **clocks, **values})

    def message(self, text: str) -> None:
        """Prints a line on the console, above the progress bar."""
        if self._console is not None:
            self._console.message(text)

    def summary(self) -> dict[str, float | None]:
        """The run so far, without each process's first step, which compiles: percentiles of step seconds, and rates.

        steps; step_seconds_p50 and _p95, tokens_per_second, mfu, hfu and data_wait_share (of the steps' time), None
        before the second step.
        """
        names = ("step_seconds_p50", "step_seconds_p95", "tokens_per_second", "mfu", "hfu", "data_wait_share")
        if not self._seconds:
            return {"steps": 0, **dict.fromkeys(names)}
        ordered, total = sorted(self._seconds), sum(self._seconds)
        p50, p95 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95))  # nearest rank
        percentiles = {"steps": len(ordered), "step_seconds_p50": p50, "step_seconds_p95": p95}
        return {
            **percentiles,
            **self._throughput.rates(self._tokens, total),
            "data_wait_share": self._data_wait / total,
        }

    def close(self) -> None:
        """Flushes, writes the summary and closes every file; a remote folder has `pace.close` seconds for it."""
        try:
            self.flush()
            summary = self.summary()
            self.event("summary", **summary)
            if self._seconds:
                p50, p95 = summary["step_seconds_p50"], summary["step_seconds_p95"]
                rates = "  ".join(self._throughput.describe(summary))
                self.message(f"{summary['steps']} steps after the first: p50 {p50:.3g} s, p95 {p95:.3g} s  {rates}")
        finally:
            self._release()

    def _settle(self, launched: _Launched) -> dict[str, float]:
        """Waits for a launched step, writes it everywhere and returns its metrics."""
        values = {name: float(value) for name, value in jax.device_get(dict(launched.metrics)).items()}
        self._write_step(launched, values)
        if self._observer is not None:
            for name, fields in self._observer(launched.step, values):
                self.event(name, **fields)
                self.message(f"{name}: {fields['why']}")
        return values

    def _write_step(self, launched: _Launched, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        seconds, self._completed = now - self._completed, now
        first, self._first_step = self._first_step, False
        if not first:
            self._recent.append((launched.tokens, seconds))
            self._seconds.append(seconds)
            self._tokens += launched.tokens
            self._data_wait += launched.data_wait
        if self._lines is None:
            return
        timing = {
            "tokens": launched.tokens,
            "seconds": seconds,
            **self._throughput.rates(launched.tokens, seconds),
            "data_wait": launched.data_wait,
            "checkpoint_block": launched.checkpoint_block,
        }
        self._write({"kind": "train", "step": launched.step, **values, **timing})
        due = first or launched.step % self._log_period == 0 or launched.step >= self._total_steps
        if self._console is not None and (due or self._every_step_shown):
            self._console.step(launched.step, self._describe(launched.step, values))
        if self._board is not None and due:
            self._board.scalars("train", launched.step, {**_aliased(values), **self._timing_tags(launched, seconds)})

    def _describe(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Loss, rates over the recent steps and the time left; no rate and no time before the second step."""
        parts = [f"loss {values['loss']:.3f}"] if "loss" in values else []
        if not self._recent:
            return parts
        # The median: an evaluation's aftermath or a slow save should not move the forecast.
        left = statistics.median(seconds for _, seconds in self._recent) * (self._total_steps - step)
        return [*parts, *self._throughput.describe(self._recent_rates()), f"eta {clock(left)}"]

    def _recent_rates(self) -> dict[str, float | None]:
        tokens, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        return self._throughput.rates(tokens, seconds)

    def _timing_tags(self, launched: _Launched, seconds: float) -> dict[str, float | None]:
        """T5X's timing tags, over the recent steps where they are rates, and ours beside them."""
        tags: dict[str, float | None] = {
            "timing/seconds": seconds,
            "timing/data_wait_seconds": launched.data_wait,
            "timing/checkpoint_block_seconds": launched.checkpoint_block,
        }
        if not self._recent:
            return tags
        rates = self._recent_rates()
        speed = rates["tokens_per_second"] or 0.0
        return {
            **tags,
            "timing/steps_per_second": len(self._recent) / sum(seconds for _, seconds in self._recent),
            "timing/target_tokens_per_second": speed,
            "timing/target_tokens_per_second_per_core": speed / self._throughput.devices,
            "timing/mfu": rates["mfu"],
            "timing/hfu": rates["hfu"],
        }

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(record)
            if record["kind"] != "train":
                self._lines.flush()  # rare, and worth knowing of soon

    def _release(self) -> None:
        sinks = (self._console, self._lines, self._board)
        self._lines = self._board = None
        try:
            with contextlib.ExitStack() as stack:
                # Closes from the last to the first: the upload of the lines takes TensorBoard's finished files along,
                # and may have something to say on the console.
                for sink in sinks:
                    if sink is not None:
                        stack.callback(sink.close)
        finally:
            self._console = None


def _aliased(metrics: Mapping[str, float]) -> dict[str, float]:
    """`metrics`, and the loss once more under the name that T5X's dashboards look for."""
    alias = {"loss_per_nonpadding_target_token": metrics["loss"]} if "loss" in metrics else {}
    return {**metrics, **alias}
