"""Every shipped experiment, resolved to its last leaf. A change of a default or a file shows as a diff here.

Rewrite with: UPDATE_GOLDEN=1 .venv/bin/python -m pytest tests/configure/test_golden.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from palmjax import configure
from palmjax.configure.text import REQUIRED, Reader

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
EXPERIMENTS = sorted(path.stem for path in (ROOT / "gin" / "exp").glob("*.gin"))
PLACEHOLDERS = {
    "MODEL_DIR": "/model_dir",
    "TRAIN_FILES": "/data/train-*.jsonl.gz",
    "SENTENCEPIECE_MODEL": "/data/256k.model",
}
"""Values for what only the user of a file can know."""


def load(name: str) -> configure.Loaded:
    reader = Reader()
    reader.file(f"exp/{name}.gin")
    final = {statement.field: statement.value for statement in reader.source.statements if not statement.selector}
    unset = [macro for macro, value in final.items() if value == REQUIRED]
    return configure.load([f"exp/{name}.gin"], [f"{macro}={PLACEHOLDERS[macro]}" for macro in unset])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_resolves_as_recorded(name: str) -> None:
    text, golden = configure.describe(load(name).experiment), GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.exists(), f"no record of gin/exp/{name}.gin: run this file with UPDATE_GOLDEN=1"
    assert text.splitlines() == golden.read_text().splitlines()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_operative_file_of_an_experiment_reproduces_it(name: str, tmp_path: Path) -> None:
    loaded = load(name)
    (tmp_path / "config.gin").write_text(loaded.operative)
    assert configure.load([str(tmp_path / "config.gin")]).experiment == loaded.experiment


def test_no_record_is_left_over() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == EXPERIMENTS
    assert EXPERIMENTS


def test_import_lines_are_not_imported_to_read_a_config() -> None:
    """A task module loads TensorFlow; only building a store needs it."""
    loaded = configure.load(["exp/palm_stdlib.gin"], ["import module_that_does_not_exist"])
    assert loaded.experiment.train_dataset.modules == ("module_that_does_not_exist",)
