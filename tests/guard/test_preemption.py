"""SIGTERM in one process: a flag, not an end; handlers are put back. Several processes: test_distributed.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from palmjax import guard

ROOT = Path(__file__).parents[2]


def test_sigterm_is_noticed_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with guard.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2) and preemption.reached(3)
        assert signal.getsignal(signal.SIGTERM) == before, "a second SIGTERM must end the process"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_handler_is_put_back_after_an_error_too() -> None:
    def mine(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with guard.Preemption():
            assert signal.getsignal(signal.SIGTERM) != mine
            raise KeyError
    except KeyError:
        assert signal.getsignal(signal.SIGTERM) == mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_ends_the_process() -> None:
    code = (
        "import time\nfrom palmjax import guard\n"
        "with guard.Preemption() as p:\n"
        "    print('ready', flush=True)\n"
        "    while not p.reached(0): time.sleep(0.01)\n"
        "    print('noticed', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noticed\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM


def test_asking_costs_nothing() -> None:
    with guard.Preemption() as preemption:
        begun = time.perf_counter()
        for step in range(1000):
            preemption.reached(step)
        assert time.perf_counter() - begun < 0.1
