"""Several real jax.distributed processes on this machine.

    python -m launch.local --processes 2 --devices 4 -- train gin/exp/palm_stdlib.gin --gin.MODEL_DIR=runs/two

Each process has its own virtual CPU devices; collectives between processes go over gloo. Every line that a process
prints is prefixed with its index. SIGTERM and SIGINT go to all. The exit code is that of the first process that failed.

`--max_restarts N` starts the job again, up to N times, after every end but a good one, a mistake in the command or
configuration (exit code 2), a stop by the run's own guard (65) and one that was asked for here (SIGTERM, Ctrl-C): a
preemption, a lost process, a hang, a crash. It goes on from its newest whole checkpoint. The processes find in
PALMJAX_RESTARTS how often, and in PALMJAX_LAST_EXIT why, for the run's records.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

from launch import command

GRACE_SECONDS = 60
"""After one process has failed, the others have this long to leave by themselves."""
KILL_SECONDS = 10
"""From SIGTERM to SIGKILL for those that did not."""
RESTART_SECONDS = (1.0, 60.0)
"""The pause before a restart: the first, doubled while the job ends within a minute, and the longest."""


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def commands(arguments: Sequence[str], processes: int, port: int) -> list[list[str]]:
    """Each process's command line. A single process needs no coordinator."""
    base = command.palmjax(arguments, sys.executable)
    if processes == 1:
        return [base]
    job = [f"--coordinator_address=localhost:{port}", f"--process_count={processes}"]
    return [[*base, *job, f"--process_index={i}"] for i in range(processes)]


def environment(devices: int, platform: str) -> dict[str, str]:
    """What is added to each process's environment."""
    added = {"JAX_PLATFORMS": platform, "PYTHONUNBUFFERED": "1"}
    return added | ({"JAX_NUM_CPU_DEVICES": str(devices)} if platform == "cpu" else {})


def _echo(source: IO[str], sink: IO[str], index: int, lock: threading.Lock) -> None:
    for line in source:
        with lock:
            sink.write(f"[{index}] {line if line.endswith(chr(10)) else line + chr(10)}")
            sink.flush()


def _as_exit_code(code: int) -> int:
    """A shell's number for an end by signal: 128 + signal."""
    return code if code >= 0 else 128 - code


def run_until_done(start: Callable[[dict[str, str], list[int]], int], max_restarts: int) -> int:
    """Calls `start` until it ends for good; returns its last exit code.

    start: gets what to add to the environment and a list to which it adds the signals that asked for the end.
    """
    added: dict[str, str] = {}
    asked: list[int] = []
    pause, restarts = RESTART_SECONDS[0], 0
    while True:
        began = time.monotonic()
        code = start(added, asked)
        if asked or code in command.FINAL or restarts == max_restarts:
            return code
        pause = RESTART_SECONDS[0] if time.monotonic() - began > 60 else pause
        print(f"exit code {code}: restart {restarts + 1} of {max_restarts} in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)
        pause, restarts = min(2 * pause, RESTART_SECONDS[1]), restarts + 1
        added = {"PALMJAX_RESTARTS": str(restarts), "PALMJAX_LAST_EXIT": str(code)}


def supervise(lines: Sequence[Sequence[str]], added: dict[str, str], asked: list[int] | None = None) -> int:
    """Runs the processes to their end. Returns 0, or the exit code of the first that failed.

    asked: gets the signals that were forwarded.
    """
    noted: list[int] = [] if asked is None else asked
    # Before the first process, and only noted: `_wait` forwards, so that none that is still being started misses one.
    before = {number: signal.signal(number, lambda n, _: noted.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    lock = threading.Lock()
    try:
        # Groups of their own: Ctrl-C reaches them once, forwarded from here.
        processes = [
            subprocess.Popen(
                line,
                env=os.environ | added,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                process_group=0,
            )
            for line in lines
        ]
        echoes = [
            threading.Thread(target=_echo, args=(source, sink, i, lock), daemon=True)
            for i, process in enumerate(processes)
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for echo in echoes:
            echo.start()
        code = _wait(processes, noted)
        for echo in echoes:
            echo.join(5)  # a child that it left behind may hold the pipe open
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _send(processes: Sequence[subprocess.Popen[str]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _wait(processes: Sequence[subprocess.Popen[str]], asked: Sequence[int]) -> int:
    """asked: grows with the signals to forward."""
    first, failed_at, told, forwarded = 0, 0.0, 0, 0
    ended: set[int] = set()
    while len(ended) < len(processes):
        for number in asked[forwarded:]:
            _send(processes, number)
            forwarded += 1
        for i, process in enumerate(processes):
            if i not in ended and (code := process.poll()) is not None:
                ended.add(i)
                if code and not first:
                    first, failed_at = _as_exit_code(code), time.monotonic()
                    if len(ended) < len(processes):
                        print(f"process {i} ended with exit code {first}; waiting for the others", file=sys.stderr)
        since = time.monotonic() - failed_at if first else 0.0
        for rank, (number, after) in enumerate(
            [(signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS + KILL_SECONDS)], start=1
        ):
            if since > after and told < rank:
                told = rank
                print(f"still running after {after} s: sending {number.name}", file=sys.stderr)
                _send(processes, number)
        time.sleep(0.05)
    return first


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the first process that failed; 75 means: saved, run the same command again."""
    parser = argparse.ArgumentParser(prog="python -m launch.local", description="Several processes on this machine.")
    parser.add_argument("--processes", type=int, default=2, help="processes to start (2)")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of each process (1)")
    parser.add_argument("--platform", default="cpu", help="JAX_PLATFORMS of the processes (cpu)")
    parser.add_argument("--port", type=int, help="the coordinator's port (a free one)")
    command.add_max_restarts(parser, 0)
    options, arguments = command.parse(parser, argv)
    if options.processes < 1 or options.devices < 1:
        parser.error("--processes and --devices are at least 1")

    def lines() -> list[list[str]]:
        # A free port each time: the last job's may still be closing.
        return commands(arguments, options.processes, options.port or free_port())

    added = environment(options.devices, options.platform)
    if options.dry_run:
        print("\n".join(command.as_shell(line, added) for line in lines()))
        return 0
    return run_until_done(lambda more, asked: supervise(lines(), added | more, asked), options.max_restarts)


if __name__ == "__main__":
    raise SystemExit(main())
