"""Which checkpoints stay, and how those that go are gone."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest

from palmjax import checkpoint
from palmjax.checkpoint import Checkpointer, keep
from palmjax.config import KeepBest, SaveCheckpointConfig
from palmjax.provenance import RunInfo
from tests.checkpoint.states import (
    info,
    make_state,
    mesh,
    save_one,
)


def test_keep_and_keep_period(tmp_path: Path) -> None:
    state = make_state(mesh(1, 1))
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig(period=10, keep=2, keep_period=30))
    for step in range(10, 80, 10):
        assert saver.should_save(step) and not saver.should_save(step + 1)
        saver.save(step, state, info())
    saver.close()
    left = sorted(int(p.name.removeprefix("checkpoint_")) for p in tmp_path.glob("checkpoint_*"))
    assert left == [30, 60, 70]
    assert checkpoint.newest(tmp_path) == 70


def scored(step: int, loss: float) -> RunInfo:
    return dataclasses.replace(info(), metrics={"loss": loss} if loss else {})


def test_the_best_one_and_pinned_ones_stay(tmp_path: Path) -> None:
    state = make_state(mesh(1, 1))
    losses = {10: 3.0, 20: 1.0, 30: 0.0, 40: 2.0, 50: float("nan"), 60: 4.0}
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig(keep=1, best=KeepBest(metric="loss")))
    for step, loss in losses.items():
        saver.save(step, state, scored(step, loss))
        saved = saver.wait()
        assert saved is not None and saved.step == step and saved.bytes > 1000
        assert saved.deleted == {20: (10,), 50: (40,), 60: (50,)}.get(step, ())
        if step == 30:
            (tmp_path / "checkpoint_30" / "PINNED").touch()
    saver.close()
    # 60: the newest; 20: the best; 30: pinned.
    assert checkpoint.steps(tmp_path) == [20, 30, 60]
    assert not list(tmp_path.glob("*.deleting"))


def test_a_deletion_that_was_killed_is_finished_by_the_next_start(tmp_path: Path) -> None:
    save_one(tmp_path, step=10)
    save_one(tmp_path, step=20)
    (tmp_path / "checkpoint_10").rename(tmp_path / "checkpoint_10.deleting")
    Checkpointer(str(tmp_path), SaveCheckpointConfig()).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_20"]


def test_what_cannot_be_deleted_is_told_and_harms_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30):
        (tmp_path / f"checkpoint_{step}").mkdir()
    unlucky, rename = tmp_path / "checkpoint_10", Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == unlucky:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert keep.delete(tmp_path, [10, 20]) == (20,)
    assert "checkpoint_10 can't be deleted: " in caplog.text and "not permitted" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_10", "checkpoint_30"]
