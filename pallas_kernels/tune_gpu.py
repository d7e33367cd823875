"""Block sizes of the Hopper kernels, timed on the GPU at hand, where `python -m pallas_kernels.tune` calls it.

Writes `attention/tuned/nvidia_*.json` and `decode_attention/tuned/nvidia_*.json` of that chip, as "measured", with
the microseconds in the provenance; "auto" then takes the kernels by itself. A row is written only if the result and the
gradients of what was chosen equal float32's within bfloat16's rounding. What a chip's memory does not hold is no
candidate: the compiler says so.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Mask, gpu_table
from pallas_kernels.attention import reference as plain
from pallas_kernels.attention.gpu_plan import Ring, Stream, Tuning
from pallas_kernels.attention.table import FOLDER, file_name
from pallas_kernels.decode_attention import gpu_plan as decode_plan
from pallas_kernels.decode_attention import gpu_table as decode_table
from pallas_kernels.decode_attention import reference as plain_decode

T = TypeVar("T")

RINGS = tuple(Ring(keys=keys, slots=slots) for keys in (128, 64) for slots in (2, 3, 4, 6))
STREAMS = tuple(Stream(queries=queries, stages=stages) for queries in (64, 128) for stages in (2, 3))
DECODE = tuple(
    decode_plan.Tuning(keys=keys, stages=stages, rounds=rounds)
    for keys in (128, 64)
    for stages in (1, 2, 3)
    for rounds in (2, 4, 8)
)
TOLERANCE = 2e-2
"""Of the difference from float32 by norm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is timed: causal multi-query attention of `rows` rows of `length` tokens, and one new token a row against
    `caches` full caches of `entries`. samples: of each candidate, of `calls` calls. interpret: of the kernels.
    """

    rows: int = 4
    length: int = 4096
    heads: int = 16
    caches: int = 32
    entries: int = 8192
    samples: int = 10
    calls: int = 10
    interpret: Any = False


def seconds(call: Callable[[], Any], setting: Setting) -> float:
    """A call's, the median of the samples."""
    jax.block_until_ready(call())
    found = []
    for _ in range(setting.samples):
        begun = time.perf_counter()
        last = None
        for _ in range(setting.calls):
            last = call()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - begun) / setting.calls)
    return statistics.median(found)


