"""torch's attention (scaled_dot_product_attention) on random bfloat16 data, timed by itself in a process of its own.

    python -m benchmarks.attention_torch '{"op": "rows", "shape": [8, 2048, 16, 1, 256], "count": 20, "device": "cuda"}'

prints, as JSON, backend to seconds a call of each pass, or to why it failed. op: "rows", causal, [B, T, H, K, D], whose
key/value heads are repeated in place; "decode", one query a row against [B, S] entries, [B, S, H, K, D]. device: "cuda"
with the backends of cuDNN and FlashAttention 2, or "cpu" with torch's own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "cuda": {"torch cudnn": SDPBackend.CUDNN_ATTENTION, "torch fa2": SDPBackend.FLASH_ATTENTION},
    "cpu": {"torch math": SDPBackend.MATH},
}
SETS = 3
CALLS = 12
"""Of a sample."""


def passes(op: str, shape: list[int], device: str, backend: SDPBackend) -> dict[str, Callable[[int], Any]]:
    """Pass to a call on the numbered set of inputs."""
    rows, length, heads, kv_heads, width = shape

    def random(heads: int, length: int) -> list[torch.Tensor]:
        size = (rows, heads, length, width)
        return [torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(SETS)]

    q = random(heads, length if op == "rows" else 1)
    k, v = random(kv_heads, length), random(kv_heads, length)
    attend = torch.nn.functional.scaled_dot_product_attention
    if op == "decode":

        def step(index: int) -> torch.Tensor:
            with sdpa_kernel(backend), torch.no_grad():
                return attend(q[index], k[index], v[index], enable_gqa=True)

        return {"forward": step}
    for x in [*q, *k, *v]:
        x.requires_grad_()

    def forward(index: int) -> torch.Tensor:
        wide = [x[index].expand(-1, heads, -1, -1) if kv_heads == 1 else x[index] for x in (k, v)]
        with sdpa_kernel(backend):
            return attend(q[index], wide[0], wide[1], is_causal=True, enable_gqa=1 < kv_heads < heads)

    outs, cotangents = [forward(index) for index in range(SETS)], random(heads, length)

    def backward(index: int) -> Any:
        given = (q[index], k[index], v[index])
        return torch.autograd.grad(outs[index], given, cotangents[index], retain_graph=True)

    return {"forward": forward, "backward": backward}


def seconds_of(call: Callable[[int], Any], device: str) -> float:
    """A call's, of CALLS in a row: by events on a GPU, by the clock on a CPU."""
    if device == "cpu":
        begun = time.perf_counter()
        for index in range(CALLS):
            call(index % SETS)
        return (time.perf_counter() - begun) / CALLS
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for index in range(CALLS):
        call(index % SETS)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS


def main(job: str) -> None:
    request = json.loads(job)
    op, device = request["op"], request["device"]
    if device == "cpu":
        torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, backend in BACKENDS[device].items():
        found[name] = {}
        try:
            for which, call in passes(op, request["shape"], device, backend).items():
                call(0)
                found[name][which] = [seconds_of(call, device) for _ in range(request["count"])]
        except Exception as error:  # a backend may refuse, or fail, in any way; the others go on
            found[name]["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
