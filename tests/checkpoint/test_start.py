"""Where a run begins: its own newest checkpoint that is whole, an initial one, scratch."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import checkpoint
from palmjax.config import ConfigError
from palmjax.data.vocabulary import Bytes, Vocabulary
from palmjax.state import TrainState
from tests.checkpoint.states import (
    abstract,
    assert_same_bits,
    make_state,
    mesh,
    save_one,
)


def begin(folder: Path, initial: Path | None = None, vocabulary: Vocabulary | None = None) -> checkpoint.Start:
    def init() -> TrainState:
        state = make_state(mesh(1, 1))
        return state.replace(step=state.step * 0, params=jax.tree.map(jnp.zeros_like, state.params))

    like = abstract(make_state(mesh(1, 1)))
    return checkpoint.start(str(folder), initial and str(initial), like, init, vocabulary or Bytes())


def test_start_prefers_its_own_checkpoint_then_the_initial_one_then_scratch(saved: Path, tmp_path: Path) -> None:
    trained = make_state(mesh(1, 1))

    scratch = begin(tmp_path / "empty")
    assert scratch.info is None and scratch.origin == "scratch" and not scratch.resumed
    assert int(scratch.state.step) == 0 and not np.any(scratch.state.params["decoder"]["scale"])

    tuned = begin(tmp_path / "empty", initial=saved)
    assert tuned.origin == str(saved / "checkpoint_3") and not tuned.resumed
    fresh_moments = scratch.state.opt_state
    assert_same_bits(trained.replace(opt_state=fresh_moments), tuned.state)
    assert tuned.state.step.dtype == jnp.int32

    own = tmp_path / "own"
    later = save_one(own, step=9, state=trained.replace(step=trained.step + 6))
    resumed = begin(own, initial=saved)
    assert resumed.resumed and resumed.origin == str(own / "checkpoint_9")
    assert resumed.info is not None and resumed.info.data.skips == ((10, 20), (40, 44))
    assert_same_bits(later, resumed.state)


def test_start_refuses_another_vocabulary(saved: Path, tmp_path: Path) -> None:
    for folder, initial in ((saved, None), (tmp_path, saved)):
        with pytest.raises(ConfigError, match="another vocabulary"):
            begin(folder, initial, vocabulary=Bytes(extra_ids=1))


def damage(folder: Path) -> None:
    """Changes one byte of the largest array file."""
    largest = max(folder.rglob("d/*"), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 255
    largest.write_bytes(data)


def test_start_falls_back_to_the_newest_whole_one_and_says_what_it_skipped(saved: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        shutil.copytree(saved / "checkpoint_3", tmp_path / f"checkpoint_{step}")
    damage(tmp_path / "checkpoint_2")
    damage(tmp_path / "checkpoint_3")
    begun = begin(tmp_path)
    assert begun.origin == str(tmp_path / "checkpoint_1") and begun.resumed
    assert [(s.step, "is not what was written" in s.reason) for s in begun.skipped] == [(3, True), (2, True)]
    assert all(Path(s.path).is_dir() and "damaged_checkpoint_" in s.path for s in begun.skipped)
    assert begin(tmp_path).skipped == ()  # set aside once, and checkpoint_2 can be saved again
    damage(tmp_path / "checkpoint_1")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* can be read(.|\n)*move them away"):
        begin(tmp_path)
    assert (tmp_path / "checkpoint_1").is_dir()


def test_start_clears_nothing_and_the_checkpointer_clears_what_was_cut_off(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    cut = tmp_path / "checkpoint_4.orbax-checkpoint-tmp"
    (cut / "state").mkdir(parents=True)
    assert begin(tmp_path).origin == str(tmp_path / "checkpoint_3")
    save_one(tmp_path, step=5)
    assert not cut.exists()
