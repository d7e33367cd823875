"""Values reach the right field: overrides, scopes, macros, implicit sections, defaults."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palmjax import configure
from palmjax.config import DatasetConfig
from palmjax.configure.text import Reader, gin_text


def test_later_lines_win_and_the_command_line_wins_over_all(load) -> None:
    loaded = load("BATCH_SIZE = 16\nToy.layers = 3", "BATCH_SIZE=32")
    assert loaded.experiment.train_dataset.batch_size == 32
    assert loaded.experiment.train_eval_dataset.batch_size == 32  # through EVAL_BATCH_SIZE = %BATCH_SIZE
    assert loaded.experiment.model.layers == 3
    assert load("", "BATCH_SIZE=32", "BATCH_SIZE=64").experiment.train_dataset.batch_size == 64


def test_the_longest_scope_wins_and_an_unscoped_reference_inherits_it(load) -> None:
    loaded = load("train/Pack.documents = True\nDatasetConfig.seed = 1\ntrain/DatasetConfig.seed = 2")
    train, held_out = loaded.experiment.train_dataset, loaded.experiment.train_eval_dataset
    assert (train.seed, held_out.seed) == (2, 1)
    assert (train.packing.documents, held_out.packing.documents) == (True, False)
    assert (train.split, held_out.split) == ("train", "validation")


def test_a_scoped_reference_replaces_the_active_scope(load) -> None:
    loaded = load(
        "train/DatasetConfig.packing = @other/Pack()\nother/Pack.documents = True\ntrain_eval/Pack.documents = False"
    )
    assert loaded.experiment.train_dataset.packing.documents
    assert not loaded.experiment.train_eval_dataset.packing.documents


def test_sections_need_no_reference_and_keep_their_own_defaults(load) -> None:
    experiment = load("SaveCheckpointConfig.period = 7\nTrainConfig.log_period = 3").experiment
    assert (experiment.checkpoint.save.period, experiment.checkpoint.save.keep) == (7, 3)
    assert experiment.train.log_period == 3
    model = load().experiment.model
    assert (model.first.epsilon, model.last.epsilon) == (1e-3, 1e-6)  # the default *instance* counts, not the class
    model = load("Norm.epsilon = 1e-2").experiment.model
    assert (model.first.epsilon, model.last.epsilon) == (1e-2, 1e-2)


def test_a_name_may_carry_any_tail_of_its_module_path(load) -> None:
    text = "palmjax.config.DatasetConfig.seed = 5\ntoy_parts.Toy.layers = 4\nExperiment.loss = @toy_parts.Entropy()"
    experiment = load(text, "config.DatasetConfig.workers=2").experiment
    assert (experiment.train_dataset.seed, experiment.train_dataset.workers, experiment.model.layers) == (5, 2, 4)


def test_import_lines_become_modules_of_every_dataset(load) -> None:
    experiment = load("import json\ntrain/DatasetConfig.modules = ['first']").experiment
    assert experiment.train_dataset.modules == ("first", "toy_parts", "json")
    assert experiment.train_eval_dataset.modules == ("toy_parts", "json")


def test_an_override_sets_aside_what_it_replaces(load) -> None:
    """A base file's `Sgd.rate = %RATE` is no mistake once a later file trains with another optimizer."""
    experiment = load("OPTIMIZER = @Momentum()\nMomentum.momentum = 0.5").experiment
    assert (experiment.optimizer.momentum, experiment.optimizer.rate) == (0.5, 0.1)
    assert load("Experiment.train_eval_dataset = None").experiment.train_eval_dataset is None


def test_a_binding_for_all_scopes_may_be_refined_by_later_lines(load) -> None:
    experiment = load(
        "DatasetConfig.seed = 1\ntrain/DatasetConfig.seed = 2\ntrain_eval/DatasetConfig.seed = 3"
    ).experiment
    assert (experiment.train_dataset.seed, experiment.train_eval_dataset.seed) == (2, 3)
    experiment = load("DatasetConfig.split = 'all'").experiment  # train_eval/ binds it already, train/ does not
    assert (experiment.train_dataset.split, experiment.train_eval_dataset.split) == ("all", "validation")


def test_values_are_converted_to_what_the_annotation_wants(load) -> None:
    experiment = load("Toy.rate = 1\nEntropy.weights = [1, 2.5]\nTrainConfig.profile_steps = (3, 5)").experiment
    assert isinstance(experiment.model.rate, float)
    assert experiment.loss.weights == (1.0, 2.5)
    assert all(isinstance(weight, float) for weight in experiment.loss.weights)
    assert experiment.train.profile_steps == (3, 5)


def test_parts_inside_tuples(load) -> None:
    text = "DatasetConfig.tasks = (@a/Lines(), @b/Lines())\na/Lines.name = 'a'\nb/Lines.name = 'b'\nLines.files = ['f']"
    tasks = load(text).experiment.train_dataset.tasks
    assert [(task.name, task.files) for task in tasks] == [("a", ("f",)), ("b", ("f",))]


def test_a_file_included_twice_does_not_undo_overrides(load, tmp_path) -> None:
    (tmp_path / "other.gin").write_text("include 'base.gin'\n")
    assert load("BATCH_SIZE = 16\ninclude 'other.gin'").experiment.train_dataset.batch_size == 16


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/tmp/x", "/tmp/x"),
        ("gs://bucket/dir-1", "gs://bucket/dir-1"),
        ("runs/a.b", "runs/a.b"),
        ("~/runs", "~/runs"),
        ("2024-01-01", "2024-01-01"),
        ('"quoted"', "quoted"),
        ("'quoted'", "quoted"),
        ('"a b"', "a b"),
    ],
)
def test_strings_on_the_command_line_may_be_bare(load, text: str, value: str) -> None:
    assert load("", f"MODEL_DIR={text}").experiment.model_dir == value


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(
    st.recursive(
        leaves, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner), max_leaves=8
    )
)
def test_gin_text_of_any_plain_value_reads_back(value) -> None:
    reader = Reader()
    reader.binding(f"X = {gin_text(value)}")
    (statement,) = reader.source.statements
    assert statement.value == value
    assert type(statement.value) is type(value)


def test_the_same_tree_can_be_built_in_python(load) -> None:
    experiment = load().experiment
    rebuilt = dataclasses.replace(
        experiment,
        train_dataset=DatasetConfig(
            **{field.name: getattr(experiment.train_dataset, field.name) for field in dataclasses.fields(DatasetConfig)}
        ),
    )
    assert rebuilt == experiment
    assert configure.describe(rebuilt) == configure.describe(experiment)
