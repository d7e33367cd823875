"""What the tasks over files share: finding files, splitting by hash, and a seqio source sharded by files.

Imports seqio and TensorFlow inside functions only. Errors are ValueError or OSError (FileNotFoundError where no file is
found) that name the file, and the line if there are lines.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from tasks import huggingface
from tasks.objectives import Objective

SHARD_BYTES = 16 << 20
"""Files are grouped in shards of about this many bytes; a token store has one part a shard."""

Document = dict[str, str]
"""Texts by feature: `targets`, and `inputs` if the task has them."""

Reader = Callable[[str], Iterator[Document]]
"""The documents of one file."""


Patterns = str | tuple[str, ...]
"""One pattern of file names, or several."""


def listed(patterns: Patterns | list[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def find_files(patterns: Patterns) -> list[str]:
    """Files that the patterns (`*`, `?`, `**`; gs:// too) match, sorted, each once.

    Raises FileNotFoundError for a pattern that matches none.
    """
    found: set[str] = set()
    for pattern in listed(patterns):
        matches = (
            _remote_glob(pattern) if is_remote(pattern) else glob.glob(os.path.expanduser(pattern), recursive=True)
        )
        files = [path for path in matches if is_remote(path) or os.path.isfile(path)]
        if not files:
            raise FileNotFoundError(f"no file matches {pattern!r}")
        found.update(files)
    return sorted(found)


def is_remote(path: str) -> bool:
    return "://" in path


def open_bytes(path: str) -> IO[bytes]:
    if not is_remote(path):
        return open(path, "rb")
    import tensorflow as tf

    return tf.io.gfile.GFile(path, "rb")


def _remote_glob(pattern: str) -> list[str]:
    import tensorflow as tf

    return tf.io.gfile.glob(pattern)


def file_state(*groups: Patterns | list[str]) -> list[Any]:
    """Path, size and time of change of every file; of remote patterns the pattern only: looking needs TensorFlow."""
    patterns = [pattern for group in groups for pattern in listed(group)]
    local = tuple(pattern for pattern in patterns if not is_remote(pattern))
    states = [(path, os.stat(path)) for path in find_files(local)]
    return [
        *([path, state.st_size, state.st_mtime_ns] for path, state in states),
        *(pattern for pattern in patterns if is_remote(pattern)),
    ]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 text. Raises ValueError, saying where, for bytes that are not, or that hold NUL as binary files do."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise ValueError(f"{where} is not text but binary: it has a NUL at byte {data.index(0)}")
    return text


CANARY = re.compile(r"canary GUID [0-9a-f]{8}-")
"""The mark that BIG-bench's authors put in their tasks, so that nobody trains on them (Srivastava et al. 2022)."""


def refuse_canary(document: Document, where: str) -> None:
    """Raises ValueError, saying where, for text that carries a benchmark's canary."""
    for text in document.values():
        if (found := CANARY.search(text)) is not None:
            raise ValueError(
                f"{where} has text of a benchmark that asks not to be trained on: {text[found.start() :][:50]!r}"
            )


def held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out share; by its content, so that copies of it are on the same side."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < share * 2.0**64


def by_share(read: Reader, share: float) -> dict[str, Reader]:
    """Readers of `train` and `validation`, which divide the documents of the same files by `held_out`."""

    def documents(path: str, validation: bool) -> Iterator[Document]:
        return (document for document in read(path) if held_out(document["targets"], share) == validation)

    return {
        "train": functools.partial(documents, validation=False),
        "validation": functools.partial(documents, validation=True),
    }


def splits_of(
    read: Reader, files: Sequence[str], validation_files: Sequence[str], share: float
) -> tuple[dict[str, Sequence[str]], dict[str, Reader]]:
    """Files and readers of each split: held out by files of their own, by a share of the documents, or not at all."""
    if validation_files:
        return {"train": files, "validation": validation_files}, {"train": read, "validation": read}
    if not 0 <= share < 1:
        raise ValueError(f"validation_share is {share}; it must be in [0, 1)")
    if share == 0:
        return {"train": files}, {"train": read}
    return {"train": files, "validation": files}, by_share(read, share)


def shards(files: Sequence[str]) -> list[list[str]]:
    """Files in order, grouped in shards of about SHARD_BYTES; a remote file is a shard of its own."""
    groups: list[list[str]] = []
    filled = 0
    for path in files:
        size = SHARD_BYTES if is_remote(path) else os.path.getsize(path)
        if not groups or filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += size
    return groups


def vocabulary(sentencepiece_model: str | None, extra_ids: int = 0) -> Any:
    """The seqio vocabulary: bytes if there is no model; a Hugging Face tokenizer if it is a tokenizer.json.

    extra_ids: ids added behind its own. Raises ValueError for a tokenizer.json, which has no room for them.
    """
    import seqio

    if sentencepiece_model is None:
        return seqio.ByteVocabulary(extra_ids=extra_ids)
    if sentencepiece_model.endswith(".json"):
        if extra_ids:
            raise ValueError(f"{sentencepiece_model} has no room for the {extra_ids} ids that the objective adds")
        return huggingface.vocabulary(os.path.expanduser(sentencepiece_model))
    return seqio.SentencePieceVocabulary(os.path.expanduser(sentencepiece_model), extra_ids=extra_ids)


def model_state(sentencepiece_model: str | None) -> list[Any]:
    """What decides a vocabulary. Raises FileNotFoundError if there is no such model."""
    if sentencepiece_model is None:
        return []
    beside = [os.path.join(os.path.dirname(sentencepiece_model), name) for name in huggingface.BESIDE]
    named = [path for path in beside if sentencepiece_model.endswith(".json") and os.path.exists(path)]
    return file_state([sentencepiece_model, *named])


def register_source(
    name: str,
    source: Any,
    has_inputs: bool,
    sentencepiece_model: str | None,
    rekey: Any = (),
    objective: Objective | None = None,
) -> str:
    """Registers a task over a seqio source, replacing one of that name that was registered here. Returns the name.

    `targets` are tokenized and ended by EOS; `inputs`, if any, are tokenized only. objective: what makes inputs and
    targets of the documents. Raises ValueError if the name is taken, or if there are inputs already.
    """
    import seqio

    if objective is not None and has_inputs:
        raise ValueError(f"{type(objective).__name__} makes inputs of its own, and the documents have some already")
    ids = vocabulary(sentencepiece_model, objective.extra_ids if objective else 0)
    has_inputs = has_inputs or objective is not None
    features = {"targets": seqio.Feature(vocabulary=ids, add_eos=True)}
    if has_inputs:
        features["inputs"] = seqio.Feature(vocabulary=ids, add_eos=False)
    if name in seqio.TaskRegistry.names():
        if name not in _registered_here:
            raise ValueError("a task of this name is registered already by another module")
        seqio.TaskRegistry.remove(name)
    tokenize = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
    corrupt = [functools.partial(objective.preprocess, vocabulary=ids)] if objective else []
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*rekey, tokenize, *corrupt, seqio.preprocessors.append_eos],
        output_features=features,
    )
    _registered_here.add(name)
    return name


