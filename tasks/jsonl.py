"""JSON lines as a task: plain, .gz or .zst. Imports seqio lazily."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

from tasks import documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines:
    """Files with a JSON object on each line, a document each; names ending in .gz or .zst are decompressed.

    paths, validation_paths, validation_share, sentencepiece_model: as in `tasks.text_files.TextFiles`.
    key: the object's field that holds the text. inputs_key: a field with text that is conditioned on but not predicted
    (loss weight 0), placed before it; None: there is none.
    """

    name: str
    paths: tuple[str, ...]
    validation_paths: tuple[str, ...] = ()
    validation_share: float = 0.01
    key: str = "text"
    inputs_key: str | None = None
    sentencepiece_model: str | None = None

    def content_key(self) -> str:
        files = documents.file_state((*self.paths, *self.validation_paths))
        return documents.digest([files, documents.model_state(self.sentencepiece_model)])

    def build(self) -> str:
        """Registers the task and returns its name. Raises FileNotFoundError for a pattern that matches no file."""
        read = functools.partial(_read, key=self.key, inputs_key=self.inputs_key)
        train, validation = documents.find_files(self.paths), documents.find_files(self.validation_paths)
        files, readers = documents.splits_of(read, train, validation, self.validation_share)
        return documents.register_files(self.name, files, readers, bool(self.inputs_key), self.sentencepiece_model)


def _read(path: str, key: str, inputs_key: str | None) -> Iterator[documents.Document]:
    keys = {"targets": key} | ({"inputs": inputs_key} if inputs_key else {})
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            where = f"{path}, line {number},"
            text = documents.decode_text(line, where)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            yield {feature: _text(record, field, where) for feature, field in keys.items()}


def _text(record: Any, key: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds no JSON object but {type(record).__name__}")
    if key not in record:
        raise ValueError(f"{where} has no key {key!r}; its keys are: {', '.join(record)}")
    if not isinstance(record[key], str):
        raise ValueError(f"{where} has {type(record[key]).__name__} under {key!r}, not text")
    return record[key]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    with documents.open_bytes(path) as file:
        if path.endswith(".gz"):
            yield gzip.GzipFile(fileobj=file)  # pyright: ignore[reportReturnType]
        elif path.endswith(".zst"):
            try:
                import zstandard
            except ImportError as error:
                raise ValueError(f"{path} needs the package zstandard: pip install zstandard") from error
            yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))  # pyright: ignore
        else:
            yield file


def _lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    """The file's lines. Raises ValueError, naming the file, if its compression is broken or cut off."""
    try:
        yield from file
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}") from error
    except Exception as error:  # zstandard raises its own kind, which must not be imported for other files
        if type(error).__module__.startswith("zstandard"):
            raise ValueError(f"{path} cannot be decompressed: {error}") from error
        raise
