"""What the benchmarks on a GPU share: who is right, calls in queues, implementations in turns, the card's own rates."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

TOLERANCE = 2e-2
"""Of the difference from float32 by norm: bfloat16 keeps 8 bits."""


def difference(got: jax.Array, want: jax.Array) -> float:
    """By norm, of `want`, which is float32."""
    return float(jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want))


def failure(error: Exception) -> dict[str, str]:
    """What is reported of an implementation that refuses, or fails, in whatever way; the others go on."""
    return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def queue_seconds(call: Callable[[int], object], count: int) -> float:
    """Seconds until `count` calls are done, the wait at the end included."""
    begun = time.perf_counter()
    last = None
    for index in range(count):
        last = call(index)
    jax.block_until_ready(last)
    return time.perf_counter() - begun


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """`count` samples of each call, at least 2. A sample is the difference between a queue of about `seconds` and one
    twice as long, over the calls by which they differ: neither the launch nor the wait at the end is in it.
    """

    count: int
    seconds: float = 0.03


def samples(calls: dict[str, Callable[[int], object]], timing: Timing) -> dict[str, list[float]]:
    """Seconds a call, of each, in turns whose order changes."""
    lengths: dict[str, int] = {}
    for name, call in calls.items():
        jax.block_until_ready(call(0))
        lengths[name] = max(4, min(200, int(timing.seconds / max(queue_seconds(call, 4) / 4, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(timing.count):
        random.shuffle(order)
        for name in order:
            n = lengths[name]
            short = queue_seconds(calls[name], n)
            # Where calls take nothing the difference is noise, which may be below nothing.
            found[name].append(max(queue_seconds(calls[name], 2 * n) - short, 1e-9) / n)
    return found


def summary(seconds: list[float], work: float) -> dict[str, float]:
    """Median and quartiles of work a second, in units of 1e12, and the median of milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"ms": 1e3 * middle, "rate": work / middle / 1e12, "low": work / high / 1e12, "high": work / low / 1e12}


def card(timing: Timing, size: int) -> dict[str, dict[str, float]]:
    """The card's rate for a square product, TFLOP/s, and for a copy, TB/s read and written."""
    a, b = (jax.random.normal(jax.random.key(n), (size, size), jnp.bfloat16) for n in range(2))
    big = jnp.zeros((16 * size * size,), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    found = samples({"matmul": lambda _: product(a, b), "copy": lambda _: copy(big)}, timing)
    return {
        "matmul": summary(found["matmul"], 2.0 * size**3),
        "copy": summary(found["copy"], 2.0 * big.nbytes),
    }
