"""Continuous evaluation beside a run that deletes its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from palmjax import model_dir
from palmjax.config import ConfigError
from palmjax.evaluation import watch


def whole(folder: Path, step: int) -> None:
    """What tells that a checkpoint is whole, and no more."""
    for part in model_dir.PARTS:
        file = folder / f"checkpoint_{step}" / part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


class Late:
    """Reads each checkpoint when the run has deleted it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def evaluate(self, path: str, folder: Path) -> Any:
        self.asked.append(Path(path).name)
        shutil.rmtree(path)
        raise ConfigError(f"there is no checkpoint {path}")


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_passed_over(tmp_path: Path, capsys) -> None:
    whole(tmp_path, 10)
    whole(tmp_path, 20)
    opener: Any = Late()
    assert watch.follow(str(tmp_path), tmp_path / "eval", opener, timeout=0.0) == 0
    assert opener.asked == ["checkpoint_10", "checkpoint_20"]
    assert "step 10: passed over, since the run has deleted" in capsys.readouterr().err


def test_a_checkpoint_that_is_there_and_cannot_be_read_ends_it(tmp_path: Path) -> None:
    whole(tmp_path, 10)
    opener: Any = watch.Opener(lambda path, info: pytest.fail("its info is empty"))
    with pytest.raises(ConfigError, match="checkpoint_10"):
        watch.follow(str(tmp_path), tmp_path / "eval", opener, timeout=0.0)
