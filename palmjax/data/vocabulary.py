"""Vocabularies without seqio: what a store or a checkpoint carries to turn text into ids and back.

Imports config and numpy; the libraries `sentencepiece` and `tokenizers` only when such a model is used. Ids are those
of the seqio vocabulary of the same kind, and the special ids are seqio's: 0 pad, 1 EOS, 2 unknown; models of other
stacks bring their own.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from palmjax.config import ConfigError

MODEL_FILE = "vocabulary.model"
TOKENIZER_FILE = "tokenizer.json"


class Vocabulary(abc.ABC):
    """Text to ids and back.

    size: number of ids, special and extra ids included. eos_id: the id behind every document. bos_id: the id that a row
    begins with. prompt_bos: the id put before a prompt, or None for none.
    """

    bos_id: int = 0

    @property
    def prompt_bos(self) -> int | None:
        return self.bos_id

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

    @property
    def bos_id(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model's own (LLaMA: 1), or 0, seqio's, if it was trained without (`palmjax tokenizer`)."""
        return max(self._processor.bos_id(), 0)

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


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFace(Vocabulary):
    """A tokenizer of the `tokenizers` library; `tokenizer` is its tokenizer.json.

    prompt: ids that the tokenizer itself puts before a text, at most one (LLaMA: BOS; GPT-2: none).
    """

    tokenizer: bytes = dataclasses.field(repr=False)
    eos: int
    bos: int
    prompt: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> HuggingFace:
        """The vocabulary of a tokenizer.json; what begins and ends a text is said in the files beside it.

        tokenizer_config.json names the tokens, config.json the end's id if the former does not. A tokenizer without a
        BOS begins rows with its EOS, as GPT-2 was trained. Raises ConfigError if it can't be read or has no EOS.
        """
        try:
            tokenizer = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror}") from error
        loaded = _load_tokenizer(tokenizer)
        settings, model = (_settings(path.with_name(name)) for name in ("tokenizer_config.json", "config.json"))
        end, begin = (_token_text(settings.get(name)) for name in ("eos_token", "bos_token"))
        eos = _first(model.get("eos_token_id")) if end is None else loaded.token_to_id(end)
        if eos is None:
            raise ConfigError(f"{path} has no EOS: tokenizer_config.json with an eos_token must lie beside it")
        bos = None if begin is None else loaded.token_to_id(begin)
        first = loaded.encode("").ids
        before = tuple(first[:1]) if first and first != [eos] else ()
        before = before or (tuple(first) if first == [bos] else ())
        return cls(
            tokenizer=tokenizer, eos=eos, bos=before[0] if before else eos if bos is None else bos, prompt=before
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFace) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.tokenizer)

    @functools.cached_property
    def _loaded(self) -> Any:
        return _load_tokenizer(self.tokenizer)

    @property
    def size(self) -> int:
        return 1 + max(self._loaded.get_vocab(with_added_tokens=True).values())

    @property
    def eos_id(self) -> int:
        return self.eos

    @property
    def bos_id(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.bos

    @property
    def prompt_bos(self) -> int | None:
        return self.prompt[0] if self.prompt else None

    def encode(self, text: str) -> list[int]:
        return self._loaded.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._loaded.decode([i for i in self._until_eos(ids) if i < self.size], skip_special_tokens=True)

    def token(self, i: int) -> str:
        """The token of an id, as the tokenizer spells it."""
        return self._loaded.id_to_token(i)

    def token_bytes(self) -> np.ndarray:
        """Exact for tokenizers over bytes and for those that spell a space as U+2581 and other characters in bytes."""
        over_bytes = b'"ByteLevel"' in self.tokenizer
        special = {i for i, token in self._loaded.get_added_tokens_decoder().items() if token.special}
        added = set(self._loaded.get_added_tokens_decoder())
        count = np.zeros(self.size, np.int32)
        for token, i in self._loaded.get_vocab(with_added_tokens=True).items():
            if i in special:
                continue
            if over_bytes and i not in added:
                count[i] = len(token)  # a character stands for each byte
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                count[i] = 1
            else:
                count[i] = len(token.replace("\u2581", " ").encode())
        return count

    def to_json(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.tokenizer).hexdigest()
        return {"kind": "huggingface", "sha256": digest, "eos": self.eos, "bos": self.bos, "prompt": list(self.prompt)}

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER_FILE: self.tokenizer}


def _settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def _token_text(value: Any) -> str | None:
    """The text of a special token, which a tokenizer_config.json gives bare or with its properties."""
    return value.get("content") if isinstance(value, Mapping) else value


def _first(value: Any) -> int | None:
    """LLaMA 3 lists several ends; the first one ends a document."""
    return _first(value[0]) if isinstance(value, list) and value else value if isinstance(value, int) else None


def _load_tokenizer(content: bytes) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError("a Hugging Face tokenizer needs its library: pip install 'palmjax[huggingface]'") from error
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"not a tokenizer.json ({len(content)} bytes): {error}") from error


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
        raise ConfigError("this vocabulary passes ids through: they stand for no text, so it cannot encode any")

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
            return SentencePiece(_checked(MODEL_FILE, files, data["sha256"]))
        case "huggingface":
            content = _checked(TOKENIZER_FILE, files, data["sha256"])
            return HuggingFace(tokenizer=content, eos=data["eos"], bos=data["bos"], prompt=tuple(data["prompt"]))
    known = "bytes, sentencepiece, huggingface, pass_through"
    raise ConfigError(f"unknown vocabulary kind {data.get('kind')!r}; known: {known}")


def _checked(name: str, files: Mapping[str, bytes], sha256: str) -> bytes:
    if name not in files:
        raise ConfigError(f"{name} is missing beside the vocabulary's description")
    if hashlib.sha256(files[name]).hexdigest() != sha256:
        raise ConfigError(f"{name} is damaged: its SHA-256 is not the one recorded")
    return files[name]
