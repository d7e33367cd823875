"""Checkpoints: state, data position, configuration and code version in one folder, written while training goes on.

MODEL_DIR/checkpoint_<step>/ (T5X's layout) holds `state/`, the arrays in Orbax's OCDBT format, and `info/`, a JSON
`RunInfo`. A checkpoint gets its name only when it is whole. Reading checks `info` first, so a checkpoint of another
model, optimizer or vocabulary is refused before an array is read, and no dtype ever changes on the way.

Orbax takes half a second or more to import, so every function here imports it when called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from palmjax import distributed
from palmjax.config import ConfigError, SaveCheckpointConfig, section
from palmjax.data.vocabulary import Vocabulary
from palmjax.model_dir import PREFIX, as_path, inventory, newest, resolve, set_broken_aside
from palmjax.provenance import RunInfo
from palmjax.state import TrainState


class SaveError(ConfigError):
    """A checkpoint could not be written. Its text names the folder and the checkpoint that stays usable."""


# --- what a state consists of --------------------------------------------------------------------------------------


def _name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"a state can't be saved under the tree key {key!r}")


def _leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """(name parts, leaf) in tree order. NamedTuples and dataclasses give field names, tuples give positions."""
    return [(tuple(map(_name, path)), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def describe(tree: Any) -> dict[str, str]:
    """Every array's name and what it is, `{"params/decoder/decoder_norm/scale": "float32[512]"}`."""
    return {"/".join(name): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in _leaves(tree)}


def _nested(tree: Any) -> dict[str, Any]:
    """The leaves as nested dicts by name, so that no class of optax is part of the format."""
    out: dict[str, Any] = {}
    for name, leaf in _leaves(tree):
        inner = out
        for part in name[:-1]:
            inner = inner.setdefault(part, {})
        inner[name[-1]] = leaf
    return out


def _like(tree: Any, nested: Mapping[str, Any]) -> Any:
    """`nested` in the structure of `tree`: the inverse of `_nested`."""

    def find(name: tuple[str, ...]) -> Any:
        inner: Any = nested
        for part in name:
            inner = inner[part]
        return inner

    return jax.tree.unflatten(jax.tree.structure(tree), [find(name) for name, _ in _leaves(tree)])


def _check_arrays(path: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises ConfigError naming the first array that differs between the checkpoint and what this run needs."""
    names = [*wanted, *(name for name in saved if name not in wanted)]
    differing = [n for n in names if saved.get(n) != wanted.get(n)]
    if not differing:
        return
    # A parameter tells more than the moments that follow from it.
    name = min(differing, key=lambda n: (not n.startswith("params/"), names.index(n)))
    kind = "model" if name.startswith("params/") else "optimizer" if name.startswith("opt_state/") else "state"
    there, here = saved.get(name, "no such array"), wanted.get(name, "no such array")
    count = f" ({len(differing)} arrays differ)" if len(differing) > 1 else ""
    raise ConfigError(
        f"{path} is of another {kind}: {name} is {there} in the checkpoint and {here} in this configuration{count}; "
        "use the gin file that it was trained with, or another MODEL_DIR"
    )


# --- reading -------------------------------------------------------------------------------------------------------


def read_info(path: str | os.PathLike[str]) -> RunInfo:
    """What a checkpoint says of its run. `path` as in `resolve`. Raises ConfigError if it can't be read."""
    folder = as_path(resolve(path))
    try:
        return RunInfo.from_json((folder / "info" / "metadata").read_text())
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{folder}/info can't be read: {reason}; {inventory(folder.parent)}") from error


def check_vocabulary(path: str, info: RunInfo, vocabulary: Vocabulary) -> None:
    """Raises ConfigError, naming both, unless the checkpoint was trained on this vocabulary."""
    if info.vocabulary.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"{path} was trained on another vocabulary: {_vocabulary_text(info.vocabulary)} there, "
            f"{_vocabulary_text(vocabulary)} here"
        )


def _vocabulary_text(vocabulary: Vocabulary) -> str:
    return f"{vocabulary.to_json()['kind']} of {vocabulary.size} ids (fingerprint {vocabulary.fingerprint})"


def restore_state(path: str | os.PathLike[str], abstract_state: TrainState) -> TrainState:
    """The whole state, bit for bit, laid out as `abstract_state` says.

    abstract_state: ShapeDtypeStructs with shardings on the present mesh, which need not be the one that saved; nor need
    the number of processes. Raises ConfigError if the checkpoint is of another model or optimizer, or damaged.
    """
    folder = resolve(path)
    _check_arrays(folder, read_info(folder).arrays, describe(abstract_state))
    return _read(folder, abstract_state)


