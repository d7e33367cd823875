"""What to do when a run is asked to stop: finish the step, save, and leave with a code that says `run me again`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import jax

from palmjax.guard import notice

EXIT_PREEMPTED = 75
"""Exit code of a run that was asked to stop and saved first (EX_TEMPFAIL): run the same command again."""


class Preemption:
    """Notices SIGTERM and what a cloud announces of this machine (`notice`), and lets all processes of a job stop after
    the same step. A context manager, for the main thread. why: in words, once this process knows.

    One process: a second SIGTERM ends it at once, as it would have without this. Several: JAX's preemption service has
    taken SIGTERM already (`jax.distributed.initialize`); whichever process gets it, they agree on a step that none has
    passed.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None
        self._installed = False
        self._notice: notice.Notice | None = None
        self.why = "asked to stop"

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        if host := notice.server():
            self._notice = notice.Notice(host, self._announced, lambda text: print(text, file=sys.stderr))
        return self

    def __exit__(self, *_: object) -> None:
        if self._notice is not None:
            self._notice.close()
        if self._installed:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked, self.why = True, "SIGTERM"
        self._restore()

    def _announced(self, why: str) -> None:
        """In the notice's thread."""
        self.why = why
        if jax.process_count() == 1:
            self._asked = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's service takes it, and tells the other processes

    def _restore(self) -> None:
        # None: the handler was not set from Python, and Python can't set it again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
        self._installed = False

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`. Every process calls it after every step, with rising numbers; 12 us a call."""
        if not self._asked and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # True at one step only; asked is asked, also where that step's verdict had to come first.
            self._asked = multihost_utils.reached_preemption_sync_point(step)
        return self._asked
