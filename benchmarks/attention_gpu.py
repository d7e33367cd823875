"""Attention on an H100 or H200 beside cuDNN, tokamax and torch, in one run: forward and backward, TFLOP/s.

    python -m benchmarks.attention_gpu             # writes benchmarks/results/attention_gpu_<card>_<date>.json
    python -m benchmarks.attention_gpu --check     # without a GPU: tiny and interpreted; no figure means anything

16,384 tokens in rows of 2k to 16k, bfloat16, causal; FLOPs are counted with the causal half (4 B H D T^2 / 2 forward,
2.5 times that backward). Random inputs, several sets in turn, larger than the L2 cache together. Before anything is
timed, each implementation's result and gradients are held against float32 on the first row.

A sample is the difference between a long and a short queue of calls, over the calls by which they differ, so neither
the launch nor the wait at the end is in it; the figure is the median of the samples, with their quartiles.
Implementations take turns in an order that changes. The card's rate for a large product and for a copy are measured in
the same run, and shares of them are printed. torch (scaled_dot_product_attention by cuDNN and by FlashAttention 2) is
a process of its own, timed by CUDA events. `ours, packed` has documents of about 512 tokens in its rows; `ours,
ranged` the same ranges as `ours`, but as data.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Case, Mask, attention
from pallas_kernels.attention.choice import refusals

RESULTS = Path(__file__).parent / "results"
TOKENS = 16384
HEADS = ((16, 1), (32, 1), (48, 1), (8, 8))
LENGTHS = (2048, 4096, 8192, 16384)
SETS = 3
TOLERANCE = 2e-2
"""Of the difference from float32 by norm: bfloat16 keeps 8 bits."""


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


def implementations(shape: tuple[int, ...], chip: str, interpret: bool) -> dict[str, Callable[..., Any]]:
    """Name to attention(q, k, v), of those that can do it here; the reasons of the others are printed."""
    rows, length, heads, kv_heads, width = shape
    case = Case(rows=rows, length=length, heads=heads, kv_heads=kv_heads, head_dim=width, dtype="bfloat16", mask=Mask())
    found: dict[str, Callable[..., Any]] = {}
    for name in ("gpu", "cudnn", "tokamax"):
        if reasons := refusals(name, case, chip):
            print(f"  {name} is left out: {'; '.join(reasons)}")
        elif name == "gpu" or not interpret:
            found[name] = functools.partial(attention, impl=name, chip=chip, interpret=interpret and name == "gpu")
    ours = found.pop("gpu")
    cuts = np.sort(np.random.default_rng(0).choice(length, max(length // 512, 1), replace=False))
    packed = jnp.tile(jnp.searchsorted(jnp.asarray(cuts), jnp.arange(length), side="right")[None], (rows, 1))
    one = jnp.zeros((rows, length), jnp.int32)
    return {
        "ours": ours,
        **found,
        "ours, packed": functools.partial(ours, segments=packed.astype(jnp.int32)),
        "ours, ranged": functools.partial(ours, segments=one),
    }


def passes(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward with what the backward pass needs, backward), each one program."""
    return jax.jit(lambda q, k, v: jax.vjp(function, q, k, v)), jax.jit(lambda pullback, do: pullback(do))


def errors(function: Callable[..., Any], shape: tuple[int, ...]) -> list[float]:
    """Differences of out, dq, dk and dv from float32, by norm, on the first row."""
    segments = getattr(function, "keywords", {}).get("segments")
    given = [x[:1] for x in inputs(shape, 0)]
    if segments is not None:
        function = functools.partial(function, segments=segments[:1])
    forward, backward = passes(function)
    out, pullback = forward(*given[:3])
    with jax.default_matmul_precision("highest"):
        plain = functools.partial(attention, impl="xla", segments=None if segments is None else segments[:1])
        forward, true_backward = passes(plain)
        wide = [x.astype(jnp.float32) for x in given]
        want, true_pullback = forward(*wide[:3])
        wanted = [want, *true_backward(true_pullback, wide[3])]
    pairs = zip([out, *backward(pullback, given[3])], wanted, strict=True)
    return [float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs]


def queue_seconds(call: Callable[[int], Any], count: int) -> float:
    begun = time.perf_counter()
    for index in range(count):
        last = call(index)
    jax.block_until_ready(last)
    return time.perf_counter() - begun


