"""The operative file gives the same experiment again; the tree names the origin of each value."""

from __future__ import annotations

import dataclasses

import pytest

from palmjax import configure
from palmjax.configure.text import Reader

RUNS = {
    "base": "",
    "overrides": "BATCH_SIZE = 16\nOPTIMIZER = @Momentum()\nSaveCheckpointConfig.keep = None",
    "scopes": "train/Pack.documents = True\nDatasetConfig.tasks = (@a/Lines(),)\na/Lines.name = 'a'",
    "one class, two defaults": "Toy.layers = 5",
    "explicit parts": "Toy.first = @x/Norm()\nToy.last = @y/Norm()\nx/Norm.epsilon = 1e999\ny/Norm.epsilon = -1",
    "awkward text": "TrainConfig.sample_prompt = 'quote \" and \\' and \\\\ and \\n and é'",
}


@pytest.mark.parametrize("name", RUNS)
def test_the_operative_file_loaded_alone_gives_an_equal_experiment(load, tmp_path, name: str) -> None:
    loaded = load(RUNS[name])
    assert "include" not in loaded.operative
    (tmp_path / "config.gin").write_text(loaded.operative)
    again = configure.load(["config.gin"])
    assert again.experiment == loaded.experiment
    assert configure.describe(again.experiment) == configure.describe(loaded.experiment)
    assert again.operative == loaded.operative


def test_macros_of_the_operative_file_can_still_be_overridden(load, tmp_path) -> None:
    (tmp_path / "config.gin").write_text(load("BATCH_SIZE = 16").operative)
    experiment = configure.load(["config.gin"], ["BATCH_SIZE=32", "MODEL_DIR=/tmp/other"]).experiment
    assert experiment.model_dir == "/tmp/other"
    assert experiment.train_eval_dataset is not None
    assert (experiment.train_dataset.batch_size, experiment.train_eval_dataset.batch_size) == (32, 32)


def test_the_operative_file_holds_defaults_too(load) -> None:
    """A default that changes in a later version must not change a finished run."""
    loaded = load()
    for text in ("Toy.rate = 0.0", "MeshConfig.data = -1", "train_eval/Pack.documents = False", "TRAIN_STEPS = 100"):
        assert f"\n{text}\n" in loaded.operative
    bound = {statement.field for statement in _statements(loaded.operative) if statement.selector}
    for section in (
        loaded.experiment,
        loaded.experiment.train,
        loaded.experiment.train_dataset,
        loaded.experiment.sharding,
    ):
        assert bound >= {field.name for field in dataclasses.fields(section)}


def _statements(text: str):
    reader = Reader()
    reader.binding(text)
    return reader.source.statements


def test_the_tree_shows_origins_and_what_was_overridden(load) -> None:
    text = "BATCH_SIZE = 16\nSgd.rate = 2.0\nExperiment.loss = @Entropy()"
    tree = load(text, "BATCH_SIZE=32").tree()
    lines = {" ".join(line.split()) for line in tree.splitlines()}
    assert tree.startswith("exp.gin\n  base.gin\n\nExperiment\n")
    overridden = "(overrides 16 at exp.gin:2, 8 at base.gin:5)"
    assert f"batch_size 32 base.gin:24 <- BATCH_SIZE --gin.BATCH_SIZE {overridden}" in lines
    assert (
        f"batch_size 32 base.gin:26 <- EVAL_BATCH_SIZE base.gin:6 <- BATCH_SIZE --gin.BATCH_SIZE {overridden}" in lines
    )
    assert "rate 2.0 exp.gin:3 (overrides %RATE at base.gin:17)" in lines
    assert "train_dataset @train/DatasetConfig() base.gin:14" in lines
    assert "modules ('toy_parts',) import lines" in lines
    assert "log_period 10 default" in lines
    assert "model_dir '/tmp/run' base.gin:10 <- MODEL_DIR --gin.MODEL_DIR" in lines


def test_the_flat_dump_names_every_leaf(load) -> None:
    flat = load("DatasetConfig.tasks = (@Lines(),)\nLines.name = 'l'").flat()
    assert flat["model"] == "Toy"
    assert flat["model.first.epsilon"] == 1e-3
    assert flat["train_dataset.task_feature_lengths"] == {"targets": 16}
    assert flat["train_dataset.tasks[0].name"] == "l"
    assert flat["checkpoint.restore.path"] is None


def test_equal_experiments_have_equal_dumps_and_others_differ(load) -> None:
    base = load()
    assert configure.describe(base.experiment) == configure.describe(load("# no change").experiment)
    assert configure.describe(base.experiment) != configure.describe(load("Toy.rate = 0.25").experiment)
    assert configure.describe(base.experiment).count("\n") == len(base.flat())
