"""What can be said of checkpoints without their model: whether they are what was saved, and how two of them differ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from palmjax.checkpoint import digest, seal
from palmjax.checkpoint.arrays import CHUNK_BYTES, Reader
from palmjax.checkpoint.reading import read_info
from palmjax.config import ConfigError, section
from palmjax.model_dir import Unreadable, as_path
from palmjax.provenance import RunInfo


@section
class Verdict:
    """What `verify` found. problems: a line each, empty if the checkpoint is what was saved. notes: what could not be
    checked, and why.
    """

    files: int
    arrays: int
    bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def verify(folder: str) -> Verdict:
    """Reads every file and every array of a checkpoint and compares them with what was recorded when it was saved.

    Raises nothing for damage of any kind: that is what it reports. Raises Unreadable if the storage fails.
    """
    path = as_path(folder)
    problems: list[str] = []
    notes: list[str] = []
    listed: Mapping[str, Any] = {}
    try:
        listed = seal.read(path) or {}
        problems += seal.check(path, whole=True)
        info = read_info(path)
    except Unreadable:
        raise
    except ConfigError as error:
        return Verdict(files=len(listed), arrays=0, bytes=0, problems=(*problems, str(error).split("; ")[0]))
    if not listed:
        notes.append("its files have no checksums: it was written by an older palmjax")
    missing = [name for name in info.arrays if name not in info.digests]
    if missing:
        notes.append(f"{len(missing)} of {len(info.arrays)} arrays have no digest")
    if not problems:  # else it is known to be damaged, and whatever reads it may fail anyhow
        problems += _wrong_arrays(path, info)
    return Verdict(
        files=len(listed),
        arrays=len(info.arrays) - len(missing),
        bytes=sum(size for size, _ in listed.values()),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _wrong_arrays(path: Any, info: RunInfo) -> Iterator[str]:
    reader = Reader(path / "state")
    for name, wanted in info.digests.items():
        try:
            array = reader.open(name.replace("/", "."))
            total = np.zeros(2, np.uint32)
            for row, block in _blocks(array):
                total += np.asarray(digest.sums(jnp.asarray(block), row))
        except (ConfigError, ValueError, OSError) as error:
            yield f"{name} can't be read: {str(error).splitlines()[0][:200]}"
            continue
        if digest.text(total) != wanted:
            yield f"{name} has not the values that were saved"


def _blocks(array: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a TensorStore array, some megabytes at a time; a scalar is one block."""
    if not array.shape:
        yield 0, np.asarray(array.read().result())
        return
    row_bytes = math.prod(array.shape[1:]) * array.dtype.numpy_dtype.itemsize
    rows = max(1, CHUNK_BYTES * 8 // max(1, row_bytes))
    for first in range(0, array.shape[0], rows):
        yield first, np.asarray(array[first : min(first + rows, array.shape[0])].read().result())


@section
class Change:
    """An array of two checkpoints. before, after: what it is, or "" where it is not there.

    largest: the largest absolute difference; 0 and not `same` for other bits of equal values (-0.0, NaN payloads);
    infinite if an element is NaN in one of them only.
    """

    name: str
    before: str
    after: str
    same: bool
    largest: float = 0.0


def diff(a: str, b: str) -> tuple[list[Change], list[str]]:
    """(a Change for each array, lines on what else differs: step, data position, configuration, versions).

    Raises ConfigError if one of them can't be read.
    """
    paths, infos = (as_path(a), as_path(b)), (read_info(a), read_info(b))
    readers = [Reader(path / "state") for path in paths]
    changes = []
    for name in dict.fromkeys([*infos[0].arrays, *infos[1].arrays]):
        before, after = (info.arrays.get(name, "") for info in infos)
        if before != after:
            changes.append(Change(name=name, before=before, after=after, same=False, largest=math.nan))
            continue
        first, second = (reader.open(name.replace("/", ".")) for reader in readers)
        same, largest = True, 0.0
        for (_, x), (_, y) in zip(_blocks(first), _blocks(second), strict=True):
            if x.tobytes() != y.tobytes():
                same, largest = False, float(np.fmax(largest, _distance(x, y)))
        changes.append(Change(name=name, before=before, after=after, same=same, largest=largest))
    return changes, list(_other_differences(*infos))


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """Largest absolute difference; infinite if NaN is in one and not in the other."""
    x, y = (v.astype(np.float64) for v in (x, y))
    if (np.isnan(x) != np.isnan(y)).any():
        return math.inf
    return float(np.max(np.abs(np.where((x == y) | np.isnan(x), 0.0, x - y))))


def _other_differences(a: RunInfo, b: RunInfo) -> Iterator[str]:
    def flat(info: RunInfo) -> dict[str, Any]:
        beside = {"step": info.step, "data.first_row": info.data.first_row, "data.skips": info.data.skips}
        beside |= {"data.fingerprint": info.data.fingerprint, "vocabulary": info.vocabulary.fingerprint}
        maps = {"mesh": info.mesh, "code": info.code, "libraries": info.libraries, "metrics": info.metrics}
        beside |= {f"{kind}.{name}": value for kind, values in maps.items() for name, value in values.items()}
        return beside | {f"config.{name}": value for name, value in info.flat_config.items()}

    before, after = flat(a), flat(b)
    for name in dict.fromkeys(itertools.chain(before, after)):
        old, new = before.get(name, "not set"), after.get(name, "not set")
        if old != new:
            yield f"{name}: {old} -> {new}"