def samples(calls: dict[str, Callable[[int], Any]], count: int) -> dict[str, list[float]]:
    """Seconds a call, `count` of each, in turns."""
    if count == 1:
        return {name: [queue_seconds(call, 1)] for name, call in calls.items()}
    lengths: dict[str, int] = {}
    for name, call in calls.items():
        jax.block_until_ready(call(0))
        lengths[name] = max(4, min(200, int(0.03 / max(queue_seconds(call, 4) / 4, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(count):
        random.shuffle(order)
        for name in order:
            n = lengths[name]
            short = queue_seconds(calls[name], n)
            found[name].append((queue_seconds(calls[name], 2 * n) - short) / n)
    return found


def summary(seconds: list[float], work: float) -> dict[str, float]:
    """Median and quartiles of work a second, in units of 1e12, and the median of milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"ms": 1e3 * middle, "rate": work / middle / 1e12, "low": work / high / 1e12, "high": work / low / 1e12}


def card(count: int, size: int) -> dict[str, dict[str, float]]:
    """The card's rate for a square product, TFLOP/s, and for a copy, TB/s read and written."""
    a, b = (jax.random.normal(jax.random.key(n), (size, size), jnp.bfloat16) for n in range(2))
    big = jnp.zeros((16 * size * size,), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    found = samples({"matmul": lambda _: product(a, b), "copy": lambda _: copy(big)}, count)
    return {
        "matmul": summary(found["matmul"], 2.0 * size**3),
        "copy": summary(found["copy"], 2.0 * big.nbytes),
    }


def measure(shape: tuple[int, ...], chip: str, count: int, interpret: bool) -> dict[str, Any]:
    """Implementation to its errors and, unless they are too large, its forward and backward rates."""
    functions = implementations(shape, chip, interpret)
    found: dict[str, Any] = {}
    for name, function in functions.items():
        try:
            found[name] = {"errors": errors(function, shape)}
        except Exception as error:  # a peer may refuse, or fail, in any way; the others go on
            found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        if not max(found[name]["errors"]) < TOLERANCE:
            found[name]["failed"] = f"differs from float32: {found[name]['errors']}"
    right = {name: passes(functions[name]) for name in found if "failed" not in found[name]}
    sets = [inputs(shape, seed) for seed in range(SETS if count > 1 else 1)]
    programs = {name: jax.jit(functions[name]) for name in right}
    forward: dict[str, Any] = {name: lambda i, f=programs[name]: f(*sets[i % len(sets)][:3]) for name in right}
    for name, seconds in samples(forward, count).items():
        found[name]["forward"] = summary(seconds, shape_flops(shape, False))
    pullbacks = {name: [f(*given[:3])[1] for given in sets] for name, (f, _) in right.items()}
    backward: dict[str, Any] = {
        name: lambda i, b=b, name=name: b(pullbacks[name][i % len(sets)], sets[i % len(sets)][3])
        for name, (_, b) in right.items()
    }
    for name, seconds in samples(backward, count).items():
        found[name]["backward"] = summary(seconds, shape_flops(shape, True))
    return found


_TORCH = """
import json, statistics, sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
(rows, length, heads, kv_heads, width), count = json.loads(sys.argv[1])
found = {}
make = lambda n: [torch.randn(rows, n, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
for name, backend in (("torch cudnn", SDPBackend.CUDNN_ATTENTION), ("torch fa2", SDPBackend.FLASH_ATTENTION)):
    try:
        q, k, v, do = make(heads), make(kv_heads), make(kv_heads), make(heads)
        for x in q + k + v:
            x.requires_grad_()
        def forward(i):
            wide = [x[i].expand(-1, heads, -1, -1) if kv_heads == 1 else x[i] for x in (k, v)]
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q[i], *wide, is_causal=True)
        outs = [forward(i) for i in range(3)]
        def backward(i):
            return torch.autograd.grad(outs[i], (q[i], k[i], v[i]), do[i], retain_graph=True)
        found[name] = {}
        for which, call in (("forward", forward), ("backward", backward)):
            call(0)
            seconds = []
            for _ in range(count):
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record()
                for i in range(12):
                    call(i % 3)
                b.record()
                b.synchronize()
                seconds.append(a.elapsed_time(b) / 12e3)
            found[name][which] = seconds
    except Exception as error:
        found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
print(json.dumps(found))
"""


def of_torch(shape: tuple[int, ...], count: int) -> dict[str, Any]:
    """What torch takes, in a process of its own; with its K/V heads repeated in place, as it has no MQA of its own."""
    command = [sys.executable, "-c", _TORCH, json.dumps([shape, count])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"torch": {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}}
    found = json.loads(done.stdout.splitlines()[-1])
    for entry in found.values():
        for which in {"forward", "backward"} & set(entry):
            entry[which] = summary(entry[which], shape_flops(shape, which == "backward"))
    return found


def show(found: dict[str, Any], peak: float) -> None:
    for name, entry in found.items():
        line = f"  {name:<14}"
        for which in ("forward", "backward"):
            if which in entry:
                x = entry[which]
                shares = f"{x['rate'] / peak:4.0%} of the product's"
                line += f"{which} {x['rate']:7.1f} TFLOP/s ({x['low']:.1f} to {x['high']:.1f}), {shares}   "
        print(line + entry.get("failed", ""), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="tiny and interpreted, on a CPU: that nothing is broken")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 128])
    options = parser.parse_args(argv)
    chip = "NVIDIA H200" if options.check else jax.devices()[0].device_kind
    if not options.check and jax.default_backend() != "gpu":
        parser.error(f"the device at hand is {chip!r}: this needs an H100 or H200; --check runs without")
    count = 1 if options.check else options.samples
    shapes = [
        (TOKENS // length, length, *heads, width) for width in options.widths for heads in HEADS for length in LENGTHS
    ]
    if options.check:
        shapes = [(1, 20, 2, 1, 64)]
    packages = ("jax", "jaxlib", "tokamax", "torch", "jax-cuda13-plugin")
    report: dict[str, Any] = {
        "command": "python -m benchmarks.attention_gpu " + " ".join(argv if argv is not None else sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": chip,
        "versions": {name: version(name) for name in packages if _installed(name)},
        "rates": card(count, 128 if options.check else 8192),
        "shapes": [],
    }
    peak = report["rates"]["matmul"]["rate"]
    print(f"{chip}: product {peak:.1f} TFLOP/s, copy {report['rates']['copy']['rate']:.2f} TB/s")
    for shape in shapes:
        rows, length, heads, kv_heads, width = shape
        print(f"{rows} x {length} tokens, {heads} query heads, {kv_heads} key/value heads of {width}")
        found = measure(shape, chip, count, options.check)
        if not options.check and importlib.util.find_spec("torch") is not None:
            found |= of_torch(shape, count)
        show(found, peak)
        report["shapes"].append({"shape": shape, "found": found})
    if options.check:
        wrong = [name for entry in report["shapes"] for name, x in entry["found"].items() if "failed" in x]
        print("checked" if not wrong else f"failed: {', '.join(wrong)}")
        sys.exit(bool(wrong))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"attention_gpu_{chip.lower().replace(' ', '_')}_{report['date'][:10]}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
