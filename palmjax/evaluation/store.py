"""Answers on disk, append-only and by content. No jax.

A line is one answer: {"key": ..., "log_likelihood": ..., "greedy": ..., "tokens": ...} or {"key": ..., "text": ...}.
Its key is a hash of what decides it: the `identity` of model and numerics (`run.Scorer.identity`), and the tokens. So
an answer is never another model's, nor another prompt's, and no version or name has to be trusted.

Lines are handed to the system as they are written, so they outlive a killed process; a line that was cut off is dropped
when the file is opened again. Answers come in an order that each request's own tokens decide (`schedule`), so the file
of a run that was killed and run again is, to the byte, the file of a run that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palmjax.config import ConfigError
from palmjax.evaluation.schedule import Request


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What the model says of a request.

    log_likelihood: log p(continuation | context), nats: float32 token log-probabilities, summed exactly. greedy:
    whether each token of the continuation was the most probable one (the first such id, where several tie). tokens: of
    the continuation.
    """

    log_likelihood: float
    greedy: bool
    tokens: int


def key(identity: str, kind: str, *tokens: Sequence[int], settings: str = "") -> str:
    """The content's SHA-256, each part with its length, so that no two different ones are the same bytes."""
    parts = [identity.encode(), kind.encode(), settings.encode()]
    parts += [np.asarray(ids, "<u4").tobytes() for ids in tokens]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


class Store:
    """The answers in one file, and those that are put there. One process at a time.

    Raises ConfigError for a file that can't be written, that another process is writing, or that is damaged.
    """

    def __init__(self, path: str | Path, identity: str):
        """identity: of the model and its numerics; answers of others stay in the file, unseen."""
        self.path, self._identity = Path(path), identity
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(f"{path} is being written by another process") from error
        except OSError as error:  # a file system without locks
            self._file.close()
            raise ConfigError(f"{path} can't be locked: {error.strerror}") from error
        self._lines = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        lines = {}
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                value = json.loads(line)
                lines[value.pop("key")] = value
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{self.path}:{number} is damaged; delete the file and all is asked again") from error
        return lines

    def _put(self, where: str, value: dict[str, Any]) -> None:
        if where in self._lines:
            return
        self._lines[where] = value
        try:
            self._file.write(json.dumps({"key": where, **value}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"{self.path} can't be written: {error.strerror}") from error

    def get(self, request: Request) -> Answer | None:
        """The answer to `request`, or None."""
        found = self._lines.get(self._of(request))
        return None if found is None else Answer(**found)

    def put(self, request: Request, answer: Answer) -> None:
        """Keeps an answer; one that is there stays."""
        self._put(self._of(request), dataclasses.asdict(answer))

    def _of(self, request: Request) -> str:
        return key(self._identity, "log_likelihood", request.context, request.continuation)

    def get_text(self, prompt: Sequence[int], settings: str) -> str | None:
        """The text that followed `prompt` when it was continued by `settings` (any text that says how), or None."""
        found = self._lines.get(key(self._identity, "text", prompt, settings=settings))
        return None if found is None else found["text"]

    def put_text(self, prompt: Sequence[int], settings: str, text: str) -> None:
        """Keeps a text; one that is there stays."""
        self._put(key(self._identity, "text", prompt, settings=settings), {"text": text})

    def __len__(self) -> int:
        return len(self._lines)

    def close(self) -> None:
        """Puts all on the disk itself and lets others write. Raises ConfigError if the disk does not take it."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigError(f"{self.path} can't be written: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):  # closing tries once more to write what could not be written
                self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
