"""One call of attention against a cache as a value: what choosing an implementation depends on."""

from __future__ import annotations

import dataclasses

MOST_ROWS = 256
"""Queries times heads that a kernel holds: more is a prompt, and no longer bound by the cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of one device's part: B rows of Q new tokens, H query heads, K key/value heads, S entries of a cache.

    page: entries of a page where the cache is paged. bias: whether one is given.
    """

    rows: int
    queries: int
    heads: int
    kv_heads: int
    entries: int
    head_dim: int
    dtype: str
    cache_dtype: str
    page: int | None = None
    bias: bool = False

    def __str__(self) -> str:
        extras = [f"pages of {self.page}"] if self.page else []
        extras += ["bias"] if self.bias else []
        return ", ".join(
            [
                f"q [{self.rows},{self.queries},{self.heads},{self.head_dim}] {self.dtype}",
                f"{self.entries} entries of {self.kv_heads} heads {self.cache_dtype}",
                *extras,
            ]
        )