def restore_params(path: str | os.PathLike[str], abstract_params: Any) -> Any:
    """The parameters alone: the optimizer's arrays are not read. Arguments and errors as `restore_state`."""
    folder, wanted = resolve(path), {"params": abstract_params}
    saved = {n: a for n, a in read_info(folder).arrays.items() if n.startswith("params/")}
    _check_arrays(folder, saved, describe(wanted))
    return _read(folder, wanted)["params"]


def _read(folder: str, abstract: Any) -> Any:
    ocp = _orbax()

    def how(leaf: jax.ShapeDtypeStruct) -> Any:
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    item = _nested(abstract)
    args = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(how, item), partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = _like(abstract, reader.restore(as_path(folder) / "state", args=args))
        # With partial_restore Orbax 0.12.8 gives back what it was asked for in place of an array that it doesn't find.
        if lost := [n for n, leaf in _leaves(tree) if not isinstance(leaf, jax.Array)]:
            raise ValueError(f"{'/'.join(lost[0])} is not in state/")
        return tree
    except jax.errors.JaxRuntimeError:  # out of memory, a lost process: nothing that the files could help
        raise
    except Exception as error:  # a damaged file can meet any check or none inside Orbax, its assertions included
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(f"{folder} is damaged: {reason}; {inventory(as_path(folder).parent)}") from error


# --- the start order -----------------------------------------------------------------------------------------------


@section
class Start:
    """Where a run begins. info: of the checkpoint, or None from scratch. origin: in words, for the log.

    resumed: whether `state` is this run's own, so that the data position of `info` holds too.
    """

    state: TrainState
    info: RunInfo | None
    origin: str
    resumed: bool


def start(
    model_dir: str,
    initial: str | None,
    abstract_state: TrainState,
    init: Callable[[], TrainState],
    vocabulary: Vocabulary,
) -> Start:
    """The state to begin with; all processes call it together.

    initial: a checkpoint or a MODEL_DIR whose parameters to begin with, if MODEL_DIR has no checkpoint yet.
    init: makes the state from scratch, laid out as `abstract_state`.
    Raises ConfigError if the checkpoint it must begin with is of another model, optimizer or vocabulary, or not usable.
    """
    # 1. This run's own newest checkpoint.
    step = _agreed(model_dir, newest(model_dir))
    if step is not None:
        path = str(as_path(model_dir) / f"{PREFIX}{step}")
        info = read_info(path)
        check_vocabulary(path, info, vocabulary)
        distributed.remember(f"{PREFIX}{step}")
        return Start(state=restore_state(path, abstract_state), info=info, origin=path, resumed=True)

    # 2. The initial checkpoint: its parameters and its step (T5X's TRAIN_STEPS counts from there); a new optimizer.
    if initial is not None:
        path = resolve(initial)
        info = read_info(path)
        check_vocabulary(path, info, vocabulary)
        fresh = init().replace(params=None)  # dropped first: never two copies of the parameters
        params = restore_params(path, abstract_state.params)
        begin = jax.make_array_from_callback((), fresh.step.sharding, lambda _: np.asarray(info.step, fresh.step.dtype))
        return Start(state=fresh.replace(params=params, step=begin), info=info, origin=path, resumed=False)

    # 3. Scratch.
    return Start(state=init(), info=None, origin="scratch", resumed=False)


