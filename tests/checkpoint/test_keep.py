"""Which checkpoints stay, and how those that go are gone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from palmjax import checkpoint
from palmjax.checkpoint import Checkpointer
from palmjax.config import KeepBest, SaveCheckpointConfig
from palmjax.provenance import RunInfo
from tests.checkpoint.states import (
    info,
    make_state,
    mesh,
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
    assert saver.latest() == 70


def scored(step: int, loss: float) -> RunInfo:
    return dataclasses.replace(info(), metrics={"loss": loss} if loss else {})


def test_the_best_one_the_one_to_rewind_to_and_pinned_ones_stay(tmp_path: Path) -> None:
    state = make_state(mesh(1, 1))
    losses = {10: 3.0, 20: 1.0, 30: 0.0, 40: 2.0, 50: float("nan"), 60: 4.0, 70: 0.0, 80: 0.0}
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig(keep=1, best=KeepBest(metric="loss")), back=15)
    for step, loss in losses.items():
        saver.save(step, state, scored(step, loss))
        saved = saver.wait()
        assert saved is not None and saved.step == step and saved.bytes > 1000
        assert saved.deleted == {40: (10,), 70: (40,), 80: (50,)}.get(step, ())
        if step == 30:
            (tmp_path / "checkpoint_30" / "PINNED").touch()
    saver.close()
    # 80: the newest; 70 and 60: 60 is the last one 15 steps behind, and 70 will be next; 20: the best; 30: pinned.
    assert checkpoint.steps(tmp_path) == [20, 30, 60, 70, 80]
    assert not list(tmp_path.glob("*.deleting"))


def test_a_rewind_discards_what_came_after_even_if_it_is_killed(tmp_path: Path) -> None:
    state = make_state(mesh(1, 1))
    with Checkpointer(str(tmp_path), SaveCheckpointConfig(keep=None)) as saver:
        for step in (10, 20, 30, 40):
            saver.save(step, state, info())
        saver.wait()
        assert saver.discard_after(20) == [30, 40] and saver.steps() == [10, 20]
        saver.save(30, state, info())
    (tmp_path / "discard_after").write_text("10\n")  # killed behind the wish
    (tmp_path / "checkpoint_20").rename(tmp_path / "checkpoint_20.deleting")  # and in the middle of a deletion
    Checkpointer(str(tmp_path), SaveCheckpointConfig(keep=None)).close()
    assert checkpoint.steps(tmp_path) == [10] and not (tmp_path / "discard_after").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_10"]
