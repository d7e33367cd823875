"""Real processes on this machine: checkpoints cross process counts, and a lost process stops the others in words."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from launch import command
from palmjax import distributed, guard, model_dir
from palmjax.checkpoint import inspect
from palmjax.config import ConfigError
from palmjax.files import EXIT_STORAGE

WORKER = Path(__file__).parent / "distributed_worker.py"
pytestmark = pytest.mark.e2e


@dataclasses.dataclass
class Ended:
    """How a process ended: its exit code (-9: killed), what it said, and seconds from the first end to its own."""

    code: int
    out: str
    err: str
    after: float


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launch(folder: Path, processes: int, devices: int, *options: str) -> list[subprocess.Popen[str]]:
    """Starts the job's processes, each with `devices` virtual devices."""
    port = free_port()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    flags = [f"--coordinator_address=localhost:{port}", f"--process_count={processes}"] if processes > 1 else []
    started = []
    for i in range(processes):
        command = [sys.executable, str(WORKER), str(folder), *flags, *options]
        command += [f"--process_index={i}"] if processes > 1 else []
        # Files, not pipes, take what they say: nothing waits for a reader, and a witness outlives its process.
        with (folder / f"out.{i}").open("w") as out, (folder / f"err.{i}").open("w") as err:
            started.append(subprocess.Popen(command, env=env, text=True, stdout=out, stderr=err))
    return started


def finish(folder: Path, started: list[subprocess.Popen[str]], seconds: float = 90) -> list[Ended]:
    """Waits for all; what still runs after `seconds` is killed and counts as code 999."""
    deadline, ends = time.monotonic() + seconds, {}
    while len(ends) < len(started) and time.monotonic() < deadline:
        ends |= {i: time.monotonic() for i, p in enumerate(started) if i not in ends and p.poll() is not None}
        time.sleep(0.02)
    for p in started:
        if p.poll() is None:
            p.kill()
            p.wait()
    time.sleep(0.3)  # the witnesses' last words
    first = min(ends.values(), default=0.0)
    said = [(folder / f"{what}.{i}").read_text() for i in range(len(started)) for what in ("out", "err")]
    return [
        Ended(p.returncode if i in ends else 999, said[2 * i], said[2 * i + 1], ends.get(i, deadline) - first)
        for i, p in enumerate(started)
    ]


def job(folder: Path, processes: int, devices: int, *options: str) -> list[Ended]:
    return finish(folder, launch(folder, processes, devices, *options))


