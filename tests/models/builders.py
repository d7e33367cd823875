"""Small models and batches for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from palmjax.data.batch import Batch
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, ParallelBlock
from palmjax.models.layers import SwiGLU


def tiny_palm(*, heads: int = 4, kv_heads: int = 1, attention: dict[str, Any] | None = None, **changes: Any) -> Decoder:
    """A PaLM of 3 layers and width 64 in float32; `changes` go to the Decoder, `attention` to its Attention."""
    block = ParallelBlock(
        attention=Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=16, **(attention or {})),
        mlp=SwiGLU(d_ff=128),
    )
    return Decoder(**{"vocab_size": 96, "num_layers": 3, "d_model": 64, "dtype": "float32", "block": block} | changes)


def random_batch(rows: int = 8, length: int = 24, vocab_size: int = 96, seed: int = 0) -> Batch:
    """Random tokens, one segment a row, about a tenth of the targets without weight."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(3, vocab_size, (rows, length + 1), dtype=np.int32)
    return Batch(
        tokens=stream[:, :-1],
        targets=stream[:, 1:],
        weights=(rng.random((rows, length)) > 0.1).astype(np.float32),
        segments=np.ones((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    )
