"""PaLM 540B's parameters on its own mesh: names, shapes and layout, as a file that a change has to change."""

from __future__ import annotations

import pathlib

from palmjax import configure
from palmjax.models.account import parameter_table

GOLDEN = pathlib.Path(__file__).parent / "parameters_540b.txt"
PLACEHOLDERS = ["MODEL_DIR='run'", "TRAIN_FILES='x.jsonl'", "SENTENCEPIECE_MODEL='m.model'"]


def test_parameters_and_layout_of_540b():
    experiment = configure.load(["exp/palm_540b.gin"], PLACEHOLDERS).experiment
    mesh = {"data": experiment.mesh.data, "fsdp": experiment.mesh.fsdp, "tensor": experiment.mesh.tensor}
    assert parameter_table(experiment.model.build().config, mesh, experiment.sharding) == GOLDEN.read_text()
