"""Token stores: a task's text as one flat stream of tokens that is read by position. TensorStore, zarr version 3.

Imports config, data.vocabulary, numpy and tensorstore: no TensorFlow, no seqio. A store is a folder, local or on
anything that TensorStore addresses by URL (gs://, s3://):

    store.json              the manifest, written last: a store without it is not finished
    vocabulary.model        the SentencePiece model, when there is one
    part-00000/tokens       uint8, uint16 or uint32 by the size of the vocabulary
    part-00000/documents    int64, the position behind each document, counted from the part's start
    part-00000/weights      uint8 loss weights; the array is left out of a part whose weights are all 1

The stream is the parts' tokens one behind the other; documents do not cross parts. The number of parts comes from the
task, never from the number of workers. Arrays are cut in files of 2^24 tokens, each read in pieces of 2^14 that carry a
CRC-32C: reading a row anywhere touches tens of kilobytes, and a damaged piece is noticed when it is read.
"""

from __future__ import annotations

import array
import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from palmjax.config import ConfigError
from palmjax.data import vocabulary as vocabularies
from palmjax.data.vocabulary import Vocabulary

FORMAT = 1
MANIFEST = "store.json"
SHARD = 1 << 24  # elements a file
PIECE = 1 << 14  # elements under one checksum: what a random read costs at least
CACHE_BYTES = 64 << 20
_FILLS = {"tokens": None, "documents": -1, "weights": 1}