def best(name: str, tries: Iterable[T], call_of: Callable[[T], Callable[[], Any]], setting: Setting) -> tuple[T, float]:
    """(the fastest of `tries`, its seconds). Raises ValueError if none runs."""
    found: list[tuple[float, T]] = []
    for candidate in dict.fromkeys(tries):
        try:
            taken = seconds(call_of(candidate), setting)
        except Exception as error:  # what the compiler refuses, in whatever way, is no candidate
            print(f"{name} {candidate}: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        print(f"{name} {candidate}: {1e6 * taken:.1f} us", flush=True)
        found.append((taken, candidate))
    if not found:
        raise ValueError(f"tune: no candidate of {name} runs here")
    taken, chosen = min(found, key=lambda pair: pair[0])
    return chosen, taken


def _attend(setting: Setting, tuning: Tuning, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from pallas_kernels.attention import gpu  # Mosaic GPU is loaded where it is used

    first, stop = _causal(q)
    given: dict[str, Any] = dict(scale=q.shape[3] ** -0.5, tuning=tuning, ranged=False, interpret=setting.interpret)
    return gpu.attention(q, k, v, first, stop, **given)[0]


def _meaning(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    first, stop = _causal(q)
    return plain.attention(q, k, v, first, stop, scale=q.shape[3] ** -0.5)[0]


def _causal(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    stop = jnp.tile(jnp.arange(1, q.shape[1] + 1, dtype=jnp.int32), (q.shape[0], 1))
    return jnp.zeros_like(stop), stop


def attention_row(
    chip: str,
    width: int,
    tuning: Tuning,
    setting: Setting,
    rings: Iterable[Ring] = RINGS,
    streams: Iterable[Stream] = STREAMS,
) -> dict[str, Any]:
    """The row of `attention/tuned` for heads of `width`; tuning: where to begin. Raises ValueError."""
    of_queries, of_keys = ((setting.rows, setting.length, heads, width) for heads in (setting.heads, 1))
    q, k, v, do = _random(of_queries, of_keys, of_keys, of_queries)

    def forward(**change: Any) -> Callable[[], Any]:
        run = jax.jit(functools.partial(_attend, setting, dataclasses.replace(tuning, **change)))
        return lambda: run(q, k, v)

    def backward(**change: Any) -> Callable[[], Any]:
        call = functools.partial(_attend, setting, dataclasses.replace(tuning, **change))
        pullback = jax.jit(lambda q, k, v: jax.vjp(call, q, k, v)[1])(q, k, v)
        run = jax.jit(lambda pullback, do: pullback(do))
        return lambda: run(pullback, do)

    rings = tuple(rings)
    ring, took = best(f"forward of {width}", (tuning.forward, *rings), lambda x: forward(forward=x), setting)
    tuning = dataclasses.replace(tuning, forward=ring)
    ring, _ = best(f"dQ of {width}", (tuning.dq, *rings), lambda x: backward(dq=x), setting)
    tuning = dataclasses.replace(tuning, dq=ring)
    stream, back = best(f"dK and dV of {width}", (tuning.dkv, *streams), lambda x: backward(dkv=x), setting)
    tuning = dataclasses.replace(tuning, dkv=stream)

    def result(function: Callable[..., jax.Array], given: list[jax.Array]) -> list[jax.Array]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> list[jax.Array]:
            out, pullback = jax.vjp(function, q, k, v)
            return [out, *pullback(do)]

        return jax.jit(run)(*given)

    one = [x[:1] for x in (q, k, v, do)]
    with jax.default_matmul_precision("highest"):
        want = result(_meaning, [x.astype(jnp.float32) for x in one])
    _check(f"attention of {width}", result(functools.partial(_attend, setting, tuning), one), want)
    return _row(chip, width, tuning, {"forward_us": took, "backward_us": back})


def decode_row(
    chip: str,
    width: int,
    tuning: decode_plan.Tuning,
    setting: Setting,
    tries: Iterable[decode_plan.Tuning] = DECODE,
) -> dict[str, Any]:
    """The row of `decode_attention/tuned` for heads of `width`; tuning: where to begin. Raises ValueError."""
    from pallas_kernels.decode_attention import gpu

    cache = (1, setting.caches, setting.entries, 1, width)
    q, k, v = _random((setting.caches, 1, setting.heads, width), cache, cache)
    positions = jnp.full((setting.caches, 1), setting.entries - 1, jnp.int32)
    shared: dict[str, Any] = dict(mask=Mask(), scale=width**-0.5)

    def call_of(tuning: decode_plan.Tuning) -> Callable[[], jax.Array]:
        call = functools.partial(gpu.decode_attention, tuning=tuning, interpret=setting.interpret, **shared)
        run = jax.jit(call)
        return lambda: run(q, k, v, positions, 0)

    chosen, took = best(f"decode of {width}", (tuning, *tries), call_of, setting)
    wide = [x.astype(jnp.float32) for x in (q[:2], k[:, :2], v[:, :2])]
    with jax.default_matmul_precision("highest"):
        want = plain_decode.decode_attention(wide[0], wide[1], wide[2], positions[:2], jnp.int32(0), **shared)
    _check(f"decode of {width}", [call_of(chosen)()[:2]], [want])
    return _row(chip, width, chosen, {"us": took})


def _random(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def _check(name: str, got: list[jax.Array], want: list[jax.Array]) -> None:
    errors = [
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in zip(got, want, strict=True)
    ]
    if not max(errors) < TOLERANCE:
        raise ValueError(f"tune: {name} differs from float32 by {errors} on this device: nothing is written")


def _row(chip: str, width: int, tuning: Any, took: dict[str, float]) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    microseconds = {name: f"{1e6 * value:.1f}" for name, value in took.items()}
    provenance = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "date": date, **microseconds}
    given = {"chip": chip, "head_dim": width, "tuning": dataclasses.asdict(tuning)}
    return {**given, "source": "measured", "provenance": provenance}


def tables(device: str, setting: Setting) -> dict[Path, list[dict[str, Any]]]:
    """File to rows, of the chip that `device` is. Raises ValueError where there is no table of it."""
    if reasons := gpu_table.unknown(gpu_table.rows(), device):
        raise ValueError(f"tune: {reasons[0]}")
    found: dict[Path, list[dict[str, Any]]] = {}

    def add(folder: Path, rows: Iterable[gpu_table.Row[Any]], best_row: Callable[..., dict[str, Any]]) -> None:
        for row in rows:
            if device.startswith(row.chip):
                of_chip = found.setdefault(folder / file_name(row.chip), [])
                of_chip.append(best_row(row.chip, row.head_dim, row.tuning, setting))

    add(FOLDER, gpu_table.rows(), attention_row)
    add(decode_table.FOLDER, decode_table.rows(), decode_row)
    return found


def main(device: str) -> None:
    for path, rows in tables(device, Setting()).items():
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"wrote {path}")
