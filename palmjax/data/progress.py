"""Progress of a store being built: a bar on a terminal, plain lines every ten seconds elsewhere. Imports rich only."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console

LINE_PERIOD = 10.0  # seconds between plain lines


class BuildProgress:
    """Counts documents and tokens of one store. A context manager; written to stderr.

    num_documents: how many there will be, if that is known: then the bar and the lines tell the time left.
    """

    def __init__(self, title: str, num_documents: int | None):
        self._title, self._total = title, num_documents
        self._documents = self._tokens = 0
        self._parts = (0, 0)
        self._began = self._printed = time.monotonic()
        self._bar: rich_progress.Progress | None = None

    def __enter__(self) -> BuildProgress:
        if sys.stderr.isatty():
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.fields[detail]}"),
                rich_progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, detail="")
        else:
            print(f"{self._title}: starting", file=sys.stderr, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._print()

    def parts(self, done: int, total: int) -> None:
        """Tells how many parts are finished."""
        self._parts = (done, total)
        self.add(0, 0)

    def add(self, documents: int, tokens: int) -> None:
        """Counts documents and tokens that were just written."""
        self._documents += documents
        self._tokens += tokens
        if self._bar:
            self._bar.update(self._task, completed=self._documents, detail=self._detail())
        elif time.monotonic() - self._printed > LINE_PERIOD:
            self._print()

    def _detail(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        done, total = self._parts
        return (
            f"part {done}/{total}, {self._documents:,} documents ({self._documents / seconds:,.0f}/s), "
            f"{self._tokens:,} tokens ({self._tokens / seconds:,.0f}/s)"
        )

    def _print(self) -> None:
        self._printed = time.monotonic()
        left = ""
        if self._total and 0 < self._documents < self._total:
            seconds = (self._printed - self._began) * (self._total - self._documents) / self._documents
            left = f", {seconds:.0f} s left"
        print(f"{self._title}: {self._detail()}{left}", file=sys.stderr, flush=True)
