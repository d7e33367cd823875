"""Checksums of a checkpoint's files: `checksums.json`, written last, lists every file with its size and CRC-32.

A checkpoint without it, or with a file that is not what it lists, is damaged. On a local folder every byte is checked
before a run goes on from it: the processes of a job share the files among them. An object store keeps checksums of its
own and serves no wrong byte, so there the sizes are compared and the small files read; what the arrays must be, their
digests say in either case.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError

FILE = "checksums.json"
FORMAT = 1
_BLOCK = 1 << 22
_THREADS = 8  # zlib lets go of the interpreter while it sums


class Damaged(ConfigError):
    """A checkpoint is not what was saved. Its text names the folder and what is wrong with it."""


def files(folder: Any) -> list[str]:
    """Every file below `folder` but the list itself, by its path in there, sorted."""
    if isinstance(folder, Path):
        found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    else:
        found = list(_remote_files(folder, ""))
    return sorted(name for name in found if name != FILE)


def _remote_files(folder: Any, prefix: str) -> Iterable[str]:
    for child in folder.iterdir():
        if child.is_dir():
            yield from _remote_files(child, f"{prefix}{child.name}/")
        else:
            yield prefix + child.name


def _is_data(name: str) -> bool:
    """Whether a file holds arrays: all but a few kilobytes of a checkpoint lie in the `d/` folders."""
    return "/d/" in name


def _crc(path: Any) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _size(path: Any) -> int:
    return int(path.stat().st_size if isinstance(path, Path) else path.stat().length)


def _encode(listed: Mapping[str, Any]) -> bytes:
    body = {"format": FORMAT, "files": dict(sorted(listed.items()))}
    text = json.dumps(body, indent=0)
    return json.dumps({"checksum": zlib.crc32(text.encode()), **body}, indent=0).encode()


def write(folder: Any) -> int:
    """Lists every file of `folder` in its `checksums.json`. Returns their bytes. Nothing may be written there later."""

    def entry(name: str) -> tuple[str, list[int | None]]:
        path = folder / name
        crc = _crc(path) if isinstance(folder, Path) or not _is_data(name) else None
        return name, [_size(path), crc]

    with ThreadPoolExecutor(_THREADS) as pool:
        listed = dict(pool.map(entry, files(folder)))
    path = folder / FILE
    if isinstance(path, Path):
        with path.open("wb") as file:
            file.write(_encode(listed))
            file.flush()
            os.fsync(file.fileno())
    else:
        path.write_bytes(_encode(listed))
    return sum(size or 0 for size, _ in listed.values())


def read(folder: Any) -> dict[str, tuple[int, int | None]] | None:
    """{file: (bytes, CRC-32 or None)}; None if there is no list. Raises Damaged if the list itself is."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        value = json.loads(data)
        listed = {str(name): (int(size), crc) for name, (size, crc) in value["files"].items()}
        # Written again from what was understood, it must be the same to the byte.
        intact = _encode(listed) == data and all(crc is None or type(crc) is int for _, crc in listed.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{folder} is damaged: {FILE} can't be read") from error
    if not intact:
        raise Damaged(f"{folder} is damaged: {FILE} is not what was written")
    return listed


def read_file(folder: Any, name: str) -> bytes:
    """The bytes of one small file, checked if the folder has a list. Raises Damaged, or OSError."""
    listed, data = read(folder), (folder / name).read_bytes()
    if listed is not None and listed.get(name) != (len(data), zlib.crc32(data)):
        raise Damaged(f"{folder} is damaged: {name} is not what was written")
    return data


def check(folder: Any, *, whole: bool, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files, a line each; [] if nothing is. A folder without a list has nothing to compare.

    whole: whether to read every byte; else the sizes are compared and only what is not arrays is read.
    share: (i, n): look only at the i-th of n parts of the files.
    """
    listed = read(folder)
    if listed is None:
        return []
    mine = [name for i, name in enumerate(sorted(listed)) if i % share[1] == share[0]]

    def problem(name: str) -> str | None:
        size, crc = listed[name]
        path = folder / name
        try:
            if not path.exists():
                return f"{name} is missing"
            if (now := _size(path)) != size:
                return f"{name} has {now:,} bytes instead of {size:,}"
            if crc is not None and (whole or not _is_data(name)) and _crc(path) != crc:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} can't be read: {error.strerror or error}"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [line for line in pool.map(problem, mine) if line is not None]
