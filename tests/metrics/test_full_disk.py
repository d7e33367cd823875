"""A real file system that fills up under a recorder: one line says so, and the next process goes on from what it
has.
"""

from __future__ import annotations

import io
from pathlib import Path

import jax.numpy as jnp
import pytest

from palmjax.config import ConfigError
from palmjax.metrics import Recorder, Throughput, read_metrics

THROUGHPUT = Throughput(model_flops=1e6, hardware_flops=1e6, peak_flops=1e12, devices=1)


def run(folder: Path, stream: io.StringIO, start_step: int, steps: int) -> None:
    with Recorder(
        str(folder), THROUGHPUT, total_steps=10**6, start_step=start_step, log_period=1, stream=stream
    ) as recorder:
        for step in range(start_step + 1, start_step + steps + 1):
            recorder.record(step, {"loss": jnp.float32(1.0)}, tokens=10)


def test_metrics_on_a_full_disk_end_the_run_with_one_line_and_a_new_run_goes_on(small_disk: Path) -> None:
    ballast, folder, stream = small_disk / "ballast", small_disk / "run", io.StringIO()
    ballast.write_bytes(bytes(200 * 1024))
    with pytest.raises(ConfigError) as caught:
        run(folder, stream, 0, 10_000)
    reason = "No space left on device; free space and run the same command again"
    assert str(caught.value) == f"{folder}/metrics.jsonl can't be written: {reason}"
    with pytest.raises(ConfigError, match="No space left on device"):
        run(folder, io.StringIO(), 10, 1)  # while it is full, a new run can't even rewrite the file
    ballast.unlink()
    whole = [line["step"] for line in read_metrics(folder) if line["kind"] == "train"]
    assert len(whole) > 10 and whole == list(range(1, len(whole) + 1))
    run(folder, io.StringIO(), 10, 5)
    assert [line["step"] for line in read_metrics(folder) if line["kind"] == "train"] == list(range(1, 16))


def test_tensorboard_on_a_full_disk_is_one_message_and_the_run_goes_on(small_disk: Path, tmp_path: Path) -> None:
    folder, stream = tmp_path / "run", io.StringIO()
    folder.mkdir()
    (folder / "train").symlink_to(small_disk)
    (small_disk / "ballast").write_bytes(bytes(240 * 1024))
    run(folder, stream, 0, 1000)
    said = [line for line in stream.getvalue().splitlines() if "TensorBoard" in line]
    reason = "No space left on device; the run goes on without them"
    assert said == [f"TensorBoard's files in {folder} can't be written: {reason}"]
    assert [line["step"] for line in read_metrics(folder) if line["kind"] == "train"] == list(range(1, 1001))
