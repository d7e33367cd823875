"""The watchdog: what is a hang, and what only looks like one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from palmjax import watchdog
from palmjax.config import ConfigError, WatchdogConfig
from palmjax.watchdog import EXIT_HANG, Watchdog


class Watched:
    """A watchdog of short naps whose end is noted instead of ending this process."""

    def __init__(self, folder: Path, **config: float):
        self.codes: list[int] = []
        self.events: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.dog = Watchdog(
            WatchdogConfig(**{"factor": 5.0, "least_seconds": 0.3, "other_seconds": 60.0, **config}),
            folder,
            tell=lambda name, **values: self.events.append({"event": name, **values}),
            leave=self._leave,
        )

    def _leave(self, code: int) -> None:
        self.codes.append(code)
        self.left.set()


@pytest.fixture(autouse=True)
def short_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "NAP_SECONDS", 0.02)


def run_steps(dog: Watchdog, first: int, count: int, seconds: float = 0.01) -> None:
    for step in range(first, first + count):
        time.sleep(seconds)
        dog.step_ended(step)


def test_a_hang_leaves_stacks_an_event_and_its_own_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    watched = Watched(tmp_path)
    with watched.dog as dog:
        run_steps(dog, 1, 20)
        assert 0.3 <= dog.bound < 3 and not watched.codes
        assert watched.left.wait(30)
    assert watched.codes == [EXIT_HANG]
    (event,) = watched.events
    assert event["event"] == "hang" and event["phase"] == "steps" and event["after"] == 20 and "step" not in event
    assert event["seconds"] > event["bound"] == pytest.approx(0.3, rel=5)
    (stacks,) = tmp_path.glob("hang-*-process-0.txt")
    assert "test_a_hang_leaves_stacks" in stacks.read_text() and str(stacks) == event["stacks"]
    assert "error: no step has ended for" in (said := capfd.readouterr().err) and "Thread 0x" in said


def test_slow_steps_make_the_bound_longer(tmp_path: Path) -> None:
    watched = Watched(tmp_path, least_seconds=0.01, factor=20)
    with watched.dog as dog:
        run_steps(dog, 1, 12, 0.02)
        assert dog.bound >= 0.4
        time.sleep(0.2)  # ten of them
        assert not watched.codes


@pytest.mark.parametrize("phase", ["evaluation", "save"])
def test_what_is_no_step_has_a_bound_of_its_own(tmp_path: Path, phase: str) -> None:
    watched = Watched(tmp_path, least_seconds=0.1)
    with watched.dog as dog:
        run_steps(dog, 1, 10)
        with dog.phase(phase):
            time.sleep(0.6)
        run_steps(dog, 11, 10)
        assert not watched.codes and dog.bound < 1  # its time is in no median
    slow = Watched(tmp_path, other_seconds=0.2)
    with slow.dog as dog:
        run_steps(dog, 1, 10)
        with dog.phase(phase):
            assert slow.left.wait(30)
    assert slow.events[0]["phase"] == phase


def test_a_start_that_takes_long_is_bounded_too(tmp_path: Path) -> None:
    watched = Watched(tmp_path, other_seconds=0.2)
    with watched.dog:
        assert watched.left.wait(30)
    assert watched.events[0]["phase"] == "start" and watched.events[0]["after"] == 0


def test_clocks_that_jump_are_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock is read for a file's name only; one nap during which hours passed is still one nap."""
    watched, jump = Watched(tmp_path), [0.0]
    real, wall = time.monotonic, time.time
    monkeypatch.setattr(time, "monotonic", lambda: real() + jump[0])
    monkeypatch.setattr(time, "time", lambda: wall() - 10 * jump[0])
    with watched.dog as dog:
        run_steps(dog, 1, 10)
        for hours in (1, 5, 24):
            jump[0] = hours * 3600.0
            time.sleep(0.1)
            dog.step_ended(10 + hours)
        run_steps(dog, 50, 100, 0.001)
        assert not watched.codes


def test_none_watches_nothing_and_nonsense_is_refused(tmp_path: Path) -> None:
    with Watchdog(None, tmp_path) as dog, dog.phase("save"):
        dog.step_ended(1)
        dog.step_ended(2)
    assert not [t for t in threading.enumerate() if t.name == "palmjax-watchdog"]
    for wrong in ({"factor": 1.0}, {"least_seconds": 0.0}, {"other_seconds": -1.0}):
        with pytest.raises(ConfigError, match=f"WatchdogConfig.{next(iter(wrong))}"):
            WatchdogConfig(**wrong)
