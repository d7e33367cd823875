"""Moves tensors between another stack's files and palmjax's checkpoints, one after the other, in bounded memory.

A tensor is never held as a whole on the way from safetensors or to them: it is a memory map of which blocks of
`checkpoint.arrays.CHUNK_BYTES` are copied, `IN_FLIGHT_BYTES` of them at a time.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from palmjax.checkpoint.arrays import CHUNK_BYTES, Reader, Writer, read_chunks
from palmjax.config import ConfigError
from palmjax.interop import layout
from palmjax.interop.mapping import Part, Path, Tensor
from palmjax.interop.staging import Staging

IN_FLIGHT_BYTES = 32 << 20

Count = Callable[[int], None]
"""Told of bytes that were moved."""


class Foreign(Protocol):
    """Tensors of another stack, by name."""

    def array(self, name: str) -> np.ndarray:
        """The tensor, contiguous; writes to it stay."""
        ...

    def forget(self, name: str) -> None:
        """The tensor is not needed for now: what it takes in memory can go."""
        ...


def _view(array: np.ndarray, part: Part) -> layout.View:
    return layout.View.of(array, part.pattern, part.sizes, part.take)


def receive(
    planned: Mapping[str, Tensor],
    source: Foreign,
    writer: Writer,
    shapes: Mapping[Path, tuple[int, ...]],
    staging: Staging,
    count: Count,
    root: str = "params",
    dtype: Any = np.float32,
) -> None:
    """Writes every planned tensor's parts into the arrays of `writer`, below `root`. Raises ConfigError if it can't."""
    writes: list[Any] = []
    in_flight, whole = 0, []

    def settle() -> None:
        for write in writes:
            write.result()
        writes.clear()
        if whole:
            staging.finished(whole)
            whole.clear()

    try:
        for name, tensor in planned.items():
            size = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
            if (key := f"{root}:{name}") in staging.done:
                count(size)
                continue
            array = source.array(name)
            for part in tensor.parts:
                view, shape = _view(array, part), shapes[part.parameter]
                chunks = layout.chunk_shape(view.shape, np.dtype(dtype).itemsize, CHUNK_BYTES)
                store = writer.array((root, *part.parameter), shape, dtype, (1,) * len(part.index) + chunks)
                for block in view.blocks(chunks):
                    values = view.read(block, dtype)
                    write = store[(*part.index, *block)].write(values, can_reference_source_data_indefinitely=True)
                    writes.append(write.commit)
                    in_flight += values.nbytes
                    count(values.nbytes)
                    if in_flight >= IN_FLIGHT_BYTES:
                        settle()
                        source.forget(name)
                        in_flight = 0
            del array
            source.forget(name)
            whole.append(key)
        settle()
    except ValueError as error:  # TensorStore's, with the path and the system's reason
        raise ConfigError(f"{staging.folder} can't be written: {str(error).splitlines()[0][:200]}") from error


def send(
    planned: Mapping[str, Tensor],
    reader: Reader,
    target: Foreign,
    staging: Staging,
    count: Count,
    root: str = "params",
) -> None:
    """Reads every planned tensor's parts from the arrays of `reader`, below `root`, into the tensors of `target`."""
    for name, tensor in planned.items():
        if (key := f"{root}:{name}") in staging.done:
            count(int(np.prod(tensor.shape)) * 4)
            continue
        array = target.array(name)
        for part in tensor.parts:
            view, whole = _view(array, part), reader.open(".".join((root, *part.parameter)))
            store = whole[part.index] if part.index else whole
            chunks = read_chunks(whole)[len(part.index) :]
            ahead: collections.deque[tuple[Any, Any]] = collections.deque()
            in_flight = since = 0
            for block in view.blocks(chunks):
                ahead.append((block, store[block].read()))
                in_flight += _bytes(block)
                while in_flight >= IN_FLIGHT_BYTES:
                    in_flight -= (size := _put(view, *ahead.popleft()))
                    count(size)
                    since += size
                if since >= IN_FLIGHT_BYTES:
                    target.forget(name)
                    since = 0
            while ahead:
                count(_put(view, *ahead.popleft()))
        del array
        target.forget(name)
        staging.finished([key])


def _bytes(block: tuple[slice, ...]) -> int:
    return 4 * int(np.prod([s.stop - s.start for s in block]))


def _put(view: layout.View, block: tuple[slice, ...], read: Any) -> int:
    """Writes a block that was being read. Returns its bytes in float32. Raises ConfigError if it can't be read."""
    try:
        values = read.result()
    except ValueError as error:
        raise ConfigError(f"the checkpoint is damaged: {str(error).splitlines()[0][:200]}") from error
    view.write(block, values)
    return _bytes(block)
