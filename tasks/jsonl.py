"""JSON lines as a task: plain, .gz or .zst. Imports seqio lazily."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any

from tasks import documents
from tasks.objectives import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines:
    """Files with a JSON object on each line, a document each; names ending in .gz or .zst are decompressed.

    paths, validation_paths, validation_share, sentencepiece_model: as in `tasks.text_files.TextFiles`.
    key: the object's field that holds the text. inputs_key: a field with text that is conditioned on but not predicted
    (loss weight 0), placed before it; None: there is none. objective: of `tasks.objectives`; None: every token is
    predicted from those before it.
    """

    name: str
    paths: documents.Patterns
    validation_paths: documents.Patterns = ()
    validation_share: float = 0.01
    key: str = "text"
    inputs_key: str | None = None
    sentencepiece_model: str | None = None
    objective: Objective | None = None

    def content_key(self) -> str:
        files = documents.file_state(self.paths, self.validation_paths)
        return documents.digest([files, documents.model_state(self.sentencepiece_model)])

    def build(self) -> str:
        """Registers the task and returns its name. Raises FileNotFoundError for a pattern that matches no file."""
        read = functools.partial(_read, key=self.key, inputs_key=self.inputs_key)
        train, validation = documents.find_files(self.paths), documents.find_files(self.validation_paths)
        files, readers = documents.splits_of(read, train, validation, self.validation_share)
        has_inputs, model = bool(self.inputs_key), self.sentencepiece_model
        return documents.register_files(self.name, files, readers, has_inputs, model, self.objective)


def _read(path: str, key: str, inputs_key: str | None) -> Iterator[documents.Document]:
    keys = {"targets": key} | ({"inputs": inputs_key} if inputs_key else {})
    for number, line in enumerate(_lines(path), start=1):
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


def _lines(path: str) -> Iterator[bytes]:
    """The file's lines. Raises ValueError, naming the file, if its compression is broken or cut off."""
    with documents.open_bytes(path) as file:
        try:
            if path.endswith(".gz"):
                yield from gzip.GzipFile(fileobj=file)  # pyright: ignore[reportArgumentType]
            elif path.endswith(".zst"):
                yield from _split_lines(_zstandard(file))
            else:
                yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed: {error}") from error


def _zstandard(file: IO[bytes]) -> Iterator[bytes]:
    """The decompressed bytes of one or more frames. Raises EOFError for broken frames and for one that is cut off.

    (The stream reader of zstandard 0.25 takes a file that is cut off for one that ends there.)
    """
    try:
        import zstandard
    except ImportError as error:
        raise EOFError("that needs a package: pip install zstandard") from error
    frame, rest = None, b""
    while data := rest or file.read(1 << 20):
        frame, rest = frame or zstandard.ZstdDecompressor().decompressobj(), b""
        try:
            yield frame.decompress(data)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        if frame.eof:
            frame, rest = None, frame.unused_data
    if frame is not None:
        raise EOFError("the file is cut off")


def _split_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest
