"""A run that is killed goes on to the same bits: parameters, moments, keys and the data seen."""

from __future__ import annotations

import random
import shutil
import signal
import time

import numpy as np
import pytest

from palmjax.checkpoint import read_info
from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_undisturbed_run_leaves_what_a_user_looks_for(undisturbed):
    assert sorted(jobs.losses(undisturbed)) == list(range(1, 41))
    assert (undisturbed / "config.gin").read_text().count("TRAIN_STEPS") >= 1
    info = (undisturbed / "model-info.txt").read_text()
    assert "decoder/layers/mlp/wi_0/kernel" in info and "Total: " in info
    assert (undisturbed / "checkpoint_40").is_dir()
    first, last = (np.mean([jobs.losses(undisturbed)[i] for i in span]) for span in (range(1, 6), range(36, 41)))
    assert last < first - 1.0
    (evaluation,) = jobs.metrics(undisturbed, "eval")
    assert 0 < evaluation["bits_per_byte"] < 8


def test_killed_at_random_moments_it_ends_with_the_same_bits(job, undisturbed, tmp_path):
    rng, folder = random.Random(7), tmp_path / "run"
    for kill in range(3):
        process = job.start(folder)
        jobs.wait_for_step(folder, rng.randint(3, 11) + 11 * kill, process)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
    job.run(folder)
    assert jobs.losses(folder) == jobs.losses(undisturbed)
    jobs.assert_same_bits(jobs.final_state(folder, 40), jobs.final_state(undisturbed, 40))


def test_sigterm_saves_before_it_leaves(job, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = job.start(folder, "SaveCheckpointConfig.period=1000")
    jobs.wait_for_step(folder, 8, process)
    process.send_signal(signal.SIGTERM)
    text = jobs.finish(process, code=75)
    (saved,) = folder.glob("checkpoint_*")
    step = int(saved.name.removeprefix("checkpoint_"))
    assert 8 <= step < 40
    assert f"checkpoint_{step} is saved" in text
    assert max(jobs.losses(folder)) == step
    console = job.run(folder, "SaveCheckpointConfig.period=1000")
    assert f"from {saved}, step {step}" in console
    assert jobs.losses(folder) == jobs.losses(undisturbed)
    jobs.assert_same_bits(jobs.final_state(folder, 40), jobs.final_state(undisturbed, 40))


def test_another_mesh_goes_on_with_the_same_data(job, undisturbed, tmp_path):
    """Without dropout, whose masks are drawn for each layout alike, losses agree to float32 rounding."""
    folder = tmp_path / "run"
    job.run(folder, "TRAIN_STEPS=10")
    text = job.run(folder, "MeshConfig.data=2", "MeshConfig.fsdp=2", "MeshConfig.tensor=2", devices=8)
    assert "train.steps: 10 -> 40" in text and "mesh.fsdp: 1 -> 2" in text
    want, got = jobs.losses(undisturbed), jobs.losses(folder)
    for step in range(1, 41):
        assert got[step] == pytest.approx(want[step], rel=1e-5 if step < 20 else 1e-3), step


def test_other_data_is_refused_and_another_batch_size_goes_on_at_the_same_row(job, undisturbed, tmp_path):
    folder = tmp_path / "run"
    job.run(folder, "TRAIN_STEPS=10")
    error = job.run(folder, "RANDOM_SEED=1", code=2)
    assert "other data: train_dataset.seed: 0 -> 1\n" in error and "INITIAL_CHECKPOINT_PATH" in error
    job.run(folder, "BATCH_SIZE=32", "TRAIN_STEPS=12", "SaveCheckpointConfig.period=12")
    assert read_info(folder / "checkpoint_12").data.first_row == 10 * 16 + 2 * 32
    two_steps = np.mean([jobs.losses(undisturbed)[step] for step in (11, 12)])
    assert jobs.losses(folder)[11] == pytest.approx(two_steps, abs=0.2)


def test_a_run_that_died_before_its_last_evaluation_makes_up_for_it(job, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(r for r in rows if '"eval"' not in r and '"done"' not in r))
    job.run(folder)
    (again,), (first,) = (jobs.metrics(f, "eval") for f in (folder, undisturbed))
    assert again["bits_per_byte"] == first["bits_per_byte"]
    assert jobs.losses(folder) == jobs.losses(undisturbed)


def test_an_initial_checkpoint_gives_parameters_and_step_but_no_moments(job, undisturbed, tmp_path):
    folder = tmp_path / "run"
    text = job.run(folder, f"INITIAL_CHECKPOINT_PATH={undisturbed}/checkpoint_20", "TRAIN_STEPS=22")
    assert f"from {undisturbed}/checkpoint_20, step 20" in text
    assert sorted(jobs.losses(folder)) == [21, 22]
    assert jobs.losses(folder)[21] == pytest.approx(jobs.losses(undisturbed)[21], rel=1e-5)
    assert jobs.losses(folder)[22] != jobs.losses(undisturbed)[22]
