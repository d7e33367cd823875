"""A hang is noticed: when no step ends in time, every thread's stack is written down and the process leaves.

A collective that waits for a lost chip, a file system that never answers, a deadlock: nothing fails, and nothing ends.
The watchdog is a thread that measures time in its own short naps and counts each for no more than it was meant to last.
So neither a wall clock that jumps nor a process that was stopped and goes on (SIGSTOP, a suspended machine, a debugger)
looks like a hang. What it can't notice is native code that holds the interpreter's lock: then no thread of it runs.

The event `hang` in metrics.jsonl: phase (steps, start, evaluation, ...), after (the last step that ended), seconds,
bound, stacks (the file). It has no `step`, so that it stays when the run goes on from an earlier checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from palmjax import distributed
from palmjax.config import WatchdogConfig

EXIT_HANG = 70
"""Exit code of a process that saw no step end in time (EX_SOFTWARE): run the same command again."""

NAP_SECONDS = 0.5
TELL_SECONDS = 10.0
_REMEMBERED = 101


class Watchdog:
    """Watches the main loop. A context manager; `config` None watches nothing.

    The loop says `step_ended` behind every step, and puts what is no step in `phase`. tell: writes the event; it is
    called in the watchdog's thread, for the last thing that the process does. leave: ends the process.
    """

    def __init__(
        self,
        config: WatchdogConfig | None,
        folder: Any,
        tell: Callable[..., None] = lambda *_, **__: None,
        leave: Callable[[int], None] = distributed.leave,
    ):
        self._config, self._folder, self.tell, self._leave = config, folder, tell, leave
        self._seconds: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()
        self._phase, self._bound = "start", config.other_seconds if config else 0.0
        self._quiet = 0.0
        self._last_step, self._ended_at = 0, 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._config is not None:
            self._thread = threading.Thread(target=self._watch, name="palmjax-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def step_ended(self, step: int) -> None:
        """A step has ended: its metrics are known. A microsecond."""
        now = time.monotonic()
        with self._lock:
            if self._phase == "steps" and self._quiet < self._bound:
                self._seconds.append(now - self._ended_at)
            self._last_step, self._ended_at, self._phase = step, now, "steps"
            self._bound, self._quiet = self.bound, 0.0

    @property
    def bound(self) -> float:
        """Seconds that a step may take: `factor` times the median of those before, but never less than `least_seconds`;
        `other_seconds` until there are a few to take a median of.
        """
        assert self._config is not None or not self._seconds
        if self._config is None or len(self._seconds) < 5:
            return 0.0 if self._config is None else self._config.other_seconds
        return max(self._config.least_seconds, self._config.factor * statistics.median(self._seconds))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what is no step: an evaluation, a save, a compilation. It may last `other_seconds`."""
        if self._config is None:
            yield
            return
        with self._lock:
            before, bound = self._phase, self._bound
            self._phase, self._bound, self._quiet = name, self._config.other_seconds, 0.0
        try:
            yield
        finally:
            with self._lock:
                # What comes first behind it is no step's time alone, so that it doesn't enter the median.
                self._phase, self._bound, self._quiet = before, bound, 0.0
                self._ended_at = time.monotonic()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(NAP_SECONDS):
            now = time.monotonic()
            # A nap that took longer than it should is no time in which the main thread could have worked.
            nap, before = min(now - before, 2 * NAP_SECONDS), now
            with self._lock:
                self._quiet += nap
                quiet, bound, phase = self._quiet, self._bound, self._phase
            if quiet > bound:
                self._end(phase, quiet, bound)
                return

    def _end(self, phase: str, quiet: float, bound: float) -> None:
        index = jax.process_index() if jax.distributed.is_initialized() else 0
        name = f"hang-{time.strftime('%Y%m%d-%H%M%S')}-process-{index}.txt"
        folder = Path(self._folder) if "://" not in str(self._folder) else Path.cwd()
        seen = f"no step has ended for {quiet:.0f} s" if phase == "steps" else f"{phase} has taken {quiet:.0f} s"
        what = f"{seen}, more than {bound:.0f} s"
        with contextlib.suppress(OSError), (folder / name).open("w") as file:  # a full disk must not keep it here
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        print(
            f"error: {what} (the last was step {self._last_step}); stacks are above and in {folder / name}\n"
            f"exit code {EXIT_HANG}: run the same command again, it goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        values = {"phase": phase, "after": self._last_step, "seconds": quiet, "bound": bound}
        # Aside: what hangs may be the very files that the event goes to.
        telling = threading.Thread(
            target=self.tell, args=("hang",), kwargs={**values, "stacks": str(folder / name)}, daemon=True
        )
        telling.start()
        telling.join(TELL_SECONDS)
        self._leave(EXIT_HANG)
