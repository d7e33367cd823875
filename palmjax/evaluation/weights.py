"""A fingerprint of parameters: of names, types, shapes and bits, whatever the mesh and the number of processes."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_SALTS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)


def fingerprint(params: Any) -> str:
    """SHA-256 over the arrays' names, types, shapes and sums. All processes of a job call it together.

    Of each array four sums modulo 2^32, of every element's bits hashed with its place: sums of integers come out the
    same in any order, wherever the parts lie. It tells one model from another; it is no protection against a forger.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_sums(leaf) for _, leaf in named])
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {np.asarray(four).tolist()}"
        for (path, leaf), four in zip(named, sums, strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """uint32 [4]."""
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((1,) * x.ndim, jnp.uint32)
    for axis, size in enumerate(x.shape):
        along = _mixed(jnp.arange(size, dtype=jnp.uint32) + np.uint32(axis + 1))
        place = _mixed(place + along.reshape([size if a == axis else 1 for a in range(x.ndim)]))
    return jnp.stack([jnp.sum(_mixed(_mixed(bits ^ np.uint32(salt)) + place), dtype=jnp.uint32) for salt in _SALTS])


def _mixed(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
