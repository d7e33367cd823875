"""Plain text files as a task. Imports seqio lazily."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tasks import documents
from tasks.objectives import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """UTF-8 text files, a document each, or a document each line.

    paths: a pattern, such as "/data/books/**/*.txt", or several. validation_paths: those of the split `validation`;
    without them `validation_share` of the documents is held out by a hash of their content (0: there is no such split).
    lines: every line that is not empty is a document. sentencepiece_model: path of a model, or of a Hugging Face
    tokenizer.json; None: bytes.
    objective: of `tasks.objectives`; None: every token is predicted from those before it.
    """

    name: str
    paths: documents.Patterns
    validation_paths: documents.Patterns = ()
    validation_share: float = 0.01
    lines: bool = False
    sentencepiece_model: str | None = None
    objective: Objective | None = None

    def content_key(self) -> str:
        files = documents.file_state(self.paths, self.validation_paths)
        return documents.digest([files, documents.model_state(self.sentencepiece_model)])

    def build(self) -> str:
        """Registers the task and returns its name. Raises FileNotFoundError for a pattern that matches no file."""
        read = _read_lines if self.lines else _read_file
        train, validation = documents.find_files(self.paths), documents.find_files(self.validation_paths)
        files, readers = documents.splits_of(read, train, validation, self.validation_share)
        return documents.register_files(self.name, files, readers, False, self.sentencepiece_model, self.objective)


def _read_file(path: str) -> Iterator[documents.Document]:
    with documents.open_bytes(path) as file:
        yield {"targets": documents.decode_text(file.read(), path)}


def _read_lines(path: str) -> Iterator[documents.Document]:
    with documents.open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if text := documents.decode_text(line, f"{path}, line {number},").rstrip("\r\n"):
                yield {"targets": text}
