"""Evaluation documents and the files that they are read from: JSON lines, JSON, CSV, TSV and parquet.

A document is known by its content: `id` is a hash of the record, so nothing that is decided by it (its exemplars, its
place in a subset) depends on the file's order, on the other documents or on who asks. Imports config and the standard
library; pyarrow only for parquet. Errors are ConfigErrors that name the file, the line and the field.
"""

from __future__ import annotations

import abc
import csv
import dataclasses
import glob
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from palmjax.config import ConfigError, Part

Patterns = str | tuple[str, ...]
"""One pattern of file names (`*`, `?`, `**`), or several."""


def digest(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value; the order of an object's keys does not enter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Document:
    """One question, passage or example.

    id: hash of the content. where: "file:line", for people. texts: what a prompt may be made of, by name.
    choices: the answers to choose from, and scores: what each is worth (1 for a right one).
    answers: texts that are right, for what is generated or predicted. stop: texts that end what is generated. output: a
    regular expression whose first match in it counts ("" for all of it).
    group: what its exemplars must share (an MMLU subject). cluster: documents with equal clusters are not independent
    (questions on one passage); its own id unless the task says more. record: what it was read from, where a source
    keeps that.
    """

    id: str
    where: str
    texts: Mapping[str, str]
    choices: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    answers: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    output: str = ""
    group: str = ""
    cluster: str = ""
    record: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def right(self) -> tuple[int, ...]:
        """The choices of the highest score, falling out as one index if one is right."""
        best = max(self.scores, default=0.0)
        return tuple(index for index, score in enumerate(self.scores) if score == best)


class SourcePart(Part):
    """Where a task's documents come from. Variants read files (`records.Records`), BIG-bench JSON, or seqio tasks."""

    @abc.abstractmethod
    def build(self, exemplars: bool) -> tuple[list[Document], list[Document]]:
        """The documents to evaluate and those that exemplars are drawn from, in any order; of the latter none, and
        none are read, unless `exemplars` are wanted.

        Raises ConfigError for files that are missing or hold anything that is no document.
        """

    def unplaced(self) -> SourcePart:
        """The same source wherever its files lie: what of it belongs to the task's definition."""
        return self

    def notes(self) -> Mapping[str, str]:
        """What else is known about the source, for the manifest: a benchmark's canary string."""
        return {}


def in_hash_order(documents: Iterable[Document]) -> list[Document]:
    """By id: an order that is random, the same for everyone, and of which any beginning is an unbiased sample."""
    return sorted(documents, key=lambda document: document.id)


Record = Mapping[str, Any]


def find_files(patterns: Patterns, folder: str, what: str) -> list[str]:
    """Files that the patterns match in the folder, sorted, each once. Raises ConfigError for one that matches none."""
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        pattern = os.path.join(os.path.expanduser(folder), os.path.expanduser(pattern))
        matches = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not matches:
            raise ConfigError(f"{what}: no file matches {pattern!r}")
        found.update(matches)
    return sorted(found)


def read_records(path: str) -> Iterator[tuple[str, Record]]:
    """("file:line", record) for each record of a file; its kind goes by the name's ending, .gz before it included."""
    plain = path.removesuffix(".gz")
    kind = os.path.splitext(plain)[1].lower()
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text, ".parquet": _parquet}
    if kind not in readers:
        raise ConfigError(
            f"{path}: can't tell what it holds; known endings are {', '.join(readers)} and .gz behind them"
        )
    try:
        yield from readers[kind](path)
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _open(path: str) -> Any:
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, got {json.dumps(value)[:60]}")
    return value


def parse_json(text: str, where: str) -> Any:
    """The value. Raises ConfigError, saying where, for text that is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error


def check_regex(pattern: str, what: str) -> str:
    """`pattern` itself. Raises ConfigError, saying what it is, if it is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{what} {pattern!r} is not a regular expression: {error}") from error
    return pattern


def _json_lines(path: str) -> Iterator[tuple[str, Record]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _object(parse_json(line, where), where)


def _json(path: str) -> Iterator[tuple[str, Record]]:
    """A list of objects; the "line" is its place in the list. TriviaQA keeps that list under "Data"."""
    with _open(path) as file:
        value = parse_json(file.read(), path)
    if isinstance(value, Mapping) and isinstance(value.get("Data"), list):
        value = value["Data"]
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a JSON list of objects; a file with an object a line is .jsonl")
    for number, item in enumerate(value, 1):
        yield f"{path}:{number}", _object(item, f"{path}:{number}")


def _csv(path: str) -> Iterator[tuple[str, Record]]:
    with _open(path) as file:
        reader = csv.DictReader(file, delimiter="\t" if path.removesuffix(".gz").endswith(".tsv") else ",")
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise ConfigError(
                    f"{where}: not as many fields as the {len(reader.fieldnames or ())} of the first line"
                )
            yield where, record


def _text(path: str) -> Iterator[tuple[str, Record]]:
    with _open(path) as file:
        yield f"{path}:1", {"text": file.read()}


def _parquet(path: str) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path}: parquet needs its library: pip install pyarrow") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not parquet: {str(error).splitlines()[0]}") from error


def lookup(record: Record, path: str, where: str) -> Any:
    """The value at a dotted path such as `choices.text` or `answers.0`. Raises ConfigError if there is none."""
    value: Any = record
    for depth, name in enumerate(path.split(".")):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, Sequence) and not isinstance(value, str) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            above = ".".join(path.split(".")[:depth])
            has = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise ConfigError(f"{where}: no field {path!r}; {above or 'the record'} has {has}")
    return value
