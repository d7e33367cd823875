"""Writes T5X's legacy checkpoint (version 3): a msgpack, and a zarr array for each parameter and moment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from palmjax.checkpoint.arrays import CHUNK_BYTES
from palmjax.config import ConfigError
from palmjax.interop import layout
from palmjax.interop.mapping import Path as TreePath
from palmjax.interop.t5x.reading import LEGACY

_CONTEXT = ts.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})


class Writer:
    """One checkpoint folder. Arrays are written as they come; `finish` writes the tree that names them."""

    def __init__(self, folder: Path):
        self._folder = folder

    def spec(self, name: TreePath, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
        """What stands for an array in the tree, as T5X writes it: path relative to the folder, '.' for '/'."""
        itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        return {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "file", "path": f"{'.'.join(name)}/"},
            "metadata": {
                "chunks": list(layout.chunk_shape(shape, itemsize, CHUNK_BYTES)),
                "compressor": None,  # trained float32 hardly compresses
                "shape": list(shape),
            },
        }

    def write(self, name: TreePath, array: np.ndarray) -> None:
        """Writes one array. Raises ConfigError if it can't."""
        spec = self.spec(name, array.shape, array.dtype.name)
        spec["kvstore"]["path"] = f"{self._folder.absolute()}/{spec['kvstore']['path']}"
        try:
            store = ts.open(spec, create=True, delete_existing=True, context=_CONTEXT).result()
            store.write(array).result()
        except ValueError as error:
            raise ConfigError(f"{self._folder} can't be written: {str(error).splitlines()[0][:200]}") from error

    def finish(self, step: int, target: Mapping[TreePath, Any], param_states: Mapping[TreePath, Any]) -> None:
        """Writes `checkpoint`. The leaves are specs, or arrays that are stored inside it."""
        from flax import serialization

        state = {"step": np.asarray(step, np.int32), "param_states": nested(param_states)}
        content = {"version": 3, "optimizer": {"target": nested(target), "state": state}}
        (self._folder / LEGACY).write_bytes(serialization.msgpack_serialize(content))


def nested(leaves: Mapping[TreePath, Any]) -> dict[str, Any]:
    """Paths to a tree of dicts."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        inner = out
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = leaf
    return out
