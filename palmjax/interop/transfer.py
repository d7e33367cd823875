"""Moves tensors between another stack's files and palmjax's checkpoints, one after the other, in bounded memory.

A large tensor is never held as a whole on the way from safetensors or to them: it is a memory map of which blocks of
`checkpoint.arrays.CHUNK_BYTES` are copied, about `IN_FLIGHT_BYTES` of them being read or written meanwhile.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
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


class Source(Protocol):
    """Tensors of another stack to be read, by name."""

    def array(self, name: str) -> np.ndarray:
        """The tensor, contiguous."""
        ...

    def forget(self, name: str) -> None:
        """The tensor is not needed for now: what it takes in memory can go."""
        ...


class Target(Protocol):
    """Tensors of another stack to be written, by name."""

    def array(self, name: str) -> np.ndarray:
        """What becomes the tensor, contiguous, to be filled."""
        ...

    def forget(self, name: str) -> None:
        """Part of the tensor is filled and needs no memory of ours for now."""
        ...

    def put(self, name: str) -> None:
        """The tensor is filled: writes what of it is not in its file yet. Raises OSError."""
        ...


def _view(array: np.ndarray, part: Part) -> layout.View:
    return layout.View.of(array, part.pattern, part.sizes, part.take)


def receive(
    planned: Mapping[str, Tensor],
    source: Source,
    writer: Writer,
    shapes: Mapping[Path, tuple[int, ...]],
    staging: Staging,
    count: Count,
    root: str = "params",
    dtype: Any = np.float32,
) -> None:
    """Writes every planned tensor's parts into the arrays of `writer`, below `root`. Raises ConfigError if it can't."""
    writes: collections.deque[tuple[int, Any]] = collections.deque()
    whole: collections.deque[tuple[int, str]] = collections.deque()  # with how many writes had begun by a tensor's end
    begun = in_flight = 0

    def settle(limit: int) -> None:
        """Waits for the oldest writes until those in flight have at most `limit` bytes."""
        nonlocal in_flight
        while in_flight > limit:
            size, commit = writes.popleft()
            commit.result()
            in_flight -= size
        finished = []
        while whole and whole[0][0] <= begun - len(writes):
            finished.append(whole.popleft()[1])
        if finished:
            staging.finished(finished)

    try:
        for name, tensor in planned.items():
            size = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
            if (key := f"{root}:{name}") in staging.done:
                count(size)
                continue
            array, since = source.array(name), 0
            for part in tensor.parts:
                view, shape = _view(array, part), shapes[part.parameter]
                chunks = layout.chunk_shape(view.shape, np.dtype(dtype).itemsize, CHUNK_BYTES)
                store = writer.array((root, *part.parameter), shape, dtype, (1,) * len(part.index) + chunks)
                for block in view.blocks(chunks):
                    values = view.read(block, dtype)
                    write = store[(*part.index, *block)].write(values, can_reference_source_data_indefinitely=True)
                    writes.append((values.nbytes, write.commit))
                    begun, in_flight, since = begun + 1, in_flight + values.nbytes, since + values.nbytes
                    count(values.nbytes)
                    if since >= IN_FLIGHT_BYTES:
                        source.forget(name)
                        since = 0
                    settle(IN_FLIGHT_BYTES)
            del array
            source.forget(name)
            whole.append((begun, key))
        settle(0)
    except ValueError as error:  # TensorStore's, with the path and the system's reason
        raise ConfigError(f"{staging.folder} can't be written: {str(error).splitlines()[0][:200]}") from error


def send(
    planned: Mapping[str, Tensor],
    reader: Reader,
    target: Target,
    staging: Staging,
    count: Count,
    root: str = "params",
) -> None:
    """Reads every planned tensor's parts from the arrays of `reader`, below `root`, into the tensors of `target`.

    Raises ConfigError if it can't.
    """
    missing = {name: tensor for name, tensor in planned.items() if f"{root}:{name}" not in staging.done}
    count(sum(_bytes(tensor.shape) for name, tensor in planned.items() if name not in missing))
    ahead: collections.deque[_Read] = collections.deque()
    in_flight = since = 0

    def put(read: _Read) -> None:
        nonlocal in_flight, since
        read.view.write(read.block, read.values())
        in_flight, since = in_flight - read.nbytes, since + read.nbytes
        count(read.nbytes)
        if read.is_last:
            target.put(read.name)
            staging.finished([f"{root}:{read.name}"])
        elif since >= IN_FLIGHT_BYTES:
            target.forget(read.name)
            since = 0

    try:
        for read in _reads(missing, reader, target, root):
            ahead.append(read)
            in_flight += read.nbytes
            while in_flight > IN_FLIGHT_BYTES:
                put(ahead.popleft())
        while ahead:
            put(ahead.popleft())
    except OSError as error:
        raise ConfigError(f"{staging.folder} can't be written: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class _Read:
    """A block that is being read for the tensor `name`; is_last: of that tensor's."""

    name: str
    view: layout.View
    block: tuple[slice, ...]
    result: Any
    is_last: bool

    @property
    def nbytes(self) -> int:
        """In float32."""
        return _bytes(tuple(s.stop - s.start for s in self.block))

    def values(self) -> np.ndarray:
        """Raises ConfigError if they can't be read."""
        try:
            return self.result.result()
        except ValueError as error:
            raise ConfigError(f"the checkpoint is damaged: {str(error).splitlines()[0][:200]}") from error


def _reads(planned: Mapping[str, Tensor], reader: Reader, target: Target, root: str) -> Iterator[_Read]:
    """Begins to read block after block, as it is asked for them."""
    for name, tensor in planned.items():
        array, blocks = target.array(name), []
        for part in tensor.parts:
            view, whole = _view(array, part), reader.open(".".join((root, *part.parameter)))
            store = whole[part.index] if part.index else whole
            chunks = read_chunks(whole)[len(part.index) :]
            blocks += [(view, store, block) for block in view.blocks(chunks)]
        for i, (view, store, block) in enumerate(blocks):
            yield _Read(name, view, block, store[block].read(), is_last=i == len(blocks) - 1)


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)
