"""The running Python's own standard library as text: real text that every machine has. Imports seqio lazily."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator

from tasks import documents
from tasks.objectives import Objective

_SUFFIXES = (".py", ".txt", ".rst", ".md")
_EXCLUDED = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonStdlib:
    """Source and text files of the standard library, a document each; files that are not UTF-8 text are left out.

    name: the task's name. sentencepiece_model: path of a model; None: bytes.
    validation_share: of the files held out as split `validation`, chosen by a hash of their content.
    max_megabytes: at most so many 10^6 bytes, of files drawn by a hash of their names; None: all.
    objective: of `tasks.objectives`; None: every token is predicted from those before it.
    """

    name: str = "python_stdlib"
    sentencepiece_model: str | None = None
    validation_share: float = 0.02
    max_megabytes: float | None = None
    objective: Objective | None = None

    def content_key(self) -> str:
        return documents.digest([sys.version, documents.model_state(self.sentencepiece_model)])

    def build(self) -> str:
        """Registers the task with splits `train` and `validation` and returns its name."""
        files, readers = documents.splits_of(_read, self._files(), (), self.validation_share)
        return documents.register_files(self.name, files, readers, False, self.sentencepiece_model, self.objective)

    def _files(self) -> list[str]:
        root = sysconfig.get_paths()["stdlib"]
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - _EXCLUDED)
            found += [os.path.join(folder, name) for name in names if name.endswith(_SUFFIXES)]
        if not found:
            raise FileNotFoundError(f"no source files in the standard library's folder {root}")
        if self.max_megabytes is None:
            return sorted(found)
        drawn, size = [], 0
        for path in sorted(found, key=lambda path: hashlib.sha256(os.path.relpath(path, root).encode()).digest()):
            size += os.path.getsize(path)
            if size > self.max_megabytes * 1e6:
                break
            drawn.append(path)
        if not drawn:
            raise ValueError(f"max_megabytes is {self.max_megabytes}: too little for one file")
        return sorted(drawn)


def _read(path: str) -> Iterator[documents.Document]:
    with open(path, "rb") as file:
        data = file.read()
    try:
        text = documents.decode_text(data, path)
    except ValueError:  # test data of the standard library in other encodings, on purpose
        return
    if text:
        yield {"targets": text}
