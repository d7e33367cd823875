"""The breakdown of a process's start. Imports nothing but Python's own."""

from __future__ import annotations

import os
import time

_IMPORTED = time.perf_counter()


class StartupClock:
    """Where the time goes between the process's start and its first finished step.

    `mark("imports")`, `mark("data")`, `mark("compile")`, `mark("step")`: each closes the phase it names, so that the
    phases add up. `seconds` has them in order.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() - process_age()

    def mark(self, phase: str) -> None:
        """The phase ends now; a phase marked again adds to what it had."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """`first step after 8.9 s (imports 3.1, data 0.4, compile 4.9, step 0.5)`."""
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s ({phases})"


def process_age() -> float:
    """Seconds since this process started (Linux, to 10 ms); elsewhere since this module was imported."""
    imported = time.perf_counter() - _IMPORTED
    try:
        with open("/proc/self/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before may hold spaces
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), seconds after boot
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, imported)
    except (OSError, AttributeError):
        return imported