@pytest.mark.slow
def test_checkpoints_cross_process_counts(tmp_path: Path) -> None:
    """2 processes of 2 devices save, 1 of 4 restores and saves, 2 restore; each compares every parameter's bits."""
    two = job(tmp_path, 2, 2, "--steps=10")
    assert [e.code for e in two] == [0, 0], two
    one = job(tmp_path, 1, 4, "--steps=20")
    assert one[0].code == 0 and f"from {tmp_path}/checkpoint_10 step 10" in one[0].out, one
    again = job(tmp_path, 2, 1, "--steps=30")
    assert [e.code for e in again] == [0, 0] and "checkpoint_20 step 20" in again[1].out, again
    assert sorted(p.name for p in tmp_path.glob("checkpoint_*")) == ["checkpoint_20", "checkpoint_30"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_other_with_a_message(tmp_path: Path, victim: int) -> None:
    """Killed in the middle of steps, the coordinator and a worker; the restarted job goes on from the checkpoint."""
    ends = job(tmp_path, 2, 2, "--steps=100000", "--event=kill", f"--victim={victim}", "--heartbeat=5")
    lost, other = ends[victim], ends[1 - victim]
    assert lost.code == -signal.SIGKILL
    assert other.code not in (0, 999) and other.after < 60, other
    last = other.err.strip().splitlines()[-2:]
    assert last[0].startswith(f"error: process {1 - victim} of 2") and "was lost" in last[0], other.err
    assert last[1] == "Run the job again; it goes on from checkpoint_10."
    assert f"error: process {victim} of 2" in lost.err and "was killed" in lost.err
    again = job(tmp_path, 2, 2, "--steps=20")
    assert [e.code for e in again] == [0, 0] and "checkpoint_10 step 10" in again[0].out, again


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_is_noticed_by_its_missing_heartbeat(tmp_path: Path, victim: int) -> None:
    """No connection closes and the collective just waits: what a lost TPU host looks like to the others."""
    started = launch(tmp_path, 2, 1, "--steps=100000", "--event=freeze", f"--victim={victim}", "--heartbeat=5")
    other = started[1 - victim]
    begun = time.monotonic()
    while other.poll() is None and time.monotonic() - begun < 60:
        time.sleep(0.05)
    started[victim].kill()
    ends = finish(tmp_path, started)[1 - victim]
    assert ends.code not in (0, 999, -signal.SIGKILL), ends
    last = ends.err.strip().splitlines()[-2:]
    assert f"process {1 - victim} of 2" in last[0] and "another process was lost" in last[0], ends.err
    assert "checkpoint_10" in last[1]


@pytest.mark.parametrize(("event", "code", "said"), [("config-error", 2, "x.gin has no key Y"), ("bug", 1, "KeyError")])
def test_an_error_in_one_process_ends_all_with_its_own_message(
    tmp_path: Path, event: str, code: int, said: str
) -> None:
    ends = job(tmp_path, 2, 1, "--steps=100000", f"--event={event}", "--victim=1")
    assert ends[1].code == code and said in ends[1].err, ends[1]
    assert "was lost" not in ends[1].err
    assert ends[0].after < 60, ends[0]
    if event == "bug":
        assert ends[0].code not in (0, 999) and "lost" in ends[0].err, ends[0]
    else:
        assert (
            ends[0].code == code and f"error: process 0 of 2 stops, as process 1 ended: the file {said}" in ends[0].err
        )


def test_a_disk_that_is_full_for_one_process_ends_all_of_them_for_that_reason(tmp_path: Path) -> None:
    """Its own words go to a file on that disk, and are lost; the other says them."""
    ends = job(tmp_path, 2, 2, "--steps=100000", "--event=full-disk", "--victim=1")
    assert [e.code for e in ends] == [EXIT_STORAGE] * 2 and ends[0].after < 20, ends
    (last,) = [line for line in ends[0].err.splitlines() if line.startswith("error: ")]
    words = f"process 0 of 2 stops, as process 1 ended: {tmp_path}: checkpoint_20 could not be written: "
    assert last.startswith(f"error: {words}"), last
    assert last.endswith("; checkpoint_10 is whole; a new run goes on from it"), last
    assert model_dir.steps(tmp_path) == [10] and not inspect.verify(str(tmp_path / "checkpoint_10")).problems


def test_a_process_that_means_something_else_says_in_what(tmp_path: Path) -> None:
    ends = job(tmp_path, 2, 1, "--event=agree", "--victim=1")
    assert ends[1].code == 2 and "agreed on code" in ends[1].out and "agreed on data" not in ends[1].out, ends[1]
    differ = "process 1 has other data than process 0: start all processes of a job "
    differ += "with the same command, code and shared folders"
    assert ends[1].err.strip().splitlines()[-1] == f"error: process 1 of 2: {differ}"
    assert ends[0].code == 2 and differ in ends[0].err, ends[0]


def test_processes_that_mean_the_same_agree(tmp_path: Path) -> None:
    ends = job(tmp_path, 2, 1, "--event=agree", "--victim=-1")
    assert [(e.code, e.out.splitlines()[-2:]) for e in ends] == [(0, ["agreed on code", "agreed on data"])] * 2, ends


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_the_same_step_everywhere_and_asks_to_be_run_again(tmp_path: Path, processes: int) -> None:
    victim = processes - 1
    ends = job(tmp_path, processes, 1, "--steps=100000", "--period=100000", "--event=terminate", f"--victim={victim}")
    assert [e.code for e in ends] == [guard.EXIT_PREEMPTED] * processes, ends
    stops = {e.out.strip().splitlines()[-1] for e in ends}
    assert len(stops) == 1
    step = int(stops.pop().removeprefix("preempted at "))
    assert [p.name for p in tmp_path.glob("checkpoint_*")] == [f"checkpoint_{step}"]
    again = job(tmp_path, processes, 1, f"--steps={step + 2}")
    assert all(e.code == 0 and f"step {step}" in e.out for e in again), again


def test_a_model_dir_is_for_one_run(tmp_path: Path) -> None:
    first = launch(tmp_path, 1, 1, "--steps=100000", "--period=5")
    while not list(tmp_path.glob("checkpoint_*[0-9]")):
        assert first[0].poll() is None
        time.sleep(0.05)
    (tmp_path / "second").mkdir()
    second = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 2
    assert f"another run is using {tmp_path}: pid {first[0].pid} on {socket.gethostname()}" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1, second.stderr
    first[0].kill()
    first[0].wait()
    assert job(tmp_path, 1, 1, "--steps=1")[0].code == 0, "the lock outlived its holder"


def test_processes_that_do_not_find_each_other_say_so(tmp_path: Path) -> None:
    options = [f"--coordinator_address=localhost:{free_port()}", "--process_count=2", "--process_index=1"]
    run = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), *options, "--initialization_timeout=3"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode != 0, run
    assert "error: process 1 of 2 did not find the others at localhost:" in run.stderr.strip().splitlines()[-1]


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        options = [
            f"--coordinator_address=localhost:{taken.getsockname()[1]}",
            "--process_count=2",
            "--process_index=0",
        ]
        run = subprocess.run(
            [sys.executable, str(WORKER), str(tmp_path), *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert run.returncode == distributed.EXIT_PEER_LOST, "the attempt before may still be ending"
    assert run.stderr.startswith("error: --coordinator_address: process 0 can't listen on port"), run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


# --- without processes --------------------------------------------------------------------------------------------


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--process_count=2"], "need --coordinator_address and --process_index too"),
        (["--coordinator_address=h:1", "--process_count=2", "--process_index=2"], "--process_index=2 is not one of"),
        (["--coordinator_address=h", "--process_count=2", "--process_index=1"], "is not HOST:PORT"),
    ],
)
def test_flags_that_contradict_each_other(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        distributed.is_wanted(parse(*flags))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), distributed.EXIT_PEER_LOST),
        (ValueError("coordinator_address should be defined."), 2),
    ],
)
def test_what_waiting_may_mend_is_tried_again(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the backend of other tests
    with pytest.raises(ConfigError, match=str(error)) as caught:
        distributed._join(parse("--coordinator_address=h:1", "--process_count=2", "--process_index=1"))
    assert caught.value.exit_code == code and (code in command.FINAL) == (code == 2)


def test_no_flags_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(distributed.AUTO, raising=False)
    with distributed.session(parse()):
        pass
    with pytest.raises(KeyError), distributed.session(parse()):
        raise KeyError("goes through")


def test_one_process_agrees_with_itself() -> None:
    distributed.agree("data", "any")


def test_an_error_of_ours_is_not_taken_for_a_lost_process() -> None:
    assert distributed.explain(ValueError("the mesh does not divide the devices")) is None
    assert distributed.explain(KeyError("Socket closed")) is None
    try:
        try:
            raise TimeoutError("Barrier failed")
        except TimeoutError as error:
            raise ValueError("while flushing") from error
    except ValueError as error:
        assert "another process was lost (Barrier failed)" in (distributed.explain(error) or "")