class Folder:
    """Small files of a store, read and written whole and atomically, on a local disk or a TensorStore URL."""

    def __init__(self, path: str):
        self.path = path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))
        try:
            self._files = ts.KvStore.open(self.spec()).result()
        except ValueError as error:
            raise ConfigError(f"cannot open the folder {self.path}: {error}") from error

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    def spec(self, name: str = "") -> Any:
        """The TensorStore key-value store of this folder or of one in it."""
        path = f"{self.path}/{name}/" if name else f"{self.path}/"
        return {"driver": "file", "path": path} if self.is_local else path

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if there is no such file."""
        result = self._files.read(name).result()
        return bytes(result.value) if result.state == "value" else None

    def write(self, name: str, data: bytes) -> None:
        """Replaces the file as a whole: a reader sees the old bytes or the new."""
        self._files.write(name, data).result()

    def delete(self, prefix: str) -> None:
        """Deletes every file whose name begins so."""
        self._files.delete_range(ts.KvStore.KeyRange(prefix, prefix + "\xff")).result()

    def names(self, prefix: str = "") -> list[str]:
        keys = self._files.list(ts.KvStore.KeyRange(prefix, prefix + "\xff") if prefix else None).result()
        return sorted(key.decode() for key in keys)

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises ConfigError naming the first file that is missing or not of its size. Reads one byte of each."""
        last_bytes = {name: self._files.read(name, byte_range=slice(size - 1, None)) for name, size in sizes.items()}
        for name, future in last_bytes.items():
            try:
                result = future.result()
            except (ValueError, OSError):  # the range begins behind the end of the file
                raise self.damaged(name, f"it is shorter than the {sizes[name]:,} bytes recorded") from None
            if result.state != "value":
                raise self.damaged(name, "it is missing")
            if len(result.value) != 1:
                raise self.damaged(name, f"it is longer than the {sizes[name]:,} bytes recorded")

    def damaged(self, name: str, what: str) -> ConfigError:
        return ConfigError(
            f"token store file {self.path}/{name} is damaged: {what}.\n"
            f"Delete the folder {self.path}; the next start builds it again."
        )


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The narrowest of uint8, uint16, uint32 for which the largest value is no id (it marks what was never written)."""
    return next(np.dtype(t) for t in (np.uint8, np.uint16, np.uint32) if vocabulary_size <= np.iinfo(t).max)


def _metadata(kind: str, dtype: np.dtype, size: int) -> dict[str, Any]:
    bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"}
    index_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [PIECE],
        "codecs": [bytes_codec, {"name": "crc32c"}],
        "index_codecs": [index_codec, {"name": "crc32c"}],
    }
    fill = _FILLS[kind]
    return {
        "shape": [size],
        "data_type": dtype.name,
        "fill_value": int(np.iinfo(dtype).max) if fill is None else fill,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


class _ArrayWriter:
    """Appends to one array of a part, file by file."""

    def __init__(self, folder: Folder, name: str, kind: str, dtype: np.dtype):
        self._spec = {"driver": "zarr3", "kvstore": folder.spec(f"{name}/{kind}")}
        self._kind, self._dtype = kind, dtype
        self._buffer: list[np.ndarray] = []
        self._buffered = self._written = 0
        self._array: ts.TensorStore | None = None

    def append(self, values: np.ndarray) -> None:
        self._buffer.append(values.astype(self._dtype))
        self._buffered += len(values)
        while self._buffered >= SHARD:
            whole = np.concatenate(self._buffer)
            self._write(whole[:SHARD])
            self._buffer, self._buffered = [whole[SHARD:]], len(whole) - SHARD

    def finish(self, keep_if_default: bool) -> bool:
        """Writes what is left. Returns whether there is an array: all-default weights make none."""
        if self._buffered:
            self._write(np.concatenate(self._buffer))
        if self._array is None and keep_if_default:
            self._open()
        if self._array is not None:
            self._array.resize(exclusive_max=[self._written], resize_metadata_only=True).result()
        return self._array is not None

    def _write(self, values: np.ndarray) -> None:
        start, self._written = self._written, self._written + len(values)
        if self._kind == "weights" and (values == _FILLS["weights"]).all():
            return
        self._open()[start : self._written].write(values).result()

    def _open(self) -> ts.TensorStore:
        if self._array is None:  # the final size is not known yet: an array large enough, cut by `finish`
            spec = {**self._spec, "metadata": _metadata(self._kind, self._dtype, 1 << 50)}
            self._array = ts.open(spec, create=True, delete_existing=True).result()
        return self._array


class PartWriter:
    """Writes one part. `finish` returns its record for the manifest; a part without a record is not finished."""

    def __init__(self, folder: Folder, part: int, vocabulary: Vocabulary):
        self.name = part_name(part)
        self._folder = folder
        self._token_bytes = vocabulary.token_bytes()
        folder.delete(f"{self.name}/")
        dtype = token_dtype(vocabulary.size)
        self._tokens = _ArrayWriter(folder, self.name, "tokens", dtype)
        self._weights = _ArrayWriter(folder, self.name, "weights", np.dtype(np.uint8))
        self._ends = array.array("q")
        self._count = self._bytes = 0

    def add(self, tokens: np.ndarray, num_unweighted: int = 0) -> None:
        """Appends one document, EOS included: integers [n], of which the first num_unweighted have loss weight 0.

        Raises ConfigError for an id outside the vocabulary.
        """
        if tokens.min() < 0 or tokens.max() >= len(self._token_bytes):
            bad = tokens.min() if tokens.min() < 0 else tokens.max()
            raise ConfigError(f"token id {bad} is outside the vocabulary of {len(self._token_bytes)} ids")
        weights = np.ones(len(tokens), np.uint8)
        weights[:num_unweighted] = 0
        self._tokens.append(tokens)
        self._weights.append(weights)
        self._count += len(tokens)
        self._bytes += int(self._token_bytes[tokens].sum())
        self._ends.append(self._count)

    def finish(self) -> dict[str, Any]:
        """Writes the rest and returns the part's record: counts, and size and CRC-32 of each file."""
        documents = _ArrayWriter(self._folder, self.name, "documents", np.dtype(np.int64))
        documents.append(np.frombuffer(self._ends, np.int64) if self._ends else np.zeros(0, np.int64))
        documents.finish(keep_if_default=True)
        self._tokens.finish(keep_if_default=True)
        weighted = self._weights.finish(keep_if_default=False)
        files = {}
        for name in self._folder.names(f"{self.name}/"):
            data = self._folder.read(name) or b""
            files[name] = [len(data), zlib.crc32(data)]
        return {
            "name": self.name,
            "tokens": self._count,
            "documents": len(self._ends),
            "bytes": self._bytes,
            "weights": weighted,
            "files": files,
        }


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def _checksum(manifest: Mapping[str, Any]) -> int:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def write_manifest(
    folder: Folder, task: str, split: str, vocabulary: Vocabulary, parts: Sequence[Mapping[str, Any]]
) -> None:
    """Publishes a store whose parts are all written. Raises ConfigError if one of their files is not there."""
    for name, data in vocabulary.files().items():
        folder.write(name, data)
    manifest = {
        "format": FORMAT,
        "task": task,
        "split": split,
        "vocabulary": vocabulary.to_json(),
        "vocabulary_fingerprint": vocabulary.fingerprint,
        "files": {name: [len(data), zlib.crc32(data)] for name, data in vocabulary.files().items()},
        **{key: sum(part[key] for part in parts) for key in ("tokens", "documents", "bytes")},
        "parts": list(parts),
    }
    folder.check_sizes(_sizes(manifest))
    manifest["checksum"] = _checksum(manifest)
    folder.write(MANIFEST, json.dumps(manifest, indent=1).encode())


