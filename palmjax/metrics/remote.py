"""Metrics on an object store (gs://...), which can't append: immutable part files, and a copy of what is local."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from palmjax.metrics.lines import PARTS, Lost, encode, files, is_rewind, part_name, survives
from palmjax.metrics.uploader import Pace, Uploader


class PartFiles:
    """Lines in MODEL_DIR/metrics/<step of the first>-<part>.jsonl. A full part is never touched again by this process;
    the last is written anew as it grows. An object store has no folders to make, and shows an object whole or not.

    `write` and `keep` are for the run's thread, `upload` for the uploader's; what is not uploaded waits in memory.
    """

    def __init__(self, model_dir: Any, start_step: int, pace: Pace, rewinds: int = 0):
        self.period = pace.lines
        self._model_dir, self._start_step, self._step, self._rewinds = model_dir, start_step, start_step, rewinds
        self._lines_per_part = pace.lines_per_part
        self._lock = threading.Lock()
        self._lines: list[tuple[int, bytes]] = []  # (step, line) of the open part, and of those after it
        self._sent = 0  # of the open part
        self._number: int | None = None  # of the open part; None until the parts of earlier processes are known

    def write(self, record: Mapping[str, Any]) -> None:
        line = encode(record).encode()
        self._step = record.get("step", self._step)
        with self._lock:
            self._lines.append((self._step, line))

    def upload(self) -> Iterator[None]:
        if self._number is None:
            # Before the first line of this process, so that a step is never there twice.
            self._number = 1 + (yield from self._drop_after())
        while True:
            with self._lock:
                part = self._lines[: self._lines_per_part]
            grown = len(part) > self._sent
            if grown:
                (self._model_dir / PARTS / part_name(part[0][0], self._number)).write_bytes(_text(part))
            full = len(part) == self._lines_per_part
            with self._lock:
                self._sent = 0 if full else len(part)
                if full:
                    del self._lines[: len(part)]
                    self._number += 1
            if grown:
                yield
            if not full:
                return

    def keep(self, folder: Path) -> int:
        """Writes the parts that are not uploaded into a local folder; returns how many of their lines are not."""
        with self._lock:
            lines, missing, number = list(self._lines), len(self._lines) - self._sent, self._number or 1
        for start in range(0, len(lines) if missing else 0, self._lines_per_part):
            part = lines[start : start + self._lines_per_part]
            path = folder / PARTS / part_name(part[0][0], number + start // self._lines_per_part)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_text(part))
        return missing

    def _drop_after(self) -> Generator[None, None, int]:
        """Removes what an earlier, killed process wrote of steps after `start_step`; returns the last place taken.

        What was logged before the last rewind is history and stays. Each part that loses steps says so (`Lost`).
        """
        last, history = 0, (-1, -1)
        for number, path in files(self._model_dir) if self._rewinds else ():
            for place, line in enumerate(path.read_bytes().splitlines(keepends=True)):
                if is_rewind(line, self._rewinds):
                    history = (number, place)
            yield
        for number, path in files(self._model_dir):
            lines = path.read_bytes().splitlines(keepends=True)
            kept, lost = [], Lost()
            for place, line in enumerate(lines):
                if (number, place) <= history or survives(line, self._start_step):
                    kept.append(line)
                else:
                    lost.add(line)
            if lost.seconds:
                kept.append(encode(lost.event(self._start_step)).encode())
            if not kept:
                path.unlink()
            else:
                last = number
                if kept != lines:
                    path.write_bytes(b"".join(kept))
            yield
        return last


class Mirror:
    """Copies each file of a local folder that has changed to the same place in a remote one."""

    def __init__(self, local: Path, remote: Any, pace: Pace):
        self.period = pace.events
        self._local, self._remote = local, remote
        self._sent: dict[Path, tuple[int, int]] = {}

    def upload(self) -> Iterator[None]:
        for file in sorted(path for path in self._local.rglob("*") if path.is_file()):
            stat = file.stat()
            version = (stat.st_size, stat.st_mtime_ns)
            if self._sent.get(file) != version:
                self._remote.joinpath(*file.relative_to(self._local).parts).write_bytes(file.read_bytes())
                self._sent[file] = version
                yield


class RemoteLines:
    """What `JsonLines` is to a file system, to an object store; and whatever is written into the folder `spool`.

    `write` and `flush` never wait for the network. A process killed outright loses the lines since the last upload,
    at most `pace.lines` seconds of them. What is not up when `close` gives up stays in `spool`, laid out as in
    MODEL_DIR, and `report` says so.
    """

    def __init__(self, model_dir: Any, start_step: int, report: Callable[[str], None], pace: Pace, rewinds: int = 0):
        self.spool = Path(tempfile.mkdtemp(prefix="palmjax-metrics-"))
        self._where, self._report = str(model_dir), report
        self._parts = PartFiles(model_dir, start_step, pace, rewinds)
        self._uploader = Uploader([self._parts, Mirror(self.spool, model_dir, pace)], self._where, report, pace)

    def write(self, record: Mapping[str, Any]) -> None:
        self._parts.write(record)

    def flush(self) -> None:
        """Has the lines uploaded soon."""
        self._uploader.ask(self._parts)

    def close(self) -> None:
        if self._uploader.close():
            shutil.rmtree(self.spool)
            return
        missing = self._parts.keep(self.spool)
        self._report(
            f"metrics did not all reach {self._where} ({missing} lines are missing): copy what is in {self.spool} there"
        )


def _text(part: list[tuple[int, bytes]]) -> bytes:
    return b"".join(line for _, line in part)
