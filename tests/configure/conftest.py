"""A working directory with a base run file in T5X's style, over the parts of toy_parts.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from palmjax import configure

BASE = """\
from __gin__ import dynamic_registration
import toy_parts
MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = %gin.REQUIRED
BATCH_SIZE = 8
EVAL_BATCH_SIZE = %BATCH_SIZE
RATE = 0.5
OPTIMIZER = @Sgd()

Experiment.model_dir = %MODEL_DIR
Experiment.model = @Toy()
Experiment.optimizer = %OPTIMIZER
Experiment.loss = @Entropy()
Experiment.train_dataset = @train/DatasetConfig()
Experiment.train_eval_dataset = @train_eval/DatasetConfig()
Toy.layers = 2
Sgd.rate = %RATE
TrainConfig.steps = %TRAIN_STEPS
DatasetConfig:
  mixture_or_task_name = "lines"
  task_feature_lengths = {"targets": 16}
  packing = @Pack()
  store_dir = "stores"
train/DatasetConfig.batch_size = %BATCH_SIZE
train_eval/DatasetConfig:
  batch_size = %EVAL_BATCH_SIZE
  split = "validation"
"""

Load = Callable[..., configure.Loaded]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """load(text, *bindings): writes `exp.gin`, which includes `base.gin`, and loads it with the required macros set.

    required=False leaves them unset.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "base.gin").write_text(BASE)

    def load(text: str = "", *bindings: str, required: bool = True) -> configure.Loaded:
        (tmp_path / "exp.gin").write_text(f"include 'base.gin'\n{text}\n")
        given = ["MODEL_DIR=/tmp/run", "TRAIN_STEPS=100"] if required else []
        return configure.load(["exp.gin"], [*given, *bindings])

    return load
