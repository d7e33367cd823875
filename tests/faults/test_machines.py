"""What machines do to a run: they kill it, stop it, stall it, lose its files, fill its disk, change under it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import chaos
from palmjax import model_dir
from palmjax.checkpoint import inspect, seal
from palmjax.report.read import read
from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BRIEF = ("TRAIN_STEPS=12", "SaveCheckpointConfig.period=4")
ENDLESS = ("TRAIN_STEPS=1000000", "SaveCheckpointConfig.keep=2")
QUICK_DOG = (
    "TrainConfig.watchdog=@WatchdogConfig()",
    "WatchdogConfig.least_seconds=4",
    "WatchdogConfig.factor=10",
)


def events(folder: Path, name: str) -> list[dict]:
    return [row for row in jobs.metrics(folder, "event") if row["event"] == name]


def launch(job: jobs.Job, folder: Path, *bindings: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.local", *options, "--", "train", *job.flags(folder, *bindings)]
    env = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    return subprocess.Popen(
        command, cwd=jobs.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def worker(launcher: subprocess.Popen[str], index: int) -> psutil.Process:
    """The child of the launcher that is process `index` of the job."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        command = child.cmdline()
        if f"--process_index={index}" in command or (index == 0 and command[1:3] == ["-m", "palmjax"]):
            return child
    raise AssertionError(f"no process {index} below {launcher.pid}")


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> chaos.Job:
    """A job whose undisturbed run is in its folder's `calm`."""
    task = chaos.Job(tmp_path_factory.mktemp("chaos"), steps=200).prepare()
    assert task.start(task.folder / "calm").wait(300) == 0
    return task


def test_killed_again_and_again_it_ends_with_the_bits_of_the_undisturbed_run(calm: chaos.Job) -> None:
    """Six SIGKILLs, in steps, saves and start-up; `python -m benchmarks.chaos` does a hundred."""
    disturbed = calm.folder / "disturbed"
    out = chaos.disturb(calm, disturbed, kills=6, seed=5)
    assert sum(out.kills.values()) == 6 and out.lost == 0
    equal, arrays = chaos.compare(calm.folder / "calm", disturbed, calm.steps)
    assert equal == arrays > 20
    assert not [p.name for p in disturbed.glob("*checkpoint_*.*")], "leftovers of killed saves"


@pytest.mark.skipif(shutil.which("cc") is None, reason="the clock is written in C")
def test_a_wall_clock_that_jumps_changes_nothing_but_timestamps(calm: chaos.Job) -> None:
    chaos.jump(calm, calm.folder / "clock")
    equal, arrays = chaos.compare(calm.folder / "calm", calm.folder / "clock", calm.steps)
    assert equal == arrays > 20
    assert read(str(calm.folder / "clock")).goodput.wall < 1800, "half of what the clock was off by"


