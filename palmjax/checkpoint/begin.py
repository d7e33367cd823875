"""The start order: a run's own newest checkpoint that is whole, the initial one, scratch."""

from __future__ import annotations

import logging
from collections.abc import Callable

import jax
import numpy as np

from palmjax import distributed, model_dir
from palmjax.checkpoint.reading import check_vocabulary, read_info, restore_params, restore_state, together
from palmjax.checkpoint.seal import Damaged
from palmjax.config import ConfigError, section
from palmjax.data.vocabulary import Vocabulary
from palmjax.model_dir import PREFIX, as_path
from palmjax.provenance import RunInfo
from palmjax.state import TrainState

logger = logging.getLogger(__name__)


@section
class Skipped:
    """A damaged checkpoint that a start passed over. path: where it lies now, nothing of it deleted."""

    step: int
    reason: str
    path: str


@section
class Start:
    """Where a run begins. info: of the checkpoint, or None from scratch. origin: in words, for the log.

    resumed: whether `state` is this run's own, so that the data position of `info` holds too.
    skipped: newer checkpoints of the run that turned out to be damaged, the newest first.
    """

    state: TrainState
    info: RunInfo | None
    origin: str
    resumed: bool
    skipped: tuple[Skipped, ...] = ()


def start(
    folder: str,
    initial: str | None,
    abstract_state: TrainState,
    init: Callable[[], TrainState],
    vocabulary: Vocabulary,
) -> Start:
    """The state to begin with; all processes call it together.

    folder: MODEL_DIR. initial: a checkpoint or a MODEL_DIR whose parameters to begin with, if MODEL_DIR has no
    checkpoint yet.
    init: makes the state from scratch, laid out as `abstract_state`.
    A damaged checkpoint is passed over for the newest one before it that is whole, and set aside. Raises ConfigError
    if the checkpoint that it must begin with is of another model, optimizer or vocabulary, or if all are damaged (a run
    that has checkpoints never begins anew), and Unreadable if the storage fails.
    """
    # 1. This run's own newest checkpoint that is whole.
    damaged: list[tuple[int, str]] = []
    for step in reversed(_agreed(folder)):
        path = str(as_path(folder) / f"{PREFIX}{step}")
        try:
            with together():
                info = read_info(path)
            check_vocabulary(path, info, vocabulary)
            state = restore_state(path, abstract_state)
        except Damaged as error:
            damaged.append((step, str(error)))
            logger.warning("%s", error)
            continue
        distributed.remember(f"{PREFIX}{step}")
        skipped = tuple(_set_aside(folder, step, reason) for step, reason in damaged)
        return Start(state=state, info=info, origin=path, resumed=True, skipped=skipped)
    if damaged:
        raise ConfigError(
            f"no checkpoint in {folder} can be read; the newest: {damaged[0][1]}\n"
            "to begin anew all the same, move them away"
        )

    # 2. The initial checkpoint: its parameters and its step (T5X's TRAIN_STEPS counts from there); a new optimizer.
    if initial is not None:
        path = model_dir.resolve(initial)
        info = read_info(path)
        check_vocabulary(path, info, vocabulary)
        fresh = init().replace(params=None)  # dropped first: never two copies of the parameters
        params = restore_params(path, abstract_state.params)
        begin = jax.make_array_from_callback((), fresh.step.sharding, lambda _: np.asarray(info.step, fresh.step.dtype))
        return Start(state=fresh.replace(params=params, step=begin), info=info, origin=path, resumed=False)

    # 3. Scratch.
    return Start(state=init(), info=None, origin="scratch", resumed=False)


def _set_aside(folder: str, step: int, reason: str) -> Skipped:
    """Takes the name from a damaged checkpoint, so that its step can be saved again. Process 0 does it."""
    path = as_path(folder) / f"{PREFIX}{step}"
    now = str(path)
    if jax.process_index() == 0:
        now = model_dir.set_aside(path, "damaged", reason)
    return Skipped(step=step, reason=reason, path=now)


def _agreed(folder: str) -> list[int]:
    """Steps of the whole checkpoints, rising, once every process has found the same newest one.

    A MODEL_DIR that is not shared would start them apart.
    """
    steps = model_dir.steps(folder)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        newest = steps[-1] if steps else -1
        first = int(multihost_utils.broadcast_one_to_all(np.asarray(newest, np.int32)))
        if first != newest:
            raise ConfigError(
                f"{folder} is not the same folder for all processes: process 0 finds "
                f"{'no checkpoint' if first < 0 else f'{PREFIX}{first}'}, process {jax.process_index()} finds "
                f"{'none' if newest < 0 else f'{PREFIX}{newest}'}; MODEL_DIR must be on storage that all share"
            )
    return steps
