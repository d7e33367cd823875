"""Opening a checkpoint's model: its configuration as a file, and a mesh that the devices of this job cannot make."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from palmjax import configure, trained
from palmjax.config import ConfigError, MeshConfig
from palmjax.data.vocabulary import Bytes
from palmjax.provenance import DataPosition, RunInfo

GIN = str(Path(__file__).parent / "e2e" / "tiny.gin")


def experiment() -> configure.Loaded:
    return configure.load([GIN], ["MODEL_DIR='/tmp/run'", "TRAIN_FILES=('a.txt',)"])


def info(config: str) -> RunInfo:
    mesh = {"data": 2, "fsdp": 256, "tensor": 12}
    values: dict[str, Any] = {"flat_config": {}, "vocabulary": Bytes(), "mesh": mesh, "code": {}, "libraries": {}}
    return RunInfo(seed=0, data=DataPosition(first_row=0), config=config, **values)


def test_the_configuration_inside_a_checkpoint_loads_like_a_file_and_takes_changes():
    loaded = experiment()
    with trained.config_file("/runs/a/checkpoint_7", info(loaded.operative)) as file:
        assert Path(file).name == "checkpoint_7.gin"
        assert configure.load([file]).experiment == loaded.experiment
        changed = configure.load([file], ["MeshConfig.fsdp=4", "TRAIN_STEPS=9"]).experiment
    assert not Path(file).exists()
    assert (changed.mesh.fsdp, changed.train.steps) == (4, 9)


def test_a_checkpoint_without_configuration_is_refused():
    with (
        pytest.raises(ConfigError, match="checkpoint_7 carries no gin configuration"),
        trained.config_file("/runs/a/checkpoint_7", info("")),
    ):
        pass


def test_a_mesh_that_does_not_fit_names_the_flags():
    value = dataclasses.replace(experiment().experiment, mesh=MeshConfig(data=2, fsdp=256, tensor=12))
    with pytest.raises(ConfigError) as error:
        trained.open_checkpoint("/runs/a/checkpoint_7", info(""), value)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "6144 devices; this job has 8" in lines[0]
    assert "data=2, fsdp=256, tensor=12" in lines[1] and "--gin.MeshConfig.data=-1" in lines[1]
