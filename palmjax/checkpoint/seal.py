"""Checksums of a checkpoint's files: `checksums.json`, written last, lists every file with its size and CRC-32.

A checkpoint without it, or with a file that is not what it lists, is damaged. On a local folder every byte is checked
before a run goes on from it: the processes of a job share the files among them, as each sums up those that it wrote. An
object store keeps checksums of its own and serves no wrong byte, so there the sizes are compared and the small files
read; what the arrays must be, their digests say in either case. A storage that does not answer is no damage: it is
asked again, and then the run ends without a word against the checkpoint.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError
from palmjax.files import write_whole
from palmjax.model_dir import patiently

FILE = "checksums.json"
FORMAT = 1
WAIT_SECONDS = 1200.0
"""Process 0 waits this long for the checksums of the others, as Orbax does for their files."""

_BLOCK = 1 << 22
_THREADS = 8  # zlib lets go of the interpreter while it sums
_PART = re.compile(r"checksums\.\d+\.json(\.part)?")
_WRITER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")


class Damaged(ConfigError):
    """A checkpoint is not what was saved. Its text names the folder and what is wrong with it."""


def files(folder: Any) -> list[str]:
    """Every file below `folder` but the lists of checksums, by its path in there, sorted."""
    if isinstance(folder, Path):
        found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    else:
        found = list(_remote_files(folder, ""))
    return sorted(name for name in found if name != FILE and not _PART.fullmatch(name))


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


# --- writing -------------------------------------------------------------------------------------------------------


def _encode(listed: Mapping[str, Any]) -> bytes:
    body = {"format": FORMAT, "files": dict(sorted(listed.items()))}
    text = json.dumps(body, indent=0)
    return json.dumps({"checksum": zlib.crc32(text.encode()), **body}, indent=0).encode()


def _decode(data: bytes) -> dict[str, tuple[int, int | None]] | None:
    """The list, or None if these are not the very bytes that `_encode` made."""
    try:
        value = json.loads(data)
        listed = {str(name): (int(size), crc) for name, (size, crc) in value["files"].items()}
        # Written again from what was understood, it must be the same to the byte.
        intact = _encode(listed) == data and all(crc is None or type(crc) is int for _, crc in listed.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return listed if intact else None


def writer_of(name: str, processes: int) -> int:
    """The process that wrote a file, and that sums it up: Orbax gives each a folder. What all share is process 0's."""
    match = _WRITER.search(name)
    return int(match[1]) % processes if match else 0


def write(folder: Any, process: int = 0, processes: int = 1) -> int:
    """Lists every file of `folder` in its `checksums.json`; nothing may be written there later. Returns their bytes.

    Every process of a job calls it when all files are there. Each lists its own; process 0, which returns last, joins
    the lists, and the others return 0. Raises OSError, on process 0 also for a list that does not come.
    """

    def entry(name: str) -> tuple[str, list[int | None]]:
        path = folder / name
        crc = _crc(path) if isinstance(folder, Path) or not _is_data(name) else None
        return name, [_size(path), crc]

    names = files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = dict(pool.map(entry, [name for name in names if writer_of(name, processes) == process]))
    if process:
        write_whole(folder / f"checksums.{process}.json", _encode(listed))
        return 0
    for other in range(1, processes):
        listed |= {name: list(entry) for name, entry in _await(folder / f"checksums.{other}.json").items()}
    if missing := [name for name in names if name not in listed]:
        raise OSError(f"no process has summed up {missing[0]}")
    write_whole(folder / FILE, _encode(listed))
    for other in range(1, processes):
        (folder / f"checksums.{other}.json").unlink()
    return sum(size or 0 for size, _ in listed.values())


def _await(path: Any) -> dict[str, tuple[int, int | None]]:
    """The list of another process, once it is there."""
    deadline, pause = time.monotonic() + WAIT_SECONDS, 0.002
    while True:
        try:
            if (listed := _decode(path.read_bytes())) is not None:
                return listed
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            raise OSError(f"{path.name} has not come in {WAIT_SECONDS:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


# --- reading -------------------------------------------------------------------------------------------------------


def read(folder: Any) -> dict[str, tuple[int, int | None]] | None:
    """{file: (bytes, CRC-32 or None)}; None if there is no list.

    Raises Damaged if it is not what was written, Unreadable if the storage fails.
    """
    try:
        data = patiently(folder / FILE, lambda path: path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{folder} is damaged: {FILE} is {error.strerror}") from error
    listed = _decode(data)
    if listed is None:
        raise Damaged(f"{folder} is damaged: {FILE} is not what was written")
    return listed


def read_file(folder: Any, name: str) -> bytes:
    """The bytes of one small file, checked if the folder has a list. Raises Damaged, Unreadable, FileNotFoundError."""
    listed, data = read(folder), patiently(folder / name, lambda path: path.read_bytes())
    if listed is not None and listed.get(name) != (len(data), zlib.crc32(data)):
        raise Damaged(f"{folder} is damaged: {name} is not what was written")
    return data


def check(folder: Any, *, whole: bool, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files, a line each; [] if nothing is. A folder without a list has nothing to compare.

    whole: whether to read every byte; else the sizes are compared and only what is not arrays is read.
    share: (i, n): look only at the i-th of n parts of the files. Raises Unreadable.
    """
    listed = read(folder)
    if listed is None:
        return []
    mine = [name for i, name in enumerate(sorted(listed)) if i % share[1] == share[0]]

    def problem(name: str) -> str | None:
        size, crc = listed[name]
        try:
            if (now := patiently(folder / name, _size)) != size:
                return f"{name} has {now:,} bytes instead of {size:,}"
            if crc is not None and (whole or not _is_data(name)) and patiently(folder / name, _crc) != crc:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [line for line in pool.map(problem, mine) if line is not None]
