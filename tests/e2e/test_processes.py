"""Several real processes on one machine: the numbers of one process, and an end that says why when one is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
LAYOUT = ("MeshConfig.data=2", "MeshConfig.fsdp=4")


def launch(job: jobs.Job, model_dir, *bindings: str) -> subprocess.Popen[str]:
    """The job as two processes of four devices each, data parallel across them and sharded inside."""
    command = [sys.executable, "-m", "launch.local", "--processes", "2", "--devices", "4", "--", "train"]
    return subprocess.Popen(
        [*command, *job.flags(model_dir, *LAYOUT, *bindings)],
        cwd=jobs.ROOT,
        env={name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_see_the_data_and_compute_the_losses_of_one(job, undisturbed, tmp_path):
    folder = tmp_path / "run"
    jobs.finish(launch(job, folder, "TRAIN_STEPS=20"))
    want, got = jobs.losses(undisturbed), jobs.losses(folder)
    assert sorted(got) == list(range(1, 21))
    for step, loss in got.items():
        assert loss == pytest.approx(want[step], rel=1e-5), step
    # One process goes on with what two have saved.
    text = job.run(folder, "TRAIN_STEPS=22")
    assert f"from {folder}/checkpoint_20, step 20" in text
    assert jobs.losses(folder)[22] == pytest.approx(want[22], rel=1e-4)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_leaves_and_the_job_goes_on(job, undisturbed, tmp_path, victim):
    folder = tmp_path / "run"
    process = launch(job, folder, "TRAIN_STEPS=1000000", "SaveCheckpointConfig.period=5", "SaveCheckpointConfig.keep=2")
    jobs.wait_for_step(folder, 12, process)
    _find(process, victim).send_signal(signal.SIGKILL)
    began = time.monotonic()
    text, _ = process.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert process.returncode not in (0, None)
    assert re.search(r"error: .*process . of 2", text), text[-3000:]
    again = launch(job, folder, "TRAIN_STEPS=1000000", "SaveCheckpointConfig.period=5", "SaveCheckpointConfig.keep=2")
    before = max(jobs.losses(folder))
    jobs.wait_for_step(folder, before + 8, again)
    again.send_signal(signal.SIGTERM)
    text = jobs.finish(again, code=75)
    assert re.search(r"from \S+/checkpoint_\d+, step [1-9]", text), text[-3000:]
    for step, loss in jobs.losses(folder).items():
        if step <= 20:
            assert loss == pytest.approx(jobs.losses(undisturbed)[step], rel=1e-5), step


def _find(launcher: subprocess.Popen[str], index: int) -> psutil.Process:
    """The child of the launcher that is process `index` of the job."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if f"--process_index={index}" in child.cmdline():
            return child
    raise AssertionError(f"no process {index} below {launcher.pid}")
