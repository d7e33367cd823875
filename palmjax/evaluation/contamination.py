"""Which documents a training set has seen: n-gram overlap with a token store. numpy; no jax.

After GPT-3 (Brown et al. 2020, appendix C): words in lower case without punctuation, a document is dirty if any of its
13-grams stands in the training text. A text of 8 to 12 words is looked for as a whole, and shorter ones say nothing:
a document with only such texts is neither clean nor dirty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from palmjax.data.store import TokenStore
from palmjax.evaluation.documents import Document

LENGTH, SHORTEST = 13, 8
CHUNK = 1 << 20
"""Tokens read from the store at a time."""
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class _Numbers:
    """A number for each word, and for each n-gram of numbers a hash; equal hashes are checked word by word."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def of(self, found: Sequence[str]) -> np.ndarray:
        """uint64 [n], from 1; words never seen before get a number of their own."""
        return np.array([self._ids.setdefault(word, len(self._ids) + 1) for word in found], np.uint64)


def _hashes(numbers: np.ndarray, n: int) -> np.ndarray:
    """uint64 [len - n + 1]: a polynomial over each n numbers."""
    count = len(numbers) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    out = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(n):
            out = out * _BASE + numbers[place : place + count]
    return out


def texts(document: Document) -> Iterator[str]:
    """What of a document may have been trained on: its texts and its right choices or answers."""
    yield from document.texts.values()
    yield from (document.choices[index] for index in document.right)
    yield from document.answers


def overlap(documents: Sequence[Document], store: TokenStore) -> list[bool | None]:
    """Of each document, in their order: True (dirty), False (clean) or None (its texts are too short to tell).

    Every document of the store is read once, from end to end.
    """
    numbers = _Numbers()
    wanted: dict[int, dict[int, list[tuple[tuple[int, ...], int]]]] = {}  # n -> hash -> (n-gram, document)
    tellable = [False] * len(documents)
    for index, document in enumerate(documents):
        for text in dict.fromkeys(texts(document)):
            row = numbers.of(words(text))
            n = min(LENGTH, len(row))
            if n < SHORTEST:
                continue
            tellable[index] = True
            for place, key in enumerate(_hashes(row, n).tolist()):
                gram = tuple(row[place : place + n].tolist())
                wanted.setdefault(n, {}).setdefault(key, []).append((gram, index))
    keys = {n: np.array(sorted(grams), np.uint64) for n, grams in wanted.items()}
    dirty = [False] * len(documents)
    for text in _store_texts(store):
        row = numbers.of(words(text))
        for n, sought in keys.items():
            hashes = _hashes(row, n)
            for place in np.flatnonzero(np.isin(hashes, sought)).tolist():
                gram = tuple(row[place : place + n].tolist())
                for other, index in wanted[n][int(hashes[place])]:
                    dirty[index] |= other == gram
    return [found if told else None for found, told in zip(dirty, tellable, strict=True)]


def _store_texts(store: TokenStore) -> Iterator[str]:
    """The text of each document of a store, read in pieces of about CHUNK tokens."""
    ends = store.document_ends()
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    first = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + CHUNK, side="right")))
        begin, end = starts[first], ends[last - 1]
        tokens, _ = store.read(np.array([begin]), np.array([end]), int(end - begin))
        for start, stop in zip(starts[first:last], ends[first:last], strict=True):
            yield store.vocabulary.decode(tokens[0, start - begin : stop - begin].tolist())
        first = last