def _files(manifest: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    listed = [manifest["files"], *(part["files"] for part in manifest["parts"])]
    return {name: (size, crc) for files in listed for name, (size, crc) in files.items()}


def _sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    return {name: size for name, (size, _) in _files(manifest).items()}


def is_complete(path: str) -> bool:
    """Whether a finished store is at this path (its manifest is there)."""
    return Folder(path).read(MANIFEST) is not None


class TokenStore:
    """A finished store, opened for reading. Safe to read from several threads.

    Opening checks that every file is there and has its recorded size; contents are checked as they are read, or all at
    once by `verify`. Raises ConfigError, naming the file, for a store that is unfinished, damaged or of another format.
    """

    def __init__(self, path: str):
        self._folder = Folder(path)
        self.path = self._folder.path
        self.manifest = self._read_manifest()
        self.task: str = self.manifest["task"]
        self.split: str = self.manifest["split"]
        self.num_tokens: int = self.manifest["tokens"]
        self.num_documents: int = self.manifest["documents"]
        self.num_bytes: int = self.manifest["bytes"]
        self._folder.check_sizes(_sizes(self.manifest))
        try:
            small = {name: self._folder.read(name) or b"" for name in self.manifest["files"]}
            self.vocabulary = vocabularies.from_json(self.manifest["vocabulary"], small)
        except ConfigError as error:
            raise self._folder.damaged(vocabularies.MODEL_FILE, str(error)) from error
        self._parts: list[dict[str, Any]] = self.manifest["parts"]
        self._part_starts = [0, *np.cumsum([part["tokens"] for part in self._parts]).tolist()]
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._array = functools.cache(self._open_array)

    def _read_manifest(self) -> dict[str, Any]:
        data = self._folder.read(MANIFEST)
        if data is None:
            raise ConfigError(f"no finished token store at {self.path}: {MANIFEST} is missing")
        try:
            manifest = json.loads(data)
            intact = manifest["checksum"] == _checksum(manifest)
            version = manifest["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._folder.damaged(MANIFEST, "it is not a manifest") from error
        if not intact:
            raise self._folder.damaged(MANIFEST, "its checksum does not match")
        if version != FORMAT:
            raise ConfigError(f"token store {self.path} has format {version}, this program reads format {FORMAT}")
        return manifest

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the contents: equal for stores with equal streams and vocabulary, wherever they lie."""
        contents = [[part["tokens"], sorted(part["files"].items())] for part in self._parts]
        text = json.dumps([self.manifest["vocabulary_fingerprint"], contents], sort_keys=True)
        return f"{zlib.crc32(text.encode()):08x}"

    def read(self, starts: np.ndarray, stops: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens int32 [n, length] and weights uint8 [n, length] of ranges [start, stop), zero behind each stop.

        starts, stops: int64 [n] stream positions, stop - start <= length. The weights are None if all are 1. All reads
        are issued at once. Raises ConfigError, naming the file, if a checksum does not match.
        """
        tokens = np.zeros((len(starts), length), np.int32)
        weights: np.ndarray | None = None
        pending = []
        parts = np.searchsorted(self._part_starts, starts, side="right") - 1
        for row, (start, stop, part) in enumerate(zip(starts.tolist(), stops.tolist(), parts.tolist(), strict=True)):
            column = 0
            while start < stop:
                end = min(stop, self._part_starts[part + 1])
                low, high = start - self._part_starts[part], end - self._part_starts[part]
                if high > low:
                    values = self._array(part, "tokens")[low:high].read()
                    ones = self._array(part, "weights")[low:high].read() if self._parts[part]["weights"] else None
                    pending.append((row, column, part, low, high, values, ones))
                    column += high - low
                start, part = end, part + 1
        for row, column, part, low, high, values, ones in pending:
            here = slice(column, column + high - low)
            tokens[row, here] = self._result(values, part, "tokens", low, high)
            if ones is not None:
                weights = np.ones(tokens.shape, np.uint8) if weights is None else weights
                weights[row, here] = self._result(ones, part, "weights", low, high)
        return tokens, weights

    def document_ends(self) -> np.ndarray:
        """Stream position behind each document: int64 [documents], ascending."""
        ends = []
        for index, part in enumerate(self._parts):
            if part["documents"]:
                future = self._array(index, "documents").read()
                values = self._result(future, index, "documents", 0, part["documents"])
                if values[-1] != part["tokens"] or values[0] < 0 or (np.diff(values) < 0).any():
                    raise self._folder.damaged(f"{part['name']}/documents/c", "its documents do not cover the part")
                ends.append(values + self._part_starts[index])
        return np.concatenate(ends) if ends else np.zeros(0, np.int64)

    def verify(self) -> None:
        """Reads every byte. Raises ConfigError naming the first file whose CRC-32 is not the recorded one."""
        for name, (_, crc) in _files(self.manifest).items():
            if zlib.crc32(self._folder.read(name) or b"") != crc:
                raise self._folder.damaged(name, "its CRC-32 does not match")

    def _open_array(self, part: int, kind: str) -> ts.TensorStore:
        name, dtype = (
            self._parts[part]["name"],
            {"documents": np.dtype(np.int64), "weights": np.dtype(np.uint8)}.get(kind),
        )
        size = self._parts[part]["documents" if kind == "documents" else "tokens"]
        spec = {
            "driver": "zarr3",
            "kvstore": self._folder.spec(f"{name}/{kind}"),
            "metadata": _metadata(kind, dtype or token_dtype(self.vocabulary.size), size),
            "assume_metadata": True,  # the manifest knows it: thousands of small files need not be read at the start
            "recheck_cached_data": False,  # a finished store never changes
        }
        try:
            return ts.open(spec, open=True, context=self._context).result()
        except (ValueError, OSError) as error:
            reason = str(error).split("[", 1)[0].split(": ", 1)[-1].strip()
            raise self._folder.damaged(f"{name}/{kind}/zarr.json", reason[:200]) from error

    def _result(self, future: ts.Future, part: int, kind: str, low: int, high: int) -> np.ndarray:
        shards = range(low // SHARD, (high - 1) // SHARD + 1)
        name = ", ".join(f"{self._parts[part]['name']}/{kind}/c/{shard}" for shard in shards)
        try:
            values = future.result()
        except (ValueError, OSError) as error:
            raise self._folder.damaged(name, str(error).split("[", 1)[0].strip()) from error
        if kind == "tokens" and values.max() >= self.vocabulary.size:
            raise self._folder.damaged(name, "tokens are missing from it")
        return values
