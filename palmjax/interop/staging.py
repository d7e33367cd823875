"""Folders that are filled over several attempts and get their name when they are whole.

Beside the place of `NAME`, `NAME.converting/` holds what is written so far and `NAME.progress` says how far that is: a
line with what is being made from what, and a line for each part that is finished. Killed at any moment, the same
command goes on behind the last of them; another source or another result begins anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError

FLUSHES = 4
"""Files that are flushed at a time: one after the other, the disk would stand still between them."""


class Staging:
    """`folder`, to be renamed to `final`. done: names of the parts that earlier attempts finished."""

    def __init__(self, final: Path, identity: Mapping[str, Any]):
        """identity: a JSON value that decides every byte of the result; it must be equal for an attempt to go on."""
        self.final = final
        self.folder = final.with_name(f"{final.name}.converting")
        self._progress = final.with_name(f"{final.name}.progress")
        self.done: set[str] = set()
        self._disk, self._flushing = ThreadPoolExecutor(FLUSHES), None
        try:
            self._open(json.dumps(identity, sort_keys=True) + "\n")
        except OSError as error:
            raise ConfigError(f"{self.folder} can't be written: {error.strerror}") from error

    def _open(self, identity: str) -> None:
        lines = self._progress.read_text().splitlines(keepends=True) if self._progress.exists() else []
        if lines and lines[0] == identity and self.folder.is_dir():
            # A line without its end was being written when the attempt was killed.
            whole = [line for line in lines if line.endswith("\n")]
            self.done = {json.loads(line) for line in whole[1:]}
            os.truncate(self._progress, sum(len(line.encode()) for line in whole))
        else:
            self.abandon()
            self.folder.mkdir(parents=True)
            self._progress.write_text(identity)

    def finished(self, parts: Iterable[str]) -> None:
        """Notes parts that are written and need not be written again."""
        with self._progress.open("a") as file:
            file.write("".join(json.dumps(part) + "\n" for part in parts))
        self.done.update(parts)
        if self._flushing is None or self._flushing.done():  # so that little is left to be flushed at the end
            self._await_flushing()
            self._flushing = self._disk.submit(self._flush_behind)

    def _flush_behind(self) -> None:
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # TensorStore renames its files
                _flush(path)

    def _await_flushing(self) -> None:
        if self._flushing is not None:
            self._flushing.result()  # the system tells an error of the disk once: no later flush would

    def commit(self) -> None:
        """Flushes every file to the disk and gives the folder its name."""
        self._await_flushing()
        list(self._disk.map(_flush, (*self.folder.rglob("*"), self.folder)))
        self.folder.rename(self.final)
        _flush(self.final.parent)
        self._progress.unlink()

    def abandon(self) -> None:
        """Removes what is written so far."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._progress.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that can't flush folders
            raise
    finally:
        os.close(descriptor)
