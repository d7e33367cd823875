"""Which checkpoints stay: the newest, every so many steps, the best, one far enough back to rewind to, pinned ones."""

from __future__ import annotations

import logging
import math
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
DELETING = ".deleting"
DISCARD = "discard_after"
"""A file in MODEL_DIR with the step behind which checkpoints are being discarded: a kill in between changes nothing."""

logger = logging.getLogger(__name__)


def doomed(folder: Any, save: SaveCheckpointConfig, back: int = 0) -> list[int]:
    """Steps of the whole checkpoints in MODEL_DIR that `save` does not keep, rising.

    back: there stays one at least so many steps older than the newest, and no older than it must be.
    """
    found = steps(folder)
    if save.keep is None or len(found) <= save.keep:
        return []
    kept = set(found[-save.keep :])
    if save.keep_period:
        kept.update(step for step in found if step % save.keep_period == 0)
    if back:
        far = [step for step in found if step <= found[-1] - back]
        kept.update(far[-1:], found[len(far) :])  # the nearer ones too: one of them is the next that is far enough
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


def delete(folder: Any, which: Sequence[int]) -> None:
    """Deletes checkpoints. A kill in between leaves none that looks whole, and the next start clears the rest."""
    for step in which:
        path = folder / f"{PREFIX}{step}"
        if isinstance(path, Path):
            shutil.rmtree(path.rename(path.with_name(path.name + DELETING)), ignore_errors=True)
        else:
            (path / model_dir.PARTS[0]).unlink(missing_ok=True)
            path.rmtree(missing_ok=True)


def discard_after(folder: Any, step: int) -> list[int]:
    """Deletes every checkpoint behind `step`: what came of steps that a rewind undoes. Returns their steps.

    The wish is on disk before the first is gone, so a job that is killed here discards the rest when it starts.
    """
    if not any(later > step for later in steps(folder)):
        return []
    (folder / DISCARD).write_text(f"{step}\n")
    return finish_discard(folder)


def finish_discard(folder: Any) -> list[int]:
    """Goes on with a `discard_after` that was cut off. Returns the steps that it deleted."""
    wish = folder / DISCARD
    if not wish.exists():
        return []
    text = wish.read_text().strip()
    later = [found for found in steps(folder) if found > int(text)] if text.isdecimal() else []
    logger.warning("%s: discarding checkpoints behind step %s: %s", folder, text, later)
    delete(folder, later)
    wish.unlink()
    return later


def prune(folder: str, *, keep: int, keep_every: int | None, dry_run: bool) -> tuple[list[int], list[int]]:
    """(steps deleted, steps kept) of MODEL_DIR's whole checkpoints; with `dry_run` nothing is deleted."""
    path = as_path(folder)
    gone = doomed(path, SaveCheckpointConfig(keep=keep, keep_period=keep_every))
    stay = [step for step in steps(path) if step not in gone]
    if not dry_run:
        delete(path, gone)
    return gone, stay
