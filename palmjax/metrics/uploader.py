"""A thread that keeps a remote folder up to date, and that no failing or slow network lets through to the run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

_LONGEST_REASON = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How often a remote folder is written to. All but the last in seconds.

    lines, events: between two uploads of new metrics and of TensorBoard's files. spacing: least time between two
    writes of one object (Cloud Storage refuses more than one a second). retry, longest_retry: the wait after the first
    failure, and what it at most doubles to. close: how long the end of a run tries to upload the rest; short of the
    30 s between a preemption's notice and its end. lines_per_part: lines after which a part is left alone.
    """

    lines: float = 30.0
    events: float = 60.0
    spacing: float = 1.0
    retry: float = 1.0
    longest_retry: float = 60.0
    close: float = 20.0
    lines_per_part: int = 2000


class Source(Protocol):
    """What has something to upload. `period`: seconds between two times."""

    period: float

    def upload(self) -> Iterator[None]:
        """Brings the remote folder up to date, and does nothing where it is; yields after each write, where it may be
        left. Raises what the network raises, and is called again then.
        """
        ...


class Uploader:
    """Calls each source's `upload` every period, when asked, and at the close; tries again what failed, ever slower.

    report: called from the thread with one line when uploads begin to fail; not again before all have worked since.
    No method waits for the network, but `close`.
    """

    def __init__(self, sources: Sequence[Source], where: str, report: Callable[[str], None], pace: Pace):
        self._sources, self._where, self._report, self._pace = sources, where, report, pace
        self._condition = threading.Condition()
        self._due = {source: time.monotonic() + source.period for source in sources}
        self._deadline = math.inf  # finite once the run closes
        self._closing = False  # the thread has seen it
        self._complete = False
        self._thread = threading.Thread(target=self._run, name="metrics-upload", daemon=True)
        self._thread.start()

    def ask(self, source: Source) -> None:
        """Has a source uploaded soon; returns at once."""
        with self._condition:
            self._due[source] = 0.0
            self._condition.notify()

    def close(self) -> bool:
        """Uploads everything and ends the thread; whether all is up. Begins no write after `pace.close` seconds, and
        waits a quarter longer for one under way: Python aborts where its end meets a thread inside TensorFlow's gs://.
        """
        with self._condition:
            self._deadline = time.monotonic() + self._pace.close
            self._condition.notify()
        self._thread.join(1.25 * self._pace.close)
        return self._complete

    def _run(self) -> None:
        ready, wait, down, closing = 0.0, self._pace.retry, False, False
        while self._sleep(ready):
            if self._closing and not closing:
                closing, wait = True, self._pace.retry
            failure = self._upload()
            now = time.monotonic()
            if failure is None:
                if closing:
                    self._complete = True
                    return
                ready, wait, down = now + self._pace.spacing, self._pace.retry, False
                continue
            if not down and now < self._deadline:
                down = True
                self._say(failure)
            ready, wait = now + wait, min(2 * wait, self._pace.longest_retry)

    def _sleep(self, ready: float) -> bool:
        """Until a source is due, but not before `ready`; False if the time to close is over by then.

        The news that the run closes makes all due, and cuts a long wait short.
        """
        with self._condition:
            while True:
                now = time.monotonic()
                if self._deadline < math.inf and not self._closing:
                    self._closing, ready = True, min(ready, now + self._pace.spacing)
                until = ready if self._closing else max(ready, min(self._due.values()))
                if max(until, now) >= self._deadline:
                    return False
                if until <= now:
                    return True
                self._condition.wait(until - now)

    def _upload(self) -> Exception | None:
        """Uploads what is due; the first failure, if any. A source that failed stays due."""
        now = time.monotonic()
        with self._condition:
            due = [source for source in self._sources if self._closing or self._due[source] <= now]
            for source in due:
                self._due[source] = now + source.period
        failures = []
        for source in due:
            try:
                for _ in source.upload():
                    if time.monotonic() >= self._deadline:
                        raise TimeoutError(f"not done {self._pace.close:g} s after the run's end")
            except Exception as error:  # each kind of storage has its own
                failures.append(error)
                with self._condition:
                    self._due[source] = 0.0
        return failures[0] if failures else None

    def _say(self, failure: Exception) -> None:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:_LONGEST_REASON]
        # A console that is gone is no reason to stop uploading.
        with contextlib.suppress(OSError, ValueError):
            self._report(f"metrics don't reach {self._where}: {reason}; the run goes on, and they are sent again")
