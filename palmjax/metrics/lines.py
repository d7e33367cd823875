"""Metrics as JSON lines: metrics.jsonl on a file system, numbered part files where nothing can be appended to."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError
from palmjax.model_dir import as_path

FILE = "metrics.jsonl"
PARTS = "metrics"
_PART = re.compile(r"(\d{9,})-(\d{5,})\.jsonl")
_NOT_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# ------------------------------------------------------------------------------------------------------ a line


def encode(record: Mapping[str, Any]) -> str:
    """A record as a line of strict JSON. What JSON has no number for becomes "NaN", "Infinity", "-Infinity" (as in
    protobuf).
    """
    return json.dumps({name: _plain(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, NaN and the infinities as floats again; None if the line is torn or no record of ours."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None
    kind = record.get("kind")
    known = type(record.get("step", None if kind in ("train", "eval") else 0)) is int
    known = known and (kind != "eval" or isinstance(record.get("task"), str))
    known = known and (kind != "event" or isinstance(record.get("event"), str))
    if not known:
        return None
    return {name: _NOT_JSON.get(v, v) if isinstance(v, str) else v for name, v in record.items()}


def survives(line: bytes, step: int) -> bool:
    """Whether a line is whole and of no step after `step`."""
    record = parse(line)
    return record is not None and record.get("step", 0) <= step


def is_rewind(line: bytes, number: int) -> bool:
    """Whether a line is the event of the run's `number`-th rewind."""
    if b'"rewind"' not in line:  # most lines, without parsing them
        return False
    record = parse(line)
    return record is not None and record.get("event") == "rewind" and record.get("number") == number


# ----------------------------------------------------------------------------------------------- metrics.jsonl


class Lost:
    """What is dropped of a killed process, summed up: its steps are computed again, its evaluations too.

    steps, seconds: of train lines; evaluations: seconds; startup: seconds before its first step began to be made ready.
    """

    def __init__(self) -> None:
        self.steps, self.seconds, self.evaluations, self.startup = 0, 0.0, 0.0, 0.0

    def add(self, line: bytes) -> None:
        """Counts a line that is dropped; one that is torn tells nothing."""
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            record = json.loads(line)
            match record.get("kind"), record.get("event"):
                case "train", _:
                    self.seconds += record.get("seconds", 0.0)
                    self.steps += 1
                case "eval", _:
                    self.evaluations += record.get("seconds", 0.0)
                case _, "first step":
                    self.startup += sum(record["seconds"].get(phase, 0.0) for phase in ("imports", "data", "state"))

    def event(self, step: int) -> dict[str, Any]:
        """The line that tells of it, of a run that goes on from `step`. It has no "step", so that it is never lost."""
        return {"kind": "event", "event": "lost", "time": time.time(), "after": step, **vars(self)}


def drop_after(path: str, step: int, rewinds: int = 0) -> int:
    """Removes from a metrics.jsonl every line of a step after `step`, and lines that are torn; returns how many.

    A run that was killed has logged steps after its last checkpoint, and may have been killed inside a line. The file
    is replaced as a whole, so a kill in here loses nothing; an untouched or missing file is left as it is. Where steps
    are removed, an event "lost" says how many and how long they took (`Lost`).
    rewinds: how many the run has made; what was logged before the last of them is history and stays.
    """
    if not os.path.exists(path):
        return 0
    partial, dropped, history, lost = path + ".partial", 0, -1, Lost()
    try:
        if rewinds:
            with open(path, "rb") as lines:
                history = max((i for i, line in enumerate(lines) if is_rewind(line, rewinds)), default=-1)
        with open(path, "rb") as lines, open(partial, "wb") as kept:
            for number, line in enumerate(lines):
                if number <= history or survives(line, step):
                    kept.write(line)
                else:
                    dropped += 1
                    lost.add(line)
            if lost.seconds:
                kept.write(encode(lost.event(step)).encode())
            kept.flush()
            os.fsync(kept.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(partial)  # on a full disk it is in the way
        raise
    if dropped:
        os.replace(partial, path)
    else:
        os.remove(partial)
    return dropped


@contextlib.contextmanager
def _writable(path: str) -> Iterator[None]:
    """Makes a disk that is full, or not to be written, a ConfigError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free space" if full else "mend that"
        raise ConfigError(
            f"{path} can't be written: {error.strerror or error}; {advice} and run the same command again"
        ) from error


class JsonLines:
    """Appends one JSON object a line; a line is with the operating system, safe from a kill, when `write` returns.

    Makes the folder. Raises ConfigError if the file can't be written. A line that a full disk has cut short is dropped
    by the next process, as any torn line is.
    """

    def __init__(self, path: str, start_step: int, rewinds: int = 0):
        self._path = path
        with _writable(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            drop_after(path, start_step, rewinds)
            # No buffer: after a failure nothing is left that would fail once more in `close`.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, record: Mapping[str, Any]) -> None:
        line = encode(record).encode()
        with _writable(self._path):
            while line:
                line = line[self._file.write(line) :]

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._file.close()


# ------------------------------------------------------------------------------------------------------- parts


def part_name(first_step: int, number: int) -> str:
    """The name of a part: the step of its first line, and its place among all parts of the run, from 1 on."""
    return f"{first_step:09d}-{number:05d}.jsonl"


def files(model_dir: Any) -> list[tuple[int, Any]]:
    """(place, path) of every file of lines in a folder, in the order in which they were written.

    metrics.jsonl has place 0: a local run whose folder was copied to a bucket goes on there in parts.
    """
    found = [(0, model_dir / FILE)] if (model_dir / FILE).exists() else []
    folder = model_dir / PARTS
    children = list(folder.iterdir()) if folder.is_dir() else []
    parts = [(int(match[2]), path) for path in children if (match := _PART.fullmatch(path.name))]
    return found + sorted(parts, key=lambda part: (part[0], part[1].name))


# ----------------------------------------------------------------------------------------------------- reading


def read_metrics(
    model_dir: str | os.PathLike[str], damaged: Callable[[str], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Every line that a run has written so far, in order, from a local or a remote (gs://) MODEL_DIR.

    Yields the records of `Recorder`, with NaN and the infinities as floats again. A torn last line, of a run that is
    writing it or was killed in it, is left out. Raises ConfigError where there are no metrics, and for a line that is
    damaged, by file and line; or, if `damaged` is given, leaves such lines out and tells it of each. A rewind does
    not take back the lines before it: see `in_force`.
    """
    found = files(as_path(model_dir))
    if not found:
        raise ConfigError(f"there are no metrics in {model_dir}: expected {FILE}, or {PARTS}/ with parts of it")
    return (record for _, path in found for record in _read(path, damaged))


def in_force(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`records` without the steps and evaluations that a later rewind has taken back; every event stays.

    An event "rewind" takes back what was logged before it of steps after its `to`.
    """
    kept: list[dict[str, Any]] = []
    for record in records:
        if record.get("event") == "rewind":
            to = record["to"]
            kept = [one for one in kept if one["kind"] == "event" or one["step"] <= to]
        kept.append(dict(record))
    return kept


def _read(path: Path, damaged: Callable[[str], None] | None) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            record = parse(line)
            if record is not None:
                yield record
                continue
            text = f"{path}, line {number} is damaged: {line[:60]!r}..."
            if damaged is None:
                raise ConfigError(text)
            damaged(text)
