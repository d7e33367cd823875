"""Parts run here and in spawned processes: results, reports, errors and deaths."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from palmjax.config import ConfigError
from palmjax.data import workers

ROOT = Path(__file__).parents[2]
JOBS = """
import os, signal, sys, time
from palmjax.config import ConfigError
from palmjax.data import workers

def square(offset, part, report):
    report(part, 10)
    report(1, 0)
    return offset + part * part

def fail(part, report):
    raise ConfigError(f"part {part} is bad")

def die(part, report):
    os.kill(os.getpid(), signal.SIGKILL)

def sleep(folder, part, report):
    open(f"{folder}/{os.getpid()}", "w").close()
    time.sleep(600)

if __name__ == "__main__":
    import functools
    list(workers.each_part(functools.partial(sleep, sys.argv[1]), [0, 1], 2, print))
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module whose functions a spawned process can import."""
    (tmp_path / "worker_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("worker_jobs")
    del sys.modules["worker_jobs"]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_every_part_is_run_and_reported(jobs: ModuleType, num_workers: int) -> None:
    reports = []
    run = functools.partial(jobs.square, 100)
    parts = workers.each_part(run, [3, 5, 7], num_workers, lambda *counts: reports.append(counts))
    assert sorted(parts) == [109, 125, 149]
    assert sorted(reports) == [(1, 0)] * 3 + [(3, 10), (5, 10), (7, 10)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_is_raised_here(jobs: ModuleType, num_workers: int) -> None:
    with pytest.raises(ConfigError, match="part 4 is bad"):
        list(workers.each_part(jobs.fail, [4], num_workers, print))


def test_a_worker_that_dies_is_told(jobs: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"a tokenizing process died.*goes on from the parts that are finished"):
        list(workers.each_part(jobs.die, [0, 1], 2, print))


def test_workers_end_when_their_parent_is_killed(jobs: ModuleType, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    command = [sys.executable, str(tmp_path / "worker_jobs.py"), str(pids)]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_until(lambda: len(list(pids.iterdir())) == 2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(alive(int(file.name)) for file in pids.iterdir()))


def alive(pid: int) -> bool:
    """Running: neither gone nor a zombie that nobody has waited for."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
