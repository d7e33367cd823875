"""What a user can get wrong ends in one or two lines, exit code 2, and nothing lost."""

from __future__ import annotations

import fcntl
import shutil

import pytest

from palmjax import cli
from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def error_of(text: str) -> str:
    """The error at the end of a console, which must be two lines at most and no traceback."""
    assert "Traceback" not in text, text[-3000:]
    error = text[text.index("error: ") :].strip()
    assert len(error.splitlines()) <= 2, error
    return error


@pytest.fixture
def refused(capfd):
    """Runs a verb in this process, which has 8 devices, and returns its error; the exit code must be 2."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        return error_of(capfd.readouterr().err)

    return run


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (["Decoder.num_layer=3"], ["Decoder.num_layer", "num_layers"]),
        (["TRAIN_STEP=3"], ["TRAIN_STEP", "TRAIN_STEPS"]),
        (["BATCH_SIZE='8'"], ["BATCH_SIZE", "'8'", "int"]),
        (["MIXTURE_OR_TASK_NAME='text_file'", "TextFiles.name='text_files'"], ["text_file", "text_files"]),
        (["TASK_FEATURE_LENGTHS={'targets': 100000000}"], ["100", "tokens"]),
        (["MeshConfig.tensor=3"], ["tensor=3", "8"]),
        (["Attention.num_heads=3", "MeshConfig.tensor=2"], ["heads", "3", "tensor=2"]),
        (["BATCH_SIZE=3"], ["batch", "3", "data=8"]),
        (["VOCAB_SIZE=100"], ["100", "VOCAB_SIZE"]),
        (["TrainConfig.microbatches=3"], ["16", "microbatches", "3"]),
        (["TrainConfig.microbatches=4"], ["batch", "4", "data=8"]),
        (["INITIAL_CHECKPOINT_PATH=/nowhere/checkpoint_3"], ["/nowhere/checkpoint_3"]),
        (["TRAIN_FILES=('/nowhere/*.txt',)"], ["/nowhere/*.txt"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) and "=" in value[0] else "",
)
def test_mistakes_in_the_configuration(job, undisturbed, tmp_path, refused, bindings, words):
    error = refused("train", *job.flags(tmp_path / "run", *bindings))
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("run/checkpoint_*"))


def test_a_misspelt_file_names_the_nearest(refused, tmp_path):
    error = refused("train", "exp/palm_stdlob.gin", f"--gin.MODEL_DIR={tmp_path}")
    assert "palm_stdlob.gin" in error and "palm_stdlib.gin" in error


def test_a_binary_and_an_empty_file_are_refused_by_name(job, refused, tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    assert "binary.txt" in refused("train", *job.flags(tmp_path / "run", f"TRAIN_FILES=('{tmp_path}/binary.txt',)"))
    (tmp_path / "empty.txt").write_text("")
    error = refused("train", *job.flags(tmp_path / "run", f"TRAIN_FILES=('{tmp_path}/empty.txt',)"))
    assert "text_files" in error and "document" in error, error


def test_a_checkpoint_of_another_model_is_refused_and_kept(job, undisturbed, refused, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    error = refused("train", *job.flags(folder, "Decoder.d_model=32", "TRAIN_STEPS=41"))
    assert "another model" in error and "params/" in error and "64" in error and "32" in error
    assert (folder / "checkpoint_40").is_dir()


def test_a_run_that_begins_behind_its_last_step_is_refused(job, undisturbed, refused, tmp_path):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    error = refused("train", *job.flags(undisturbed, "TRAIN_STEPS=30"))
    assert "checkpoint_40, which is past TRAIN_STEPS = 30" in error
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
    error = refused("train", *job.flags(tmp_path / "run", f"INITIAL_CHECKPOINT_PATH={undisturbed}", "TRAIN_STEPS=40"))
    assert "step 40" in error and "set 1040" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_half_written_checkpoint_is_passed_over(job, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "checkpoint_40" / "commit_success.txt").unlink()
    (folder / "checkpoint_40" / "state" / "manifest.ocdbt").unlink()
    text = job.run(folder)
    assert f"from {folder}/checkpoint_35, step 35" in text
    assert "manifest.ocdbt is missing" in text or "commit_success.txt is missing" in text
    # Saved anew, whole, and to the same bits.
    jobs.assert_same_bits(jobs.final_state(folder, 40), jobs.final_state(undisturbed, 40))


def test_a_second_run_in_the_same_folder_is_refused(job, refused, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        file.write("pid 1 on elsewhere\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        error = refused("train", *job.flags(folder))
    assert "another run" in error and "pid 1 on elsewhere" in error
