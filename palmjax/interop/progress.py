"""Progress of a conversion: bytes, rate and time left; a bar on a terminal, lines every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

LINE_PERIOD = 10.0


class Progress:
    """Counts bytes of one conversion on standard error. A context manager; called with the bytes just moved."""

    def __init__(self, title: str, total: int):
        self._title, self._total, self._done = title, max(total, 1), 0
        self._began = self._printed = time.monotonic()
        self._stack = contextlib.ExitStack()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = self._stack.enter_context(progress.Progress(*columns, console=Console(stderr=True)))
            self._task = self._bar.add_task(self._title, total=self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            print(self._line(), file=sys.stderr, flush=True)

    def __call__(self, moved: int) -> None:
        self._done += moved
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._printed > LINE_PERIOD:
            self._printed = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate and self._done < self._total else 0.0
        tail = f", {left:.0f} s left" if left else f", {seconds:.1f} s"
        return f"{self._title}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s{tail}"
