"""The breakdown of a start adds up to the process's age."""

import subprocess
import sys
import time

import pytest

from palmjax.metrics import StartupClock, process_age


def test_phases_add_up_and_are_printed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StartupClock()
    assert clock._last == pytest.approx(time.perf_counter() - process_age(), abs=0.1)
    now = clock._last
    for phase, seconds in (("imports", 3.1), ("data", 0.4), ("compile", 4.9), ("step", 0.25), ("step", 0.25)):
        now += seconds
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        clock.mark(phase)
    assert clock.describe() == "first step after 8.9 s (imports 3.1, data 0.4, compile 4.9, step 0.5)"
    assert list(clock.seconds) == ["imports", "data", "compile", "step"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the age counts from the import")
def test_the_age_counts_from_the_process_and_not_from_the_import() -> None:
    program = "import time; time.sleep(0.5); from palmjax.metrics.startup import process_age; print(process_age())"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    outside = time.perf_counter() - started
    assert 0.5 <= float(result.stdout) <= outside + 0.05
