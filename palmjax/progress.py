"""Progress of long work on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

LINE_PERIOD = 10.0
"""Seconds between plain lines."""


class Progress:
    """How much is done, how fast, and how long it will take. A context manager.

    total: units of the whole, None while unknown. unit: their name, for people. line_period: seconds between plain
    lines where there is no terminal; 0 writes one for every call.
    """

    def __init__(self, title: str, total: float | None = None, unit: str = "", *, line_period: float = LINE_PERIOD):
        self._title, self._unit, self._period = title, unit, line_period
        self._done, self._total, self._detail = 0.0, total, ""
        self._began = self._printed = time.monotonic()
        self._shown: tuple[float, float | None, str] | None = None  # what the newest plain line told
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._began = self._printed = time.monotonic()
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[text]}"),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, text="")
        else:
            print(f"{self._title} ...", file=sys.stderr, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._period and self._shown != self._state():
            self._print()

    def __call__(self, done: float, total: float | None = None, detail: str = "") -> None:
        """Tells that `done` units are done, of `total` if that has become known. detail: what else to say."""
        self._done, self._detail = done, detail
        self._total = self._total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, text=self._text())
        elif time.monotonic() - self._printed >= self._period:
            self._print()

    def advance(self, units: float) -> None:
        """Tells that `units` more are done."""
        self(self._done + units)

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return max(time.monotonic() - self._began, 1e-9)

    def _state(self) -> tuple[float, float | None, str]:
        return self._done, self._total, self._detail

    def _text(self) -> str:
        whole = "" if self._total is None else f"/{self._total:,.0f}"
        count = f"{self._done:,.0f}{whole} {self._unit} ({rate(self._done / self.seconds)})"
        return f"{count}, {self._detail}" if self._detail else count

    def _print(self) -> None:
        self._printed, self._shown = time.monotonic(), self._state()
        left = ""
        if self._total and 0 < self._done < self._total:
            left = f", {self.seconds * (self._total - self._done) / self._done:.0f} s left"
        print(f"{self._title}: {self._text()}, {self.seconds:.0f} s{left}", file=sys.stderr, flush=True)


def rate(per_second: float) -> str:
    """A rate for people: `1,234/s`, `0.12/s`."""
    return f"{per_second:,.0f}/s" if per_second >= 10 else f"{per_second:.2g}/s"