def test_the_launcher_starts_a_killed_and_a_preempted_job_again(job: jobs.Job, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launch(job, folder, "TRAIN_STEPS=150", options=("--processes=1", "--max-restarts=2"))
    jobs.wait_for_step(folder, 12, process)
    worker(process, 0).send_signal(signal.SIGTERM)  # to the one process, as a cloud's notice
    while not events(folder, "restart"):
        assert process.poll() is None
        time.sleep(0.05)
    began = events(folder, "restart")[-1]["step"]
    jobs.wait_for_step(folder, began + 12, process)
    worker(process, 0).send_signal(signal.SIGKILL)
    text = jobs.finish(process)
    restarts = [(row["attempt"], row["exit_code"]) for row in events(folder, "restart")]
    assert restarts == [(1, 75), (2, 137)] and "restart 2 of 2" in text
    assert sorted(jobs.losses(folder)) == list(range(1, 151))


# --- stalled ---------------------------------------------------------------------------------------------------------


def test_a_run_whose_data_stop_coming_leaves_its_stacks_and_goes_on_when_started_again(
    job: jobs.Job, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, str(jobs.ROOT / "tests/faults/hang.py"), "22", "0", "train"]
    run = subprocess.run(
        [*command, *job.flags(folder, "TRAIN_STEPS=30", *QUICK_DOG)],
        env=jobs.environment(),
        cwd=jobs.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 70, run.stderr[-2000:]
    assert "error: no step has ended for" in run.stderr and "hang.py" in run.stderr
    (event,) = events(folder, "hang")
    assert event["phase"] == "steps" and event["after"] == 21 and event["seconds"] < 60
    assert "__next__" in Path(event["stacks"]).read_text()
    job.run(folder, "TRAIN_STEPS=30")
    assert sorted(jobs.losses(folder)) == list(range(1, 31)) and events(folder, "hang") == [event]


def test_a_process_that_was_stopped_for_long_goes_on_and_is_no_hang(job: jobs.Job, tmp_path: Path) -> None:
    """SIGSTOP for longer than a step may take: no time passes for a watchdog that can't run either."""
    folder = tmp_path / "run"
    process = job.start(folder, *ENDLESS, *QUICK_DOG)
    jobs.wait_for_step(folder, 30, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(10)
    seen = max(jobs.losses(folder))
    process.send_signal(signal.SIGCONT)
    jobs.wait_for_step(folder, seen + 20, process)
    process.send_signal(signal.SIGTERM)
    jobs.finish(process, code=75)
    assert not events(folder, "hang")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brief(job: jobs.Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A brief run that nothing happened to."""
    folder = tmp_path_factory.mktemp("brief")
    job.run(folder, *BRIEF)
    return folder


def test_a_damaged_checkpoint_is_passed_over_by_a_real_run(job: jobs.Job, brief: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(brief, folder)
    shutil.rmtree(folder / "checkpoint_12")
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().replace('"done"', '"was done"'))
    name = max(seal.files(folder / "checkpoint_8"), key=lambda n: (folder / "checkpoint_8" / n).stat().st_size)
    data = bytearray((folder / "checkpoint_8" / name).read_bytes())
    data[len(data) // 3] ^= 16
    (folder / "checkpoint_8" / name).write_bytes(data)
    text = job.run(folder, *BRIEF)
    assert f"from {folder}/checkpoint_4, step 4" in text and "checkpoint_8 was passed over" in text
    (event,) = events(folder, "restore skipped")
    assert event["checkpoint"] == 8 and name in event["reason"] and Path(event["path"]).is_dir()
    assert model_dir.steps(folder) == [4, 8, 12] and jobs.losses(folder) == jobs.losses(brief)
    verify = jobs.verb("checkpoint", "verify", str(folder))
    assert verify.count("as it was saved") == 3
    changes, _ = inspect.diff(str(brief / "checkpoint_12"), str(folder / "checkpoint_12"))
    assert all(change.same for change in changes)
    assert jobs.verb("checkpoint", "verify", event["path"], code=1).count(name) == 1


def test_a_store_that_is_cut_under_a_running_job_is_never_read_as_something_else(
    job: jobs.Job, brief: Path, tmp_path: Path
) -> None:
    """What the job has in its cache is right and is used; what it must read anew is refused by name, as the next start
    does.
    """
    own, folder = jobs.Job(text=job.text, stores=str(tmp_path / "stores")), tmp_path / "run"
    shutil.copytree(job.stores, own.stores)
    process = own.start(folder, *BRIEF, "TRAIN_STEPS=1000000")
    jobs.wait_for_step(folder, 5, process)
    files = [p for p in Path(own.stores).rglob("*") if p.is_file() and "/tokens/c/" in str(p)]
    largest = max(files, key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    jobs.wait_for_step(folder, 12, process)
    process.send_signal(signal.SIGTERM)
    jobs.finish(process, code=75)
    text = job_error(own.run(folder, *BRIEF, "TRAIN_STEPS=1000001", code=2))
    assert "token store file" in text and "is damaged: it is shorter than" in text
    seen = jobs.losses(folder)
    assert all(seen[step] == loss for step, loss in jobs.losses(brief).items())


def job_error(console: str) -> str:
    """The one error of a console, which holds no traceback."""
    assert "Traceback" not in console
    (line,) = [line for line in console.splitlines() if line.startswith("error: ")]
    return line


def test_a_second_job_in_the_same_model_dir_is_refused_and_the_first_goes_on(job: jobs.Job, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = job.start(folder, *ENDLESS)
    jobs.wait_for_step(folder, 3, process)
    text = job.run(folder, *ENDLESS, code=2)
    assert f"another run is using {folder}: pid {process.pid}" in text
    assert "another run is using" in jobs.verb("checkpoint", "prune", str(folder), "--keep=1", code=2)
    jobs.wait_for_step(folder, max(jobs.losses(folder)) + 5, process)
    process.kill()
    process.wait()


# --- elastic ---------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_other_hosts_another_mesh_and_another_microbatch(job: jobs.Job, tmp_path: Path) -> None:
    """One process, then two of two devices sharded both ways, then one that splits its batch: the same batches in the
    same order, and losses within 1e-5 of the run that nobody touched. No dropout: its masks follow the microbatches.
    """
    calm, folder, plain = tmp_path / "calm", tmp_path / "run", ("DROPOUT_RATE=0.0", "SaveCheckpointConfig.period=5")
    job.run(calm, *plain, "TRAIN_STEPS=15")
    job.run(folder, *plain, "TRAIN_STEPS=5")
    mesh = ("MeshConfig.data=2", "MeshConfig.fsdp=2")
    jobs.finish(launch(job, folder, *plain, *mesh, "TRAIN_STEPS=10", options=("--processes=2", "--devices=2")))
    text = job.run(folder, *plain, "TRAIN_STEPS=15", "TrainConfig.microbatches=4")
    assert "microbatches: 1 -> 4" in text
    want, got = jobs.losses(calm), jobs.losses(folder)
    assert sorted(got) == list(range(1, 16))
    for step, loss in got.items():
        assert abs(loss - want[step]) < 1e-5, step
    infos = [json.loads((f / "checkpoint_15" / "info" / "metadata").read_text()) for f in (calm, folder)]
    assert infos[0]["data"] == infos[1]["data"] and not infos[0]["data"]["skips"]
    assert re.search(r"mesh.fsdp: 2 -> 1", text)