_registered_here: set[str] = set()


def register_files(
    name: str,
    files: Mapping[str, Sequence[str]],
    readers: Mapping[str, Reader],
    has_inputs: bool,
    sentencepiece_model: str | None,
    objective: Objective | None = None,
) -> str:
    """Registers a task over files: for each split its files and the reader of one. Returns the name."""
    source = _source_class()({split: shards(paths) for split, paths in files.items()}, readers, has_inputs)
    return register_source(name, source, has_inputs, sentencepiece_model, objective=objective)


@functools.cache
def _source_class() -> Any:
    import seqio
    import tensorflow as tf

    class DocumentSource(seqio.DataSource):
        """Documents of groups of files, one shard a group. `failure` keeps what a reader raised: tf.data wraps it."""

        def __init__(self, groups: Mapping[str, list[list[str]]], readers: Mapping[str, Reader], has_inputs: bool):
            super().__init__(splits=tuple(groups))
            self._groups, self._readers = groups, readers
            self._features = ("inputs", "targets") if has_inputs else ("targets",)
            self.failure: Exception | None = None

        @property
        def supports_arbitrary_sharding(self) -> bool:
            return False

        def list_shards(self, split: str) -> list[str]:
            return [group[0] for group in self._groups[split]]

        def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_):
            groups = self._groups[split]
            if shard_info:
                groups = groups[shard_info.index :: shard_info.num_shards]
            if shuffle:
                groups = random.Random(seed).sample(groups, len(groups))
            signature = {feature: tf.TensorSpec([], tf.string) for feature in self._features}
            return tf.data.Dataset.from_generator(
                functools.partial(self._documents, groups, self._readers[split]), output_signature=signature
            )

        def _documents(self, groups: list[list[str]], read: Reader) -> Iterator[Document]:
            try:
                for group in groups:
                    for path in group:
                        for document in read(path):
                            refuse_canary(document, path)
                            yield document
            except Exception as error:
                self.failure = error
                raise

    return DocumentSource
