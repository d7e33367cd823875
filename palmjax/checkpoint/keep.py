"""Which checkpoints stay: the newest, every so many steps, the best, pinned ones."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from palmjax import model_dir
from palmjax.checkpoint.reading import read_info
from palmjax.config import ConfigError, SaveCheckpointConfig
from palmjax.model_dir import PREFIX, as_path, steps

PINNED = "PINNED"
"""A file of this name in a checkpoint's folder keeps it for good, as in T5X."""
WRITTEN, DELETING = ".written", ".deleting"
"""Suffixes of a checkpoint that Orbax has finished and that has no checksums yet, and of one on its way out."""
_LEFTOVER = re.compile(rf"{PREFIX}\d+({re.escape(WRITTEN)}|{re.escape(DELETING)}|\.orbax)")

logger = logging.getLogger(__name__)


def doomed(folder: Any, save: SaveCheckpointConfig) -> list[int]:
    """Steps of the whole checkpoints in MODEL_DIR that `save` does not keep, rising."""
    found = steps(folder)
    if save.keep is None or len(found) <= save.keep:
        return []
    kept = set(found[-save.keep :])
    if save.keep_period:
        kept.update(step for step in found if step % save.keep_period == 0)
    if save.best is not None:
        kept.update(_best(folder, found, save.best.metric, save.best.count, save.best.highest))
    return [step for step in found if step not in kept and not (folder / f"{PREFIX}{step}" / PINNED).exists()]


def _best(folder: Any, found: Iterable[int], metric: str, count: int, highest: bool) -> list[int]:
    """Of the checkpoints that were saved behind an evaluation, the `count` with the best finite value; ties: newer."""
    scored = []
    for step in found:
        try:
            value = read_info(folder / f"{PREFIX}{step}").metrics.get(metric, math.nan)
        except ConfigError:  # damaged: a start will say so
            continue
        if math.isfinite(value):
            scored.append((value if highest else -value, step))
    return [step for _, step in sorted(scored)[-count:]]


def delete(folder: Any, which: Sequence[int]) -> tuple[int, ...]:
    """Deletes checkpoints; returns the steps of those that are gone. A kill in between leaves none that looks whole:
    `clear` takes the rest. A warning tells what can't be deleted, which takes room and harms nothing else.
    """
    gone = []
    for step in which:
        path = folder / f"{PREFIX}{step}"
        try:
            if isinstance(path, Path):
                _remove(path.rename(path.with_name(path.name + DELETING)))
            else:
                (path / model_dir.PARTS[0]).unlink(missing_ok=True)
                path.rmtree(missing_ok=True)
            gone.append(step)
        except OSError as error:
            logger.warning("%s can't be deleted: %s", path, error)
    return tuple(gone)


def clear(folder: Any) -> None:
    """Removes from a local MODEL_DIR what was half written or half deleted. The caller holds the lock."""
    for leftover in folder.iterdir() if isinstance(folder, Path) else ():
        if _LEFTOVER.match(leftover.name):
            _remove(leftover)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # as far as it goes
        logger.warning("%s can't be deleted and takes room: %s", folder, error)


def prune(folder: str, *, keep: int, keep_every: int | None, dry_run: bool) -> tuple[list[int], list[int]]:
    """(steps deleted, steps kept) of MODEL_DIR's whole checkpoints; with `dry_run` nothing is deleted.

    What a save or a deletion that was killed has left goes too. The caller holds the lock.
    """
    path = as_path(folder)
    found, gone = steps(path), doomed(path, SaveCheckpointConfig(keep=keep, keep_period=keep_every))
    if not dry_run:
        clear(path)
        gone = [*delete(path, gone)]
    return gone, [step for step in found if step not in gone]
