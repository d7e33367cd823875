"""guard.json in MODEL_DIR: the rewinds decided so far. On disk before any of them acts; the one truth about them.

A checkpoint says how many rewinds were decided when it was saved. One that a later rewind has passed by (it lies behind
the step that the run went back to) is void: it holds the spike. That follows from the two files alone, so it doesn't
matter at which instant a run was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from palmjax import distributed
from palmjax.config import ConfigError, section
from palmjax.data.order import Skips
from palmjax.files import write_whole
from palmjax.model_dir import PREFIX, as_path, patiently

FILE = "guard.json"
FORMAT = 2
"""Since 2 the file has a checksum: another step or another row is another run."""


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
    """The decisions so far, oldest first, as process 0 reads them; all processes call it together.

    Raises ConfigError if the file is damaged.
    """
    path, text = as_path(model_dir) / FILE, ""
    if jax.process_index() == 0:
        with contextlib.suppress(FileNotFoundError):
            text = patiently(path, lambda file: file.read_bytes().decode(errors="replace"))
    text = distributed.text_from_first(text)
    if not text and (jax.process_index() or not path.exists()):
        return ()
    try:
        value = json.loads(text)
        if value["format"] > FORMAT:
            raise ValueError("written by a newer palmjax; update this one")
        if value["format"] > 1 and value != _value(value["rewinds"]):
            raise ValueError("it is not what was written")
        return tuple(_rewind(one) for one in value["rewinds"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} can't be read: {type(error).__name__}: {error}; without it checkpoints that hold a loss spike "
            "can't be told from the others"
        ) from error


def _value(rewinds: list[Any]) -> dict[str, Any]:
    """What the file holds."""
    return {"format": FORMAT, "checksum": zlib.crc32(json.dumps(rewinds).encode()), "rewinds": rewinds}


def _rewind(value: Any) -> Rewind:
    """Raises KeyError, TypeError or ValueError for what is none."""
    kinds = {"step": int, "to": int, "loss": float, "z": float}
    if set(value) != {*kinds, "skips"} or any(type(value[name]) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{value} is no rewind")
    return Rewind(**{**value, "skips": tuple((int(step), int(rows)) for step, rows in value["skips"])})


def write_rewinds(model_dir: str | os.PathLike[str], rewinds: Sequence[Rewind]) -> None:
    """Replaces the file as a whole; it is on disk when this returns. For process 0."""
    folder = as_path(model_dir)
    text = json.dumps(_value([dataclasses.asdict(one) for one in rewinds]), indent=1) + "\n"
    try:
        write_whole(folder / FILE, text)
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
