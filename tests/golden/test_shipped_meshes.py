"""Every shipped experiment fits the mesh that its header promises: parameters, activations and every batch."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import pytest

from palmjax import configure, sharding
from palmjax.config import ConfigError, Experiment
from palmjax.data.order import ramp_of
from palmjax.mesh import AXES, shape

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "gin" / "exp").glob("*.gin"))
DEVICES = {"palm_8b": 128, "palm_62b": 512, "palm_540b": 6144, "palm_nano_stdlib": 1, "palm_stdlib": 1}
"""The most devices of each file's header."""
GIVEN = {"MODEL_DIR": "run", "TRAIN_FILES": "x.jsonl", "SENTENCEPIECE_MODEL": "m.model"}
"""What only the user of a file with %gin.REQUIRED can know."""


@functools.cache
def load(name: str) -> Experiment:
    large = name in ("palm_8b", "palm_62b", "palm_540b")
    return configure.load([f"exp/{name}.gin"], [f"{key}='{value}'" for key, value in GIVEN.items() if large]).experiment


def mesh(name: str) -> dict[str, int]:
    return dict(zip(AXES, shape(load(name).mesh, DEVICES[name]), strict=True))


def test_every_experiment_is_here() -> None:
    assert sorted(DEVICES) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_parameter_fits(name: str) -> None:
    experiment, sizes = load(name), mesh(name)
    model = experiment.model.build()
    shapes = jax.tree.leaves(model.abstract_params())
    axes = jax.tree.leaves(model.axes, is_leaf=lambda node: isinstance(node, tuple))
    assert len(axes) == len(shapes) > 5
    for one, leaf in zip(axes, shapes, strict=True):
        sharding.mesh_axes(experiment.sharding, one, leaf.shape, sizes, str(one))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_batch_fits(name: str) -> None:
    experiment, sizes = load(name), mesh(name)
    datasets = experiment.train_dataset, experiment.train_eval_dataset
    assert datasets[1] is not None
    training, held_out = (ramp_of(dataset.batch_size).sizes for dataset in datasets if dataset is not None)
    parts = experiment.train.microbatches
    assert all(rows % parts == 0 for rows in training)
    length = sum(experiment.train_dataset.task_feature_lengths.values())
    width = experiment.model.d_model  # pyright: ignore[reportAttributeAccessIssue]
    for rows in {*training, *(rows // parts for rows in training), *held_out}:
        for axes, dims in (
            (("batch", "length"), (rows, length)),
            (("batch", "length", "residual"), (rows, length, width)),
        ):
            sharding.mesh_axes(experiment.sharding, axes, dims, sizes, f"{rows} rows")


def test_a_batch_that_does_not_fit_is_seen() -> None:
    """The default EVAL_BATCH_SIZE is for small jobs: 540B's batch is cut in 512 parts."""
    with pytest.raises(ConfigError, match="of size 32 is not divisible by mesh axes data=2 x fsdp=256"):
        sharding.mesh_axes(load("palm_540b").sharding, ("batch", "length"), (32, 2048), mesh("palm_540b"), "32 rows")
