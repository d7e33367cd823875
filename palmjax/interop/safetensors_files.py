"""Safetensors files as memory maps, read and written tensor by tensor. Imports config and numpy only.

The format (huggingface/safetensors): eight bytes with the length of a JSON header, then the header, `{name: {dtype,
shape, data_offsets}}`, then the tensors. The `safetensors` package writes only whole dictionaries of tensors in memory,
which a conversion must not need.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from palmjax.config import ConfigError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor lies. dtype: as the format names it, "BF16". start: its first byte in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


class Mapped:
    """`tensors` by memory maps of their files, each opened once: a `transfer.Source`."""

    def __init__(self, tensors: Mapping[str, Tensor], writable: bool = False):
        self._tensors, self._writable, self._maps = tensors, writable, {}

    def array(self, name: str) -> np.ndarray:
        """The tensor's own bytes, as an array. Writes change the file, if it was opened to be written."""
        tensor = self._tensors[name]
        if tensor.file not in self._maps:
            with tensor.file.open("r+b" if self._writable else "rb") as file:
                access = mmap.ACCESS_WRITE if self._writable else mmap.ACCESS_READ
                self._maps[tensor.file] = mmap.mmap(file.fileno(), 0, access=access)
        dtype, count = DTYPES[tensor.dtype], math.prod(tensor.shape)
        return np.frombuffer(self._maps[tensor.file], dtype, count, tensor.start).reshape(tensor.shape)

    def forget(self, name: str) -> None:
        """Takes the tensor's pages out of this process's memory; they stay in the system's page cache."""
        tensor = self._tensors[name]
        start = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
        if tensor.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[tensor.file].madvise(mmap.MADV_DONTNEED, start, tensor.start + tensor.nbytes - start)


BUFFERED_BYTES = 32 << 20
"""Most bytes of a new tensor that is put together in memory."""


class Buffered:
    """`tensors` to be written, a `transfer.Target`. Up to `BUFFERED_BYTES` they are put together in memory: a page of a
    map that is filled for the first time costs its zeroing and a fault. Larger ones are maps.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors, self._mapped, self._held = tensors, Mapped(tensors, writable=True), {}

    def array(self, name: str) -> np.ndarray:
        """What becomes the tensor, to be filled."""
        tensor = self._tensors[name]
        if tensor.nbytes > BUFFERED_BYTES:
            return self._mapped.array(name)
        if name not in self._held:
            self._held[name] = np.empty(tensor.shape, DTYPES[tensor.dtype])
        return self._held[name]

    def forget(self, name: str) -> None:
        """Takes what is filled of a map out of this process's memory."""
        if name not in self._held:
            self._mapped.forget(name)

    def put(self, name: str) -> None:
        """The array is filled: writes it. Raises OSError."""
        if name not in self._held:
            return self._mapped.forget(name)
        tensor, data = self._tensors[name], memoryview(self._held.pop(name).reshape(-1).view(np.uint8))
        with tensor.file.open("r+b", buffering=0) as file:
            file.seek(tensor.start)
            while data:
                data = data[file.write(data) :]


# --- reading -------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, by name; nothing but the headers is read.

    Raises ConfigError for a folder without them, an index that does not agree with the files, and damaged files.
    """
    if (folder / INDEX).exists():
        return _read_sharded(folder)
    if (folder / SINGLE).exists():
        return read_file(folder / SINGLE)
    found = sorted(path.name for path in folder.iterdir())
    torch = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    hint = (
        f"{torch[0]} is a pickle, which runs code when read: load it in transformers and "
        "save_pretrained(..., safe_serialization=True)"
        if torch
        else f"it holds {', '.join(found[:8]) or 'nothing'}"
    )
    raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}; {hint}")


def _read_sharded(folder: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = {name: str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / INDEX} is not an index of safetensors files: {error!r}") from error
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            some = next(name for name, other in files.items() if other == file)
            raise ConfigError(f"{folder / file} is missing: {INDEX} says that it holds {some!r}")
        held = read_file(folder / file)
        if lost := [name for name, other in files.items() if other == file and name not in held]:
            raise ConfigError(f"{folder / file} does not hold {lost[0]!r}, which {INDEX} says that it does")
        tensors |= {name: tensor for name, tensor in held.items() if files.get(name) == file}
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises ConfigError if its header is damaged or it is shorter than its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise ConfigError(f"{path} is truncated or not a safetensors file: {size:,} bytes, header of {length:,}")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            found = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in entries.items()}
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} has a damaged header: {error!r}") from error
    for name, tensor in found.items():
        if tensor.start + tensor.nbytes != ends[name]:
            raise ConfigError(
                f"{path}: {name!r} is {tensor.dtype}{list(tensor.shape)}, {tensor.nbytes:,} bytes, "
                f"but its place has {ends[name] - tensor.start:,}"
            )
    if (wanted := max(ends.values(), default=8 + length)) > size:
        name = next(name for name, end in ends.items() if end == wanted)
        raise ConfigError(f"{path} is truncated: {size:,} bytes of {wanted:,}; {name!r} is not whole")
    return found


def _entry(path: Path, name: str, entry: Mapping[str, Any], data: int) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise ConfigError(
            f"{path}: {name!r} is of dtype {entry['dtype']}, and what is read is {', '.join(DTYPES)}\n"
            "quantized weights are converted by the stack that made them: save the checkpoint in bfloat16 there"
        )
    shape = tuple(int(size) for size in entry["shape"])
    return Tensor(file=path, dtype=entry["dtype"], shape=shape, start=data + int(entry["data_offsets"][0]))


# --- writing -------------------------------------------------------------------------------------------------------


def create(
    folder: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_shard_bytes: int
) -> dict[str, Tensor]:
    """Files for (name, dtype, shape) in order, of at most `max_shard_bytes` or one tensor each, and the index.

    The space is taken now, so that a full disk is found here and not under a memory map. Files that are there already
    with the right size are left as they are: a conversion that was cut off goes on in them.
    """
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = math.prod(tensor[2]) * np.dtype(DTYPES[tensor[1]]).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    placed: dict[str, Tensor] = {}
    for file, shard in zip(names, shards, strict=True):
        placed |= _create_file(folder / file, shard)
    if len(shards) > 1:
        weight_map = {name: tensor.file.name for name, tensor in placed.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return placed


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


def _create_file(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, Tensor]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    data = 8 + len(text)
    if not (path.exists() and path.stat().st_size == data + end):
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, data + end)
    del header["__metadata__"]
    return {name: _entry(path, name, entry, data) for name, entry in header.items()}
