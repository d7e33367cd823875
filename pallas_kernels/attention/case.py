"""One call of attention as a value: what choosing an implementation, its block sizes and its cost depends on."""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.attention.masks import Mask

MASKS = ("causal", "full", "window", "packed")
"""What block sizes depend on of a mask: whether tiles are cut on one side, on none or on both, and whether by indices
alone or ("packed": segments, a prefix) by data.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of one device's part: B rows, T tokens, H query heads, K key/value heads, D head dimension.

    segments, prefix, alibi, soft_cap, bias: whether they are given. lse: whether the log-sum-exp is asked for.
    """

    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    mask: Mask
    segments: bool = False
    prefix: bool = False
    alibi: bool = False
    soft_cap: bool = False
    bias: bool = False
    lse: bool = False

    @property
    def ranged(self) -> bool:
        """Whether what a query sees depends on data, beyond what `mask` says of a whole row."""
        return self.segments or self.prefix

    @property
    def mask_class(self) -> str:
        """Its one of `MASKS`. A window that holds the whole row is none."""
        if self.ranged:
            return "packed"
        if self.mask.window is not None and self.mask.window < self.length:
            return "window"
        return "causal" if self.mask.causal else "full"

    @property
    def pairs(self) -> int:
        """Query-key pairs of one row and head that the mask leaves, without segments."""
        t = self.length
        back = t if self.mask.window is None else min(self.mask.window, t)
        behind = back * t - back * (back - 1) // 2
        return behind if self.mask.causal else behind + t * (t - 1) // 2

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of the two products over those pairs."""
        return 4 * self.rows * self.heads * self.head_dim * self.pairs

    @property
    def itemsize(self) -> int:
        """Bytes of an element of q, k and v."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        extras = [name for name in ("segments", "prefix", "alibi", "soft_cap", "bias", "lse") if getattr(self, name)]
        mask = "causal" if self.mask.causal else "bidirectional"
        mask += f" window {self.mask.window}" if self.mask.window is not None else ""
        return (
            f"q [{self.rows},{self.length},{self.heads},{self.head_dim}], "
            f"k and v [{self.rows},{self.length},{self.kv_heads},{self.head_dim}] {self.dtype}, "
            + ", ".join([mask, *extras])
        )
