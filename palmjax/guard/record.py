"""guard.json in MODEL_DIR: the rewinds decided so far. On disk before any of them acts; the one truth about them.

A checkpoint says how many rewinds were decided when it was saved. One that a later rewind has passed by (it lies behind
the step that the run went back to) is void: it holds the spike. That follows from the two files alone, so it doesn't
matter at which instant a run was killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError, section
from palmjax.data.order import Skips
from palmjax.files import write_whole
from palmjax.model_dir import PREFIX, as_path

FILE = "guard.json"
FORMAT = 1


@section
class Rewind:
    """A decision. step: steps done when the spike was known. to: the step that the run goes back to.

    skips: the rows to pass over from then on, all that are in force; `(to, rows)` among them is this rewind's own.
    loss, z: of the step that decided.
    """

    step: int
    to: int
    skips: Skips
    loss: float
    z: float


def read_rewinds(model_dir: str | os.PathLike[str]) -> tuple[Rewind, ...]:
    """The decisions so far, oldest first. Raises ConfigError if the file is damaged."""
    path = as_path(model_dir) / FILE
    if not path.exists():
        return ()
    try:
        value = json.loads(path.read_text())
        if value["format"] > FORMAT:
            raise ValueError("written by a newer palmjax; update this one")
        return tuple(
            Rewind(**{**one, "skips": tuple((int(step), int(rows)) for step, rows in one["skips"])})
            for one in value["rewinds"]
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} can't be read: {type(error).__name__}: {error}; without it checkpoints that hold a loss spike "
            "can't be told from the others"
        ) from error


def write_rewinds(model_dir: str | os.PathLike[str], rewinds: Sequence[Rewind]) -> None:
    """Replaces the file as a whole; it is on disk when this returns. For process 0."""
    folder = as_path(model_dir)
    text = json.dumps({"format": FORMAT, "rewinds": [dataclasses.asdict(one) for one in rewinds]}, indent=1) + "\n"
    try:
        if isinstance(folder, Path):
            write_whole(folder / FILE, text)
        else:  # an object is seen whole or not at all
            (folder / FILE).write_text(text)
    except OSError as error:
        raise ConfigError(f"{folder / FILE} can't be written: {error.strerror or error}") from error


def is_void(step: int, known: int, rewinds: Sequence[Rewind]) -> bool:
    """Whether a checkpoint of `step`, saved when `known` rewinds were decided, was passed by one decided since."""
    return any(step > one.to for one in rewinds[known:])


def remove_void(
    model_dir: str | os.PathLike[str], steps: Sequence[int], known: Callable[[int], int], rewinds: Sequence[Rewind]
) -> list[int]:
    """Removes the void ones among the checkpoints `steps` and returns their steps. For process 0, at a start.

    known: of a checkpoint's step, the rewinds decided when it was saved. Nothing is lost: `palmjax replay` computes
    any of them again.
    """
    folder, removed = as_path(model_dir), []
    for step in steps if rewinds else ():
        if is_void(step, known(step), rewinds):
            _remove(folder / f"{PREFIX}{step}")
            removed.append(step)
    return removed


def _remove(path: Any) -> None:
    """Never half there under its name: a killed removal must not leave what looks like a checkpoint."""
    if isinstance(path, Path):
        path = path.rename(path.with_name(f"void_{path.name}.{time.time_ns()}"))
        shutil.rmtree(path)
        return
    (path / "commit_success.txt").unlink(missing_ok=True)
    path.rmtree()
