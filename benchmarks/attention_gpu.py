"""Attention on an H100 or H200 beside cuDNN, tokamax and torch, in one run: forward and backward, TFLOP/s; and of one
new token a row against a cache, TB/s (`benchmarks/decode_attention_gpu.py`).

    python -m benchmarks.attention_gpu             # writes benchmarks/results/attention_gpu_<card>_<date>.json
    python -m benchmarks.attention_gpu --dry_run   # without a GPU: XLA in our kernels' place, torch on the CPU, tiny

16,384 tokens in rows of 2k to 16k, bfloat16, causal; FLOPs are counted with the causal half (4 B H D T^2 / 2 forward,
2.5 times that backward). Random inputs, several sets in turn, larger than the L2 cache together. Before anything is
timed, each implementation's result and gradients are held against float32 on the first row.

How is in `benchmarks/gpu_timing.py`; the figure is the median of the samples, with their quartiles. The card's rate for
a large product and for a copy are measured in the same run, and shares of them are printed. torch
(scaled_dot_product_attention by cuDNN and by FlashAttention 2) is a process of its own, timed by CUDA events. `ours,
packed` has documents of about 512 tokens in its rows; `ours, ranged` the same ranges as `ours`, but as data.

A dry run goes through all of it but the kernels, which have their own tests, so that no slip waits for the day on which
there is a GPU; no figure of it means anything. It ends with an error if anything but cuDNN or tokamax fails.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode_attention_gpu
from benchmarks.gpu_timing import TOLERANCE, Timing, card, difference, failure, samples, summary
from pallas_kernels.attention import Case, Mask, attention
from pallas_kernels.attention.choice import refusals

RESULTS = Path(__file__).parent / "results"
TOKENS = 16384
HEADS = ((16, 1), (32, 1), (48, 1), (8, 8))
LENGTHS = (2048, 4096, 8192, 16384)
SETS = 3


def shape_flops(shape: tuple[int, ...], backward: bool) -> float:
    rows, length, heads, _, width = shape
    return (2.5 if backward else 1.0) * 4 * rows * heads * width * length**2 / 2


def inputs(shape: tuple[int, ...], seed: int) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the result."""
    rows, length, heads, kv_heads, width = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return tuple(
        jax.random.normal(key, (rows, length, n, width), jnp.bfloat16) for key, n in zip(keys, counts, strict=True)
    )


Passes = tuple[Callable[..., Any], Callable[..., Any]]
"""(q, k, v, segments) -> (out, pullback), and (pullback, cotangent) -> gradients, each one program."""


