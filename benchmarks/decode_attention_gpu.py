"""Attention of one new token a row against a cache, on an H100 or H200: what `benchmarks.attention_gpu` measures of it.

TB/s of keys and values that are read, to be held against a plain copy's: full caches, and `ours, ragged`, whose rows
are filled to between nothing and all, with only what is filled counted. Peers are XLA block by block (`xla`), cuDNN
through jax.nn and torch's attention. All read several caches in turn, larger than the L2 cache together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_timing import TOLERANCE, Timing, difference, failure, samples, summary
from pallas_kernels.attention import Mask
from pallas_kernels.decode_attention import decode_attention

CACHES = ((32, 8192), (128, 2048), (8, 32768))
"""(rows, entries)."""

HEADS = ((16, 1, 256), (48, 1, 256), (32, 8, 128))
"""(query heads, key/value heads, width)."""

SETS = 3


def shapes() -> list[tuple[int, ...]]:
    """All that are measured, [B, S, H, K, D]."""
    return [(*cache, *heads) for cache in CACHES for heads in HEADS]


def bytes_read(shape: tuple[int, ...], entries: int | None = None) -> int:
    """Of keys and values, bfloat16. shape: [B, S, H, K, D]; entries: that are filled, of all rows."""
    rows, length, _, kv_heads, width = shape
    return 2 * 2 * (rows * length if entries is None else entries) * kv_heads * width


def inputs(shape: tuple[int, ...], seed: int) -> tuple[jax.Array, ...]:
    """q [B, 1, H, D], and k and v of one layer, [1, B, S, K, D]."""
    rows, entries, heads, kv_heads, width = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = ((rows, 1, heads, width), *[(1, rows, entries, kv_heads, width)] * 2)
    return tuple(jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True))


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    lengths = positions[:, 0] + 1
    return jax.nn.dot_product_attention(q, k[0], v[0], key_value_seq_lengths=lengths, implementation="cudnn")


def measure(shape: tuple[int, ...], chip: str, ours: str, timing: Timing) -> dict[str, Any]:
    """Implementation to its error and, unless it is too large, its rate. ours: the implementation that is measured, or
    stands in for it.
    """
    rows, entries = shape[:2]
    full = jnp.full((rows, 1), entries - 1, jnp.int32)
    filled = np.random.default_rng(0).integers(1, entries + 1, (rows, 1))
    ragged = jnp.asarray(filled - 1, jnp.int32)
    call = functools.partial(decode_attention, mask=Mask())
    kernel = functools.partial(call, impl=ours, chip=chip)
    cases: dict[str, tuple[Callable[..., Any], jax.Array, int]] = {
        "ours": (kernel, full, bytes_read(shape)),
        "xla": (functools.partial(call, impl="xla"), full, bytes_read(shape)),
        "cudnn": (_cudnn, full, bytes_read(shape)),
        "ours, ragged": (kernel, ragged, bytes_read(shape, int(filled.sum()))),
    }
    sets = [inputs(shape, seed) for seed in range(SETS)]
    # Two rows at a time: the reference has all scores.
    few = [sets[0][0][:2], *(x[:, :2] for x in sets[0][1:])]
    wide = [x.astype(jnp.float32) for x in few]
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[int], Any]] = {}
    plain = jax.jit(functools.partial(call, impl="reference"))
    for name, (function, positions, _) in cases.items():
        program = jax.jit(function)
        # A GPU would take TensorFloat32's ten bits for float32's products.
        with jax.default_matmul_precision("highest"):
            want = plain(*wide, positions[:2])
        try:
            found[name] = {"error": difference(program(*few, positions[:2]), want)}
        except Exception as error:
            found[name] = failure(error)
            continue
        if not found[name]["error"] < TOLERANCE:
            found[name]["failed"] = f"differs from float32: {found[name]['error']:.1e}"
        else:
            calls[name] = lambda i, f=program, p=positions: f(*sets[i % SETS], p)
    for name, seconds in samples(calls, timing).items():
        found[name]["forward"] = summary(seconds, float(cases[name][2]))
    return found
