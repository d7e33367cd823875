"""Answers on disk by content, appended as they come: a run that was killed goes on from them. No jax.

A line's key is a hash of the weights, of what decides the numbers, and of the tokens asked about. So an answer is never
another model's, and never of another prompt; editing a task asks anew exactly what it changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError
from palmjax.evaluation.documents import digest
from palmjax.evaluation.forms import Likelihood, Text
from palmjax.evaluation.schedule import Request


class Kept:
    """answers.jsonl. model: a hash of the weights and of what else decides the numbers (dtype, sizes, libraries).

    primary: whether this process writes. A last line that was cut off by a kill is dropped. Raises ConfigError for a
    file that can't be written, or is damaged elsewhere.
    """

    def __init__(self, path: Path, model: str, primary: bool = True):
        self._model, self._primary = model, primary
        self._found: dict[str, Any] = {}
        if not primary:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}") from error
        self._read(path)

    def _read(self, path: Path) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"{path}:{number} is damaged ({error}); delete the file to ask everything anew"
                ) from error
            self._found[key] = value

    def _key(self, *what: Any) -> str:
        return digest([self._model, *what])[:32]

    def _put(self, key: str, value: Any) -> None:
        if self._primary and key not in self._found:
            self._found[key] = value
            self._file.write(json.dumps([key, value]).encode() + b"\n")
            self._file.flush()  # to the kernel: it outlives the process

    def get(self, request: Request) -> Likelihood | None:
        """The answer to a request; None if it is not there."""
        found = self._found.get(self._key(request.context, request.continuation))
        return None if found is None else Likelihood(*found)

    def put(self, request: Request, answer: Any) -> None:
        """Keeps log_likelihood, greedy and tokens of an answer."""
        value = [float(answer.log_likelihood), bool(answer.greedy), int(answer.tokens)]
        self._put(self._key(request.context, request.continuation), value)

    def texts(self, prompts: Iterable[tuple[int, ...]], how: str) -> dict[tuple[int, ...], Text]:
        """The texts that followed prompts, decoded so; those that are there."""
        keys = {prompt: self._key(prompt, how) for prompt in prompts}
        return {prompt: Text(*self._found[key]) for prompt, key in keys.items() if key in self._found}

    def put_text(self, prompt: tuple[int, ...], how: str, text: Text) -> None:
        self._put(self._key(prompt, how), [text.text, text.finished])

    def __len__(self) -> int:
        return len(self._found)

    def close(self) -> None:
        """Ends the file; what was kept is on disk behind it."""
        if self._primary:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
