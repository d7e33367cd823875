"""How the elements of one array lie in another, said in a line and copied block by block. Imports numpy only.

    "(h 3 n) d -> d h n"

The left side is the foreign array, a group in brackets being one of its dimensions; the right side is palmjax's. Of an
axis a range may be taken (`take`); one that is only on the left has one of its indices taken. Nothing is ever copied
whole: a `View` reads and writes blocks, so that a tensor larger than memory can pass through.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Groups = tuple[tuple[str, ...], ...]
Take = tuple[int, int]
"""First index and end of a range; negative numbers count from the end, and an end of 0 is the end."""

TILE = 128
"""Values along each side of a transposed tile: it fits a core's L2 cache, and a call costs little beside copying it."""
PADDING = 16
"""Values between the rows of a tile: with rows a power of two apart, as in most models, a column would lie in a few
sets of the cache and push itself out."""


@functools.cache
def _parse(pattern: str) -> tuple[Groups, Groups]:
    def side(text: str) -> Groups:
        words = re.findall(r"\(([^)]*)\)|(\S+)", text)
        return tuple(tuple(group.split()) if group else (single,) for group, single in words)

    left, right = pattern.split("->")
    return side(left), side(right)


def sizes_of(
    pattern: str, shape: tuple[int, ...], known: Mapping[str, int], take: Mapping[str, Take]
) -> dict[str, int]:
    """Size of every axis of `pattern`, whose right side has `shape`. `known`: of axes that the shape does not give."""
    left, right = _parse(pattern)
    sizes = {axis: int(axis) for group in left for axis in group if axis.isdigit()}
    sizes |= {axis: known[axis] for group in left for axis in group if axis in known}
    assert len(right) == len(shape), f"{pattern}: {len(right)} dimensions for an array of shape {shape}"
    for group, size in zip(right, shape, strict=True):
        if len(group) == 1 and group[0] not in sizes:
            sizes[group[0]] = size
    missing = [axis for group in left for axis in group if axis not in sizes]
    assert not missing, f"{pattern}: size of {missing} is not known"
    for group, size in zip(right, shape, strict=True):
        taken = math.prod(len(range(*_range(take.get(axis), sizes[axis]))) for axis in group)
        assert taken == size, f"{pattern}: {group} is {taken} and the array has {size}"
    return sizes


def foreign_shape(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of the left side."""
    return tuple(math.prod(sizes[axis] for axis in group) for group in _parse(pattern)[0])


def _range(take: Take | None, size: int) -> Take:
    if take is None:
        return 0, size
    start, stop = (index + size if index < 0 else index for index in take)
    return start, stop or size


@dataclasses.dataclass(frozen=True)
class View:
    """A foreign array, seen as palmjax's: right-side `shape`, blocks by slices. Writes go to the foreign array."""

    shape: tuple[int, ...]
    _atoms: np.ndarray  # one dimension for each axis of the right side, in its order
    _groups: tuple[tuple[int, ...], ...]  # sizes of the atoms of each dimension

    @classmethod
    def of(
        cls, array: np.ndarray, pattern: str, sizes: Mapping[str, int], take: Mapping[str, Take] | None = None
    ) -> View:
        """The view of `array`, which has the left side's shape and lies contiguously."""
        (left, right), take = _parse(pattern), take or {}
        axes = [axis for group in left for axis in group]
        atoms = array.reshape([sizes[axis] for axis in axes])
        atoms = atoms[tuple(slice(*_range(take.get(axis), sizes[axis])) for axis in axes)]
        kept = [axis for group in right for axis in group]
        dropped = tuple(i for i, axis in enumerate(axes) if axis not in kept)
        atoms = atoms.squeeze(dropped)
        left_order = [axis for axis in axes if axis in kept]
        atoms = atoms.transpose([left_order.index(axis) for axis in kept])
        width = iter(atoms.shape)
        groups = tuple(tuple(itertools.islice(width, len(group))) for group in right)
        return cls(tuple(math.prod(group) for group in groups), atoms, groups)

    def blocks(self, chunks: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """The blocks of a grid of `chunks`, in the order in which they lie in the foreign array."""
        first_atoms = itertools.accumulate((len(group) for group in self._groups[:-1]), initial=0)
        strides = [abs(self._atoms.strides[atom]) for atom, _ in zip(first_atoms, self._groups, strict=True)]
        order = sorted(range(len(self.shape)), key=lambda axis: -strides[axis])
        starts = [range(0, self.shape[axis], chunks[axis]) for axis in order]
        for corner in itertools.product(*starts):
            at = dict(zip(order, corner, strict=True))
            yield tuple(slice(at[i], min(at[i] + chunks[i], size)) for i, size in enumerate(self.shape))

    def read(self, block: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """The values of a block as a new array of `dtype`."""
        out = np.empty([s.stop - s.start for s in block], dtype)
        for here, there in self._segments(block):
            copy(out[here], self._atoms[there])
        return out

    def write(self, block: tuple[slice, ...], values: np.ndarray) -> None:
        """Puts `values` where the block lies in the foreign array, in that array's dtype."""
        for here, there in self._segments(block):
            copy(self._atoms[there], values[here])

    def _segments(self, block: tuple[slice, ...]) -> Iterator[tuple[tuple, tuple]]:
        """(index in the block, index in the atoms) of parts whose indices have the same number of dimensions."""
        parts = [list(_split(s, group)) for s, group in zip(block, self._groups, strict=True)]
        for combination in itertools.product(*parts):
            yield tuple(here for here, _ in combination), tuple(itertools.chain(*(there for _, there in combination)))


def _split(part: slice, group: tuple[int, ...]) -> Iterator[tuple[slice, tuple]]:
    """(place in the block, index of the atoms) of `part` of a dimension that is made of `group`."""
    if len(group) == 1:
        yield slice(0, part.stop - part.start), (part,)
        return
    inner = math.prod(group[1:])
    for outer in range(part.start // inner, -(-part.stop // inner)):
        start, stop = max(part.start, outer * inner), min(part.stop, (outer + 1) * inner)
        for here, there in _split(slice(start - outer * inner, stop - outer * inner), group[1:]):
            offset = start - part.start
            yield slice(here.start + offset, here.stop + offset), (outer, *there)


def copy(to: np.ndarray, source: np.ndarray) -> None:
    """`to[...] = source`, in tiles where one is transposed: many times as fast as in numpy's own order."""
    rows, columns = _fastest(to), _fastest(source)
    if rows == columns or to.size < TILE * TILE:
        to[...] = source
        return
    tile = np.empty((TILE, TILE + PADDING), source.dtype)
    others = [range(size) if axis not in (rows, columns) else (slice(None),) for axis, size in enumerate(to.shape)]
    for index in itertools.product(*others):
        target, values = to[index], source[index]
        if columns < rows:
            target, values = target.T, values.T
        for i in range(0, target.shape[0], TILE):
            for j in range(0, target.shape[1], TILE):
                piece = values[i : i + TILE, j : j + TILE]
                held = tile[: piece.shape[0], : piece.shape[1]]
                held[...] = piece
                target[i : i + TILE, j : j + TILE] = held


def _fastest(array: np.ndarray) -> int:
    """The dimension of more than one element along which neighbours are closest."""
    candidates = [axis for axis, size in enumerate(array.shape) if size > 1]
    return min(candidates, key=lambda axis: abs(array.strides[axis]), default=0)


def chunk_shape(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
    """`shape` halved along its longest dimension until a chunk has at most `limit` bytes."""
    chunk = list(shape)
    while math.prod(chunk) * itemsize > limit and max(chunk) > 1:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)
