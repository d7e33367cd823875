"""What a token costs to decode, by the room in the cache and by how full it is. `python -m benchmarks.decode`

The model is that of benchmarks/train_step.py (4 layers, width 256, 8 heads, bytes, float32), random. For caches of 256
and 2048 tokens a row, timed in turn, it prints milliseconds a token and two ratios:
- room: the same few tokens in a cache with room for 2048 and in one with room for 256. A cache that is written or read
  as a whole for each token (T5X adds a one-hot update over all of it) pays for the room; writing in place does not.
- filled: the last tokens of a full cache of 2048 against those of a full one of 256. What is read grows eightfold, so
  this ratio is above 1 in the end; it tells how much attention weighs against the matrices.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, ParallelBlock
from palmjax.models.layers import SwiGLU

SMALL, LARGE, TOKENS = 256, 2048, 64


def decoder(kv_heads: int) -> Any:
    """The benchmark's model."""
    attention = Attention(num_heads=8, num_kv_heads=kv_heads, head_dim=32)
    block = ParallelBlock(attention=attention, mlp=SwiGLU(d_ff=1024))
    return Decoder(vocab_size=259, num_layers=4, d_model=256, dtype="float32", block=block).build()


def run(model: Any, params: Any, rows: int, room: int, filled: int) -> Callable[[], float]:
    """A call decodes TOKENS tokens a row, greedily, behind `filled` ones; it returns the seconds they took."""

    @jax.jit
    def decode(params: Any, cache: Any) -> jax.Array:
        def step(_: int, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            logits, cache = model.extend(params, *carry)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, TOKENS, step, (jnp.ones(rows, jnp.int32), cache))[0]

    cache = model.init_cache(rows, room) | {"length": np.full(rows, filled, np.int32)}

    def call() -> float:
        began = time.perf_counter()
        jax.block_until_ready(decode(params, cache))
        return time.perf_counter() - began

    call()
    return call


def compare(kv_heads: int, rows: int, repeats: int) -> None:
    """Times the four cases in turn and prints the best of each: what another process takes only ever adds."""
    model = decoder(kv_heads)
    params = jax.jit(model.init)(jax.random.key(0))
    cases = {
        "room for 256": run(model, params, rows, SMALL, 0),
        "room for 2048": run(model, params, rows, LARGE, 0),
        "256 filled": run(model, params, rows, SMALL, SMALL - TOKENS),
        "2048 filled": run(model, params, rows, LARGE, LARGE - TOKENS),
    }
    seconds = dict.fromkeys(cases, float("inf"))
    for _ in range(repeats):
        for name, call in cases.items():
            seconds[name] = min(seconds[name], call())
    times = ", ".join(f"{name} {1e3 * value / TOKENS:.2f} ms" for name, value in seconds.items())
    room = seconds["room for 2048"] / seconds["room for 256"]
    filled = seconds["2048 filled"] / seconds["256 filled"]
    speed = rows * TOKENS / seconds["room for 256"]
    print(f"{kv_heads} key/value heads, {rows} rows: {times} a step of {rows} tokens; {speed:,.0f} tok/s")
    print(f"  room x{room:.2f}, filled x{filled:.2f} (2048 against 256)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="times that each case is run")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="batch sizes")
    options = parser.parse_args()
    for kv_heads in (1, 8):
        for rows in options.rows:
            compare(kv_heads, rows, options.repeats)


if __name__ == "__main__":
    main()