def implementations(
    shape: tuple[int, ...], chip: str, ours: str
) -> dict[str, tuple[Callable[..., jax.Array], jax.Array | None]]:
    """Name to attention(q, k, v, segments=) and its segments, of those that can do it here; the reasons of the others
    are printed. ours: the implementation that is measured, or stands in for it.
    """
    rows, length, heads, kv_heads, width = shape
    case = Case(rows=rows, length=length, heads=heads, kv_heads=kv_heads, head_dim=width, dtype="bfloat16", mask=Mask())
    peers = {}
    for name in ("cudnn", "tokamax"):
        if reasons := refusals(name, case, chip):
            print(f"  {name} is left out: {'; '.join(reasons)}")
        else:
            peers[name] = functools.partial(attention, impl=name, chip=chip), None
    call = functools.partial(attention, impl=ours, chip=chip)
    cuts = np.sort(np.random.default_rng(0).choice(length, max(length // 512, 1), replace=False))
    packed = jnp.tile(jnp.searchsorted(jnp.asarray(cuts), jnp.arange(length), side="right")[None], (rows, 1))
    one = jnp.zeros((rows, length), jnp.int32)
    return {
        "ours": (call, None),
        **peers,
        "ours, packed": (call, packed.astype(jnp.int32)),
        "ours, ranged": (call, one),
    }


def passes(function: Callable[..., jax.Array]) -> Passes:
    """Of an implementation; the forward pass with what the backward pass needs."""

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> Any:
        return jax.vjp(functools.partial(function, segments=segments), q, k, v)

    return jax.jit(forward), jax.jit(lambda pullback, do: pullback(do))


@functools.cache
def plain() -> Passes:
    """What the others are held against."""
    return passes(functools.partial(attention, impl="xla"))


def errors(both: Passes, segments: jax.Array | None, shape: tuple[int, ...]) -> list[float]:
    """Differences of out, dq, dk and dv from float32, by norm, on the first row."""
    given = [x[:1] for x in inputs(shape, 0)]
    segments = None if segments is None else segments[:1]
    out, pullback = both[0](*given[:3], segments)
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in given]
        want, true_pullback = plain()[0](*wide[:3], segments)
        wanted = [want, *plain()[1](true_pullback, wide[3])]
    pairs = zip([out, *both[1](pullback, given[3])], wanted, strict=True)
    return [difference(got, want) for got, want in pairs]


def measure(shape: tuple[int, ...], chip: str, ours: str, timing: Timing) -> dict[str, Any]:
    """Implementation to its errors and, unless they are too large, its forward and backward rates."""
    functions = implementations(shape, chip, ours)
    found: dict[str, Any] = {}
    right: dict[str, Passes] = {}
    for name, (function, segments) in functions.items():
        both = passes(function)
        try:
            found[name] = {"errors": errors(both, segments, shape)}
        except Exception as error:
            found[name] = failure(error)
            continue
        if max(found[name]["errors"]) < TOLERANCE:
            right[name] = both
        else:
            found[name]["failed"] = f"differs from float32: {found[name]['errors']}"
    sets = [inputs(shape, seed) for seed in range(SETS)]
    forward: dict[str, Any] = {}
    backward: dict[str, Any] = {}
    for name, (with_pullback, of_pullback) in right.items():
        function, segments = functions[name]
        alone = jax.jit(functools.partial(function, segments=segments))
        pullbacks = [with_pullback(*given[:3], segments)[1] for given in sets]
        forward[name] = lambda i, f=alone: f(*sets[i % SETS][:3])
        backward[name] = lambda i, f=of_pullback, p=pullbacks: f(p[i % SETS], sets[i % SETS][3])
    for which, calls in (("forward", forward), ("backward", backward)):
        for name, seconds in samples(calls, timing).items():
            found[name][which] = summary(seconds, shape_flops(shape, which == "backward"))
    return found


def of_torch(op: str, shape: tuple[int, ...], count: int, device: str, work: dict[str, float]) -> dict[str, Any]:
    """What `benchmarks.attention_torch` finds. work: of a pass, operations or bytes."""
    job = json.dumps({"op": op, "shape": shape, "count": count, "device": device})
    command = [sys.executable, "-m", "benchmarks.attention_torch", job]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"torch": {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}}
    found = json.loads(done.stdout.splitlines()[-1])
    for entry in found.values():
        for which in set(work) & set(entry):
            entry[which] = summary(entry[which], work[which])
    return found


def show(found: dict[str, Any], peak: float, unit: str, of: str) -> None:
    for name, entry in found.items():
        line = f"  {name:<14}"
        for which in ("forward", "backward"):
            if which in entry:
                x = entry[which]
                line += f"{which} {x['rate']:7.2f} {unit} ({x['low']:.2f} to {x['high']:.2f}), "
                line += f"{x['rate'] / peak:4.0%} of the {of}'s   "
        print(line + entry.get("failed", ""), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="tiny, on a CPU: that the program itself is right")
    parser.add_argument("--samples", type=int, default=20, help="at least 2")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(argv)
    dry = options.dry_run
    at_hand = jax.devices()[0].device_kind
    if not dry and jax.default_backend() != "gpu":
        parser.error(f"the device at hand is {at_hand!r}: this needs an H100 or H200; --dry_run goes without")
    chip, ours, device = ("NVIDIA H200", "xla", "cpu") if dry else (at_hand, "gpu", "cuda")
    timing = Timing(count=2, seconds=0.0) if dry else Timing(count=options.samples)
    shapes = [
        (TOKENS // length, length, *heads, width) for width in options.widths for heads in HEADS for length in LENGTHS
    ]
    caches = [
        (rows, entries, *heads) for rows, entries in decode_attention_gpu.CACHES for heads in decode_attention_gpu.HEADS
    ]
    if dry:
        shapes, caches = [(1, 40, 2, 1, 64)], [(2, 64, 4, 2, 64)]
    packages = ("jax", "jaxlib", "tokamax", "torch", "jax-cuda13-plugin")
    report: dict[str, Any] = {
        "command": "python -m benchmarks.attention_gpu " + " ".join(argv if argv is not None else sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": at_hand,
        "versions": {name: version(name) for name in packages if _installed(name)},
        "rates": card(timing, 128 if dry else 8192),
        "rows": [],
        "decode": [],
    }
    product, copy = (report["rates"][name]["rate"] for name in ("matmul", "copy"))
    print(f"{at_hand}: product {product:.1f} TFLOP/s, copy {copy:.2f} TB/s")
    torch = importlib.util.find_spec("torch") is not None
    for shape in shapes:
        rows, length, heads, kv_heads, width = shape
        print(f"{rows} x {length} tokens, {heads} query heads, {kv_heads} key/value heads of {width}")
        found = measure(shape, chip, ours, timing)
        if torch:
            work = {which: shape_flops(shape, which == "backward") for which in ("forward", "backward")}
            found |= of_torch("rows", shape, timing.count, device, work)
        show(found, product, "TFLOP/s", "product")
        report["rows"].append({"shape": shape, "found": found})
    for shape in caches:
        rows, entries, heads, kv_heads, width = shape
        print(f"{rows} caches of {entries}, {heads} query heads, {kv_heads} key/value heads of {width}")
        found = decode_attention_gpu.measure(shape, chip, ours, timing)
        if torch:
            work = {"forward": float(decode_attention_gpu.bytes_read(shape))}
            found |= of_torch("decode", shape, timing.count, device, work)
        show(found, copy, "TB/s", "copy")
        report["decode"].append({"shape": shape, "found": found})
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"attention_gpu_{at_hand.lower().replace(' ', '_')}_{report['date'][:10]}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")
    failed = {
        name for entry in (*report["rows"], *report["decode"]) for name, x in entry["found"].items() if "failed" in x
    }
    if dry and (failed := failed - {"cudnn", "tokamax"}):
        sys.exit(f"failed: {', '.join(sorted(failed))}")


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