def _agreed(model_dir: str, step: int | None) -> int | None:
    """`step`, once every process has found the same one: a MODEL_DIR that is not shared would start them apart."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        mine = np.asarray(-1 if step is None else step, np.int32)
        first = int(multihost_utils.broadcast_one_to_all(mine))
        if first != mine:
            raise ConfigError(
                f"{model_dir} is not the same folder for all processes: process 0 finds "
                f"{'no checkpoint' if first < 0 else f'{PREFIX}{first}'}, process {jax.process_index()} finds "
                f"{'none' if step is None else f'{PREFIX}{step}'}; MODEL_DIR must be on storage that all share"
            )
    return step


# --- writing -------------------------------------------------------------------------------------------------------


class Checkpointer:
    """Saves states of one run into MODEL_DIR, in the background. All processes of the job use it together."""

    def __init__(self, model_dir: str, save: SaveCheckpointConfig):
        """Makes MODEL_DIR if needed and clears away what an earlier run left half written."""
        ocp = _orbax()
        self._background = _BackgroundLog()
        logging.getLogger("absl").addFilter(self._background)
        self._dir, self._save = as_path(model_dir), save
        self._writing: int | None = None
        if jax.process_index() == 0:
            set_broken_aside(self._dir)
        options = ocp.CheckpointManagerOptions(
            step_prefix=PREFIX.rstrip("_"),
            max_to_keep=save.keep,
            keep_period=save.keep_period,
            cleanup_tmp_directories=True,
        )
        # Trained float32 hardly compresses (8 % with zstd) and compressing takes cores from the step on CPU hosts.
        arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        with self._explained("MODEL_DIR can't be used"):
            self._manager = ocp.CheckpointManager(
                self._dir, options=options, item_handlers={"state": arrays, "info": ocp.JsonCheckpointHandler()}
            )

    def should_save(self, step: int) -> bool:
        """Whether the configured period falls on `step`."""
        return step % self._save.period == 0

    def save(self, step: int, state: TrainState, info: RunInfo) -> None:
        """Starts saving; returns when the state has been copied to the host, so that the step may donate it.

        Waits first if the previous save is still being written. A step that is already saved is left as it is.
        info: `step` and `arrays` are filled in here. Raises SaveError if it can't begin or if the previous one failed.
        """
        ocp = _orbax()
        self.wait()
        if (self._dir / f"{PREFIX}{step}").exists():
            return
        info = dataclasses.replace(info, step=step, arrays=describe(state))
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(_nested(state)), info=ocp.args.JsonSave(info.to_json()))
        self._writing = step
        with self._explained(f"{PREFIX}{step} could not be written"):
            self._manager.save(step, args=args, force=True)

    def check(self) -> None:
        """Raises SaveError if the save in the background has failed. Costs microseconds: call it at every step."""
        if self._writing is None:
            return
        with self._explained(f"{PREFIX}{self._writing} could not be written"):
            if self._background.failure is not None:
                raise self._background.failure
            if self._manager.is_saving_in_progress():
                return
            self._manager.wait_until_finished()
        distributed.remember(f"{PREFIX}{self._writing}")
        self._writing = None

    def wait(self) -> None:
        """Returns when the last save is whole. Raises SaveError if it failed."""
        while self._writing is not None:
            self.check()
            time.sleep(0.001 if self._writing is not None else 0)

    def latest(self) -> int | None:
        """The newest step that is whole on disk."""
        return newest(self._dir)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception the save on its way is still waited for, but its own failure must not hide the first one.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(SaveError):
            self.close()

    def close(self) -> None:
        """Waits for the last save. Raises SaveError if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()
        logging.getLogger("absl").removeFilter(self._background)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns a failure to write into one line that says what stays usable, and frees the space that it took."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if self._writing is not None and isinstance(self._dir, Path) and jax.process_index() == 0:
                for leftover in self._dir.glob(f"{PREFIX}{self._writing}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            usable = newest(self._dir)
            reason = "the disk is full" if full else (str(error) or type(error).__name__).splitlines()[0][:200]
            stays = (
                "no checkpoint is whole" if usable is None else f"{PREFIX}{usable} is whole; a new run goes on from it"
            )
            raise SaveError(f"{self._dir}: {what}: {reason}; {stays}") from error


class _BackgroundLog(logging.Filter):
    """Catches the failure of a background save as Orbax logs it, in place of its traceback on the console.

    Orbax 0.12.8 raises it again only after all processes have met at a barrier, where those whose part went well arrive
    20 minutes later; the log is where a process learns of it at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if "orbax" not in record.pathname or not record.exc_info:
            return True
        if "background save" in record.getMessage():
            self.failure = record.exc_info[1]
        return False


@functools.cache
def _orbax() -> Any:
    """Orbax, imported when first used."""
    import orbax.checkpoint as ocp

    # When one array fails, Orbax 0.12.8 abandons those beside it, which then report to a closed event loop or nobody.
    hook = sys.unraisablehook

    def without_late_reports(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def is_ours_to_report(record: logging.LogRecord) -> bool:
        return not ("never retrieved" in (text := record.getMessage()) and "/orbax/" in text)

    sys.unraisablehook = without_late_reports
    logging.getLogger("asyncio").addFilter(is_ours_to_report)
    return ocp
