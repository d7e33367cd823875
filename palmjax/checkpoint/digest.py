"""Digests of arrays, computed where they lie: equal for equal bits, whatever the mesh and the number of processes.

A digest is 64 bits: two sums modulo 2^32, over all elements, of the element's bits mixed with its place (ours; the
mixer is the finalizer of MurmurHash3, and sums modulo 2^32 come out the same in any order, as those of floats do not).
It is written with a checkpoint and compared after each restore, so that a value which changed anywhere between the
device that saved it and the device that has it now (copy, host memory, library, disk) is noticed. It is no protection
against a forger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palmjax.checkpoint import tree as trees

_SALTS = (0x9E3779B9, 0x7FEB352D)
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(x: Any) -> Any:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(x: jax.Array) -> jax.Array:
    """The elements as uint32, [..., 2] for 8-byte types."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)


@jax.jit
def sums(x: jax.Array, row: Any = 0) -> jax.Array:
    """The two sums of one array, uint32 [2]; traceable. row: place of its first row, for an array given in parts."""
    bits = _bits(x)
    place = jnp.zeros((1,) * bits.ndim, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        along = jnp.arange(size, dtype=jnp.uint32) + (jnp.uint32(row) if axis == 0 else jnp.uint32(0))
        along = _mix(along + np.uint32((axis + 1) * 0x27D4EB2F & 0xFFFFFFFF))
        place = place * np.uint32(0x01000193) + along.reshape([size if a == axis else 1 for a in range(bits.ndim)])
    terms = [_mix(_mix(bits + np.uint32(salt)) ^ (place * np.uint32(salt))) for salt in _SALTS]
    # One reduction of both, so that nothing of the array's size is kept in between.
    zero = jnp.uint32(0)
    both = jax.lax.reduce(terms, [zero, zero], lambda a, b: (a[0] + b[0], a[1] + b[1]), range(bits.ndim))
    return jnp.stack(both)


def text(two: Any) -> str:
    """A digest as 16 hexadecimal digits."""
    low, high = (int(value) for value in np.asarray(two))
    return f"{high:08x}{low:08x}"


def digests(tree: Any) -> dict[str, str]:
    """{name: digest} of every array of `tree`, whose names are those of `describe`. All processes call it together.

    Waits for the arrays: they are read once where they lie, and eight bytes of each come back.
    """
    jax.block_until_ready(tree)
    # One by one: they need not lie on the same devices, and many small programs with collectives in flight behind a
    # step can starve each other of threads on a host with more (virtual) CPU devices than cores.
    return {"/".join(name): text(sums(leaf)) for name, leaf in trees.leaves(tree)}


def differing(saved: Mapping[str, str], tree: Any) -> Iterator[str]:
    """Names of the arrays of `tree` that are not what `saved` recorded; arrays without a record are passed over."""
    if saved:
        yield from (name for name, now in digests(tree).items() if saved.get(name, now) != now)
