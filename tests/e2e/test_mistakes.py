"""What a user can get wrong ends in one or two lines, exit code 2, and nothing lost."""

from __future__ import annotations

import fcntl
import shutil

import pytest

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def error_of(text: str) -> str:
    """The error at the end of a console, which must be two lines at most and no traceback."""
    assert "Traceback" not in text, text[-3000:]
    error = text[text.index("error: ") :].strip()
    assert len(error.splitlines()) <= 2, error
    return error


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (["Decoder.num_layer=3"], ["Decoder.num_layer", "num_layers"]),
        (["TRAIN_STEP=3"], ["TRAIN_STEP", "TRAIN_STEPS"]),
        (["BATCH_SIZE='8'"], ["BATCH_SIZE", "'8'", "int"]),
        (["MIXTURE_OR_TASK_NAME='text_file'", "TextFiles.name='text_files'"], ["text_file", "text_files"]),
        (["TASK_FEATURE_LENGTHS={'targets': 100000000}"], ["100", "tokens"]),
        (["MeshConfig.tensor=3"], ["tensor=3", "2"]),
        (["Attention.num_heads=3", "MeshConfig.tensor=2"], ["heads", "3", "tensor=2"]),
        (["BATCH_SIZE=3"], ["batch", "3", "data=2"]),
        (["VOCAB_SIZE=100"], ["100", "VOCAB_SIZE"]),
        (["TrainConfig.microbatches=3"], ["16", "microbatches", "3"]),
        (["INITIAL_CHECKPOINT_PATH=/nowhere/checkpoint_3"], ["/nowhere/checkpoint_3"]),
        (["TRAIN_FILES=('/nowhere/*.txt',)"], ["/nowhere/*.txt"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) and "=" in value[0] else "",
)
def test_mistakes_in_the_configuration(job, undisturbed, tmp_path, bindings, words):
    text = job.run(tmp_path / "run", *bindings, devices=2, code=2)
    error = error_of(text)
    assert all(word in error for word in words), error


def test_a_misspelt_file_names_the_nearest(job, tmp_path):
    error = error_of(jobs.verb("train", "exp/palm_stdlob.gin", f"--gin.MODEL_DIR={tmp_path}", code=2))
    assert "palm_stdlob.gin" in error and "palm_stdlib.gin" in error


def test_a_binary_and_an_empty_file_are_refused_by_name(job, tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    error = error_of(job.run(tmp_path / "run", f"TRAIN_FILES=('{tmp_path}/binary.txt',)", code=2))
    assert "binary.txt" in error
    (tmp_path / "empty.txt").write_text("")
    error = error_of(job.run(tmp_path / "run", f"TRAIN_FILES=('{tmp_path}/empty.txt',)", code=2))
    assert "text_files" in error or "empty.txt" in error


def test_a_checkpoint_of_another_model_is_refused_and_kept(job, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    error = error_of(job.run(folder, "Decoder.d_model=32", "TRAIN_STEPS=41", code=2))
    assert ("another model" in error and "embedding" in error) or "kernel" in error or "scale" in error
    assert (folder / "checkpoint_40").is_dir()


def test_a_half_written_checkpoint_is_passed_over(job, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "checkpoint_40" / "commit_success.txt").unlink()
    (folder / "checkpoint_40" / "state" / "manifest.ocdbt").unlink()
    text = job.run(folder, "TRAIN_STEPS=36")
    assert f"from {folder}/checkpoint_35, step 35" in text


def test_a_second_run_in_the_same_folder_is_refused(job, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        file.write("pid 1 on elsewhere\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        error = error_of(job.run(folder, code=2))
    assert "another run" in error and "pid 1 on elsewhere" in error
