"""The arrays of an Orbax checkpoint one by one, with no model and no Orbax: opened, read and written block by block.

Orbax reads and writes whole trees of arrays that are in memory. What it leaves on disk is public: one zarr array for
each leaf in an OCDBT key-value store (or plain folders), and `_METADATA`, which names the leaves. Conversion writes the
same, so that the result is restored by Orbax on any mesh; tests compare it with what Orbax itself writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from palmjax.config import ConfigError

CHUNK_BYTES = 8 << 20
"""Of the arrays written. A device that holds a part of an array reads the chunks that cover it."""

# The files are flushed once, before the checkpoint gets its name, and nothing that was written is read again.
_CONTEXT = ts.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})


def names(state: Any) -> dict[str, tuple[str, ...]]:
    """{"params.decoder.decoder_norm.scale": ("params", "decoder", "decoder_norm", "scale")} for every array in `state`.

    Raises ConfigError if `state` is not a tree of arrays that Orbax wrote.
    """
    found = {}
    for entry in _metadata(state)["tree_metadata"].values():
        if entry.get("value_metadata", {}).get("value_type") != "None":
            parts = tuple(str(key["key"]) for key in entry["key_metadata"])
            found[".".join(parts)] = parts
    return found


def _metadata(state: Any) -> dict[str, Any]:
    try:
        metadata = json.loads((state / "_METADATA").read_text())
        metadata["tree_metadata"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{state} is not a tree of arrays written by Orbax: {error!r}") from error
    return metadata


class Reader:
    """The arrays of a `state` folder (a path as of `model_dir.as_path`), by dotted name."""

    def __init__(self, state: Any):
        metadata = _metadata(state)
        self._state, self.names = state, names(state)
        self._ocdbt = metadata.get("use_ocdbt", (state / "manifest.ocdbt").exists())
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"

    def open(self, name: str) -> Any:
        """The TensorStore of one array. Raises ConfigError if its data are missing or damaged."""
        is_local = isinstance(self._state, Path)
        path = f"{self._state.absolute() if is_local else self._state}/"
        kvstore: Any = {"driver": "file", "path": f"{path}{name}/"} if is_local else f"{path}{name}/"
        if self._ocdbt:
            base = {"driver": "file", "path": path} if is_local else path
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        try:
            return ts.open(
                {"driver": self._driver, "kvstore": kvstore}, open=True, read=True, context=_CONTEXT
            ).result()
        except ValueError as error:
            raise ConfigError(
                f"{self._state}: array {name} can't be read: {str(error).splitlines()[0][:200]}"
            ) from error


class Writer:
    """Writes the arrays of a new `state` folder. Opened again, it goes on with what is there."""

    def __init__(self, state: Path):
        self._state = state
        self._arrays: dict[tuple[str, ...], Any] = {}

    def array(self, name: tuple[str, ...], shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...]) -> Any:
        """The TensorStore of one array, made if it is not there."""
        if name not in self._arrays:
            base = {"driver": "file", "path": f"{self._state.absolute()}/"}
            metadata = {
                "zarr_format": 2,
                "shape": shape,
                "chunks": chunks,
                "dtype": "bfloat16" if np.dtype(dtype).name == "bfloat16" else np.dtype(dtype).str,
                "compressor": None,  # trained float32 hardly compresses
                "fill_value": None,
                "filters": None,
                "order": "C",
                "dimension_separator": ".",
            }
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": base, "path": f"{'.'.join(name)}/"},
                "metadata": metadata,
            }
            self._arrays[name] = ts.open(spec, open=True, create=True, context=_CONTEXT).result()
        return self._arrays[name]

    def finish(self, names: Iterable[tuple[str, ...]]) -> None:
        """Writes what tells Orbax of the tree: every array's name.

        The arrays are called numpy's: nothing laid them out on devices, and Orbax restores them without being told how.
        """
        tree = {
            str(name): {
                "key_metadata": [{"key": part, "key_type": 2} for part in name],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for name in names
        }
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._state / "_METADATA").write_text(json.dumps(metadata))


def read_chunks(array: Any) -> tuple[int, ...]:
    """Blocks in which an array is read: its chunks, joined along the last dimensions up to `CHUNK_BYTES`."""
    shape, chunks = tuple(array.shape), list(array.chunk_layout.read_chunk.shape or array.shape)
    itemsize = array.dtype.numpy_dtype.itemsize
    for axis in reversed(range(len(shape))):
        while chunks[axis] < shape[axis] and math.prod(chunks) * itemsize * 2 <= CHUNK_BYTES:
            chunks[axis] *= 2
        chunks[axis] = min(chunks[axis], shape[axis])
    return tuple(chunks)
