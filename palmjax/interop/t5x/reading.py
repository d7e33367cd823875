"""T5X checkpoints as trees of arrays that are read one by one: the legacy format (version 3) and the Orbax one.

Legacy: `checkpoint` is a msgpack of {"version", "optimizer": {"target", "state": {"step", "param_states"}}} in which a
leaf is an array, or, for arrays that T5X partitions, a TensorStore spec with a path relative to the folder
(t5x/checkpoints.py). The spec's chunks and compressor differ between files of one run, so the arrays' own .zarray
decides. Orbax: `state/` with one array for each leaf, `target.<...>` and `state.param_states.<...>`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from palmjax.checkpoint import arrays
from palmjax.config import ConfigError
from palmjax.interop.mapping import Path as TreePath

LEGACY = "checkpoint"
FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of a checkpoint. dtype: numpy's name, "bfloat16". file: where it is, for messages."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    _read: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """The whole array. Raises ConfigError if it can't be read."""
        try:
            return np.asarray(self._read())
        except ValueError as error:
            raise ConfigError(f"{self.file} can't be read: {str(error).splitlines()[0][:200]}") from error


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """target: parameters by path. param_states: what the optimizer keeps, by the parameter's path and then its name."""

    path: Path
    step: int
    target: Mapping[TreePath, LazyArray]
    param_states: Mapping[TreePath, LazyArray]


def find(path: Path) -> Path | None:
    """The T5X checkpoint that `path` means: itself, or the newest `checkpoint_N` of a MODEL_DIR; None if neither is."""
    if is_checkpoint(path):
        return path
    if not path.is_dir():
        return None
    numbered = [(int(m[1]), p) for p in path.iterdir() if (m := re.fullmatch(r"checkpoint_(\d+)", p.name))]
    return next((p for _, p in sorted(numbered, reverse=True) if is_checkpoint(p)), None)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a T5X checkpoint: legacy, or Orbax without palmjax's `info`."""
    orbax = (path / "state" / "_METADATA").is_file() and not (path / "info").exists()
    return (path / LEGACY).is_file() or orbax


def read(path: Path) -> Checkpoint:
    """Opens a checkpoint; arrays that have files of their own are not read. Raises ConfigError if it is not one."""
    if (path / LEGACY).is_file():
        return _read_legacy(path)
    return _read_orbax(path)


# --- legacy --------------------------------------------------------------------------------------------------------


def _read_legacy(path: Path) -> Checkpoint:
    from flax import serialization

    file = path / LEGACY
    content = file.read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise ConfigError(f"{file} is an index of TensorFlow checkpoints; only T5X's own formats are read")
    try:
        state: Any = serialization.msgpack_restore(content)
        version, optimizer = state["version"], state["optimizer"]
        step = int(np.asarray(optimizer["state"]["step"]))
        target, states = optimizer["target"], optimizer["state"].get("param_states") or {}
    except Exception as error:  # msgpack's own, or a tree of another shape
        raise ConfigError(f"{file} is not a T5X checkpoint, or damaged: {error!r}") from error
    if version != 3:
        raise ConfigError(f"{file} has version {version}; only version 3 is read (2 stored bfloat16 as uint16)")
    return Checkpoint(
        path=path,
        step=step,
        target={name: _legacy_leaf(path, name, leaf) for name, leaf in _legacy_leaves(target).items()},
        param_states={name: _legacy_leaf(path, name, leaf) for name, leaf in _legacy_leaves(states).items()},
    )


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and {"driver", "kvstore", "metadata"} <= set(value)


def _legacy_leaves(tree: Any, above: TreePath = ()) -> dict[TreePath, Any]:
    if _is_spec(tree) or not isinstance(tree, Mapping):
        return {above: tree}
    found: dict[TreePath, Any] = {}
    for name, value in tree.items():
        if value is not None:  # a parameter that no optimizer updates
            found |= _legacy_leaves(value, (*above, str(name)))
    return found


def _legacy_leaf(path: Path, name: TreePath, leaf: Any) -> LazyArray:
    if not _is_spec(leaf):
        array = np.asarray(leaf)
        return LazyArray(array.shape, array.dtype.name, path / LEGACY, lambda: array)
    # The path is relative, and older versions of TensorStore had it outside of the kvstore.
    relative = leaf["kvstore"].get("path", leaf.get("path"))
    folder = path / str(relative).rstrip("/")
    if not relative or path.resolve() not in folder.resolve().parents:
        raise ConfigError(f"{path / LEGACY}: {'/'.join(name)} lies outside of the checkpoint: {relative!r}")
    spec = {"driver": leaf["driver"], "kvstore": {"driver": "file", "path": f"{folder.absolute()}/"}}
    try:
        store = ts.open(spec, open=True, read=True).result()
    except ValueError as error:
        raise ConfigError(
            f"{folder} can't be opened: {path / LEGACY} says that it holds {'/'.join(name)}; "
            f"{str(error).splitlines()[0][:160]}"
        ) from error
    shape, dtype = tuple(store.shape), store.dtype.name
    if shape != tuple(leaf["metadata"]["shape"]):
        raise ConfigError(f"{folder} has shape {list(shape)}; {path / LEGACY} says {leaf['metadata']['shape']}")
    return LazyArray(shape, dtype, folder, lambda: store.read().result())


# --- Orbax ---------------------------------------------------------------------------------------------------------


def _read_orbax(path: Path) -> Checkpoint:
    reader = arrays.Reader(path / "state")
    trees: dict[str, dict[TreePath, LazyArray]] = {"target": {}, "param_states": {}}
    step = None
    for name, parts in reader.names.items():
        store = reader.open(name)
        lazy = LazyArray(tuple(store.shape), store.dtype.name, path / "state", _reading(store))
        if parts == ("state", "step"):
            step = int(lazy.read())  # float32 in checkpoints of a run that was resumed
        elif parts[0] == "target":
            trees["target"][parts[1:]] = lazy
        elif parts[:2] == ("state", "param_states"):
            trees["param_states"][parts[2:]] = lazy
    if step is None or not trees["target"]:
        raise ConfigError(f"{path}/state is not T5X's: it has no state.step or no target")
    return Checkpoint(path=path, step=step, **trees)


def _reading(store: Any) -> Callable[[], np.ndarray]:
    return lambda: store.read().result()
