"""Vocabularies without seqio: what a store or a checkpoint carries to turn text into ids and back.

Imports config and numpy; the `sentencepiece` library only when a SentencePiece model is used. Ids are those of the
seqio vocabulary of the same kind, and the special ids are seqio's: 0 pad, 1 EOS, 2 unknown.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from palmjax.config import ConfigError

MODEL_FILE = "vocabulary.model"


class Vocabulary(abc.ABC):
    """Text to ids and back.

    size: number of ids, special and extra ids included. eos_id: the id behind every document.
    """

    @property
    @abc.abstractmethod
    def size(self) -> int: ...

    @property
    @abc.abstractmethod
    def eos_id(self) -> int: ...

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text, without EOS."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids up to the first EOS. Special ids give no text."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """int32 [size]: UTF-8 bytes that each id stands for, 0 for special ids; for bits per byte."""

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """A JSON value from which, with `files`, `from_json` makes an equal vocabulary."""

    def files(self) -> dict[str, bytes]:
        """Files that belong to `to_json`, by name."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest; vocabularies are equal exactly if theirs are."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def _until_eos(self, ids: Iterable[int]) -> list[int]:
        kept = [int(i) for i in ids]
        return kept[: kept.index(self.eos_id)] if self.eos_id in kept else kept


@dataclasses.dataclass(frozen=True)
class Bytes(Vocabulary):
    """UTF-8 bytes: id = byte + 3 (ByT5, Xue et al. 2021; `seqio.ByteVocabulary`). extra_ids: sentinels at the end."""

    extra_ids: int = 0

    @property
    def size(self) -> int:
        return 3 + 256 + self.extra_ids

    @property
    def eos_id(self) -> int:
        return 1

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - 3 for i in self._until_eos(ids) if 3 <= i < 259).decode(errors="ignore")

    def token_bytes(self) -> np.ndarray:
        count = np.zeros(self.size, np.int32)
        count[3:259] = 1
        return count

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes", "extra_ids": self.extra_ids}


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePiece(Vocabulary):
    """A SentencePiece model (Kudo and Richardson 2018); `model` is the serialized ModelProto, extra ids included."""

    model: bytes = dataclasses.field(repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SentencePiece) and self.model == other.model

    def __hash__(self) -> int:
        return hash(self.model)

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise ConfigError(f"not a SentencePiece model ({len(self.model)} bytes): {error}") from error
        if processor.eos_id() < 0:
            raise ConfigError("the SentencePiece model has no EOS: train it with eos_id=1, as `palmjax tokenizer` does")
        return processor

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        unknown, size = self._processor.unk_id(), self.size
        return self._processor.decode([i if i < size else unknown for i in self._until_eos(ids)])

    def token_bytes(self) -> np.ndarray:
        """Exact for models that keep text as it is (`palmjax tokenizer`); an unknown token counts as no byte."""
        processor = self._processor
        count = np.zeros(self.size, np.int32)
        for i in range(self.size):
            if processor.is_byte(i):
                count[i] = 1
            elif not (processor.is_control(i) or processor.is_unknown(i)):
                count[i] = len(processor.id_to_piece(i).replace("\u2581", " ").encode())
        return count

    def to_json(self) -> dict[str, Any]:
        return {"kind": "sentencepiece", "sha256": hashlib.sha256(self.model).hexdigest()}

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self.model}


@dataclasses.dataclass(frozen=True)
class PassThrough(Vocabulary):
    """Ids that a task makes itself (`seqio.PassThroughVocabulary`): there is no text to turn them into."""

    num_ids: int
    eos: int = 1

    @property
    def size(self) -> int:
        return self.num_ids

    @property
    def eos_id(self) -> int:
        return self.eos

    def encode(self, text: str) -> list[int]:
        raise ConfigError("this vocabulary passes ids through: it cannot encode text")

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in self._until_eos(ids))

    def token_bytes(self) -> np.ndarray:
        return np.zeros(self.size, np.int32)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "pass_through", "num_ids": self.num_ids, "eos": self.eos}


def from_json(data: Mapping[str, Any], files: Mapping[str, bytes]) -> Vocabulary:
    """The vocabulary that `to_json` and `files` described. Raises ConfigError if a file is missing or altered."""
    match data.get("kind"):
        case "bytes":
            return Bytes(extra_ids=data["extra_ids"])
        case "pass_through":
            return PassThrough(num_ids=data["num_ids"], eos=data["eos"])
        case "sentencepiece":
            model = files.get(MODEL_FILE)
            if model is None:
                raise ConfigError(f"{MODEL_FILE} is missing beside the vocabulary's description")
            if hashlib.sha256(model).hexdigest() != data["sha256"]:
                raise ConfigError(f"{MODEL_FILE} is damaged: its SHA-256 is not the one recorded")
            return SentencePiece(model)
    raise ConfigError(f"unknown vocabulary kind {data.get('kind')!r}; known: bytes, sentencepiece, pass_through")
