"""What a run does when asked: a ramp, microbatches, packing, a profile, TensorBoard, a SentencePiece vocabulary."""

from __future__ import annotations

import pytest

from palmjax import cli, provenance
from palmjax.checkpoint import read_info
from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def train(job, folder, *bindings: str) -> int:
    """In this process, which has 8 devices."""
    return cli.main(["train", *job.flags(folder, *bindings)])


def test_a_ramp_with_microbatches_packed_documents_profile_and_tensorboard(job, tmp_path):
    folder = tmp_path / "run"
    ramp = ("BATCH_SIZE=@BatchRamp()", "BatchRamp.stages=((0, 16), (3, 32))", "TrainConfig.microbatches=2")
    others = (
        "PACKING=@PackDocuments()",
        "TrainConfig.profile_steps=(1, 2)",
        "TrainConfig.tensorboard=True",
        "EVAL_PERIOD=2",
    )
    # A process of its own: this one may have loaded the TPU compiler, which jax's profiler does not survive.
    job.run(folder, *ramp, *others, "TRAIN_STEPS=6", "SaveCheckpointConfig.period=4", devices=8)
    rows = jobs.metrics(folder)
    assert [row["tokens"] for row in rows] == [16 * 64] * 3 + [32 * 64] * 3
    assert all(0 < row["weight"] <= row["tokens"] for row in rows)
    assert [row["step"] for row in jobs.metrics(folder, "eval")] == [2, 4, 6]
    assert list(folder.glob("profile/**/*.xplane.pb"))
    assert list(folder.glob("train/events.out.tfevents.*"))
    assert list(folder.glob("training_eval/text_files/events.out.tfevents.*"))
    info = read_info(folder / "checkpoint_4")
    assert info.data == provenance.DataPosition(first_row=3 * 16 + 32, fingerprint=info.data.fingerprint)


def test_a_finished_run_says_so_and_changes_nothing(job, undisturbed, capfd):
    before = (undisturbed / "metrics.jsonl").read_text()
    assert train(job, undisturbed) == 0
    assert "has all of TRAIN_STEPS = 40" in capfd.readouterr().err
    assert (undisturbed / "metrics.jsonl").read_text() == before


def test_a_sentencepiece_vocabulary_and_a_checkpoint_of_another_one(job, undisturbed, tmp_path, capfd):
    assert cli.main(["tokenizer", "--input", job.text, "--vocab_size", "300", "--output", str(tmp_path / "sp")]) == 0
    (model,) = (tmp_path / "sp").glob("*.model")
    own = (f"SENTENCEPIECE_MODEL={model}", "VOCAB_SIZE=320")
    folder = tmp_path / "run"
    assert train(job, folder, *own, "TRAIN_STEPS=2", "SaveCheckpointConfig.period=2") == 0
    capfd.readouterr()
    assert train(job, folder, "VOCAB_SIZE=320", "TRAIN_STEPS=4") == 2
    error = capfd.readouterr().err
    assert "another vocabulary" in error and "Traceback" not in error
    assert (folder / "checkpoint_2").is_dir()
