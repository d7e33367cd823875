"""How far log-likelihoods move when requests come otherwise. `python -m benchmarks.eval_invariance [--hf]`

The same requests at once, one by one, by 3, by 8 and shuffled, beside a request of twice the length, and on all devices
data-parallel: prints the largest difference (nats) and how many of the requests have other bits. On CPU all of these
are 0, by test; on another backend they are what this command measures. With `--hf`, lm-eval's `hf` on a random model of
the same sizes is asked at batch sizes 1, 8 and 32 too (float32 and bfloat16).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from palmjax import mesh, sharding
from palmjax.config import MeshConfig, ShardingRules
from palmjax.evaluation.run import Scorer
from palmjax.evaluation.schedule import Request
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, SerialBlock
from palmjax.models.embeddings import UntiedHead
from palmjax.models.layers import RMSNorm, SwiGLU

VOCABULARY = 1024
MODEL = Decoder(
    vocab_size=VOCABULARY,
    num_layers=4,
    d_model=256,
    block=SerialBlock(
        attention=Attention(num_heads=8, num_kv_heads=8, head_dim=32), mlp=SwiGLU(d_ff=688), norm=RMSNorm()
    ),
    final_norm=RMSNorm(),
    head=UntiedHead(),
)


def questions(count: int) -> list[Request]:
    """Four choices behind each context."""
    rng = np.random.default_rng(0)
    ids: Callable[[int], tuple[int, ...]] = lambda n: tuple(rng.integers(3, VOCABULARY, n).tolist())  # noqa: E731
    contexts = [ids(int(rng.integers(10, 150))) for _ in range(count)]
    return [Request(context, ids(int(rng.integers(1, 8)))) for context in contexts for _ in range(4)]


def report(title: str, found: Sequence[float], wanted: Sequence[float]) -> None:
    differences = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
    other = sum(difference > 0 for difference in differences)
    print(f"  {title:42} largest {max(differences):.1e} nats, other bits {other}/{len(differences)}", flush=True)


def scorer(dtype: Any, devices: Sequence[Any]) -> Scorer:
    model = dataclasses.replace(MODEL, dtype=dtype).build()
    placed, rules = mesh.build(MeshConfig(data=len(devices)), devices), ShardingRules()
    with sharding.activate(placed, rules):
        return Scorer(model, jax.jit(model.init)(jax.random.key(0)), placed, rules)


def ours(dtype: str, requests: Sequence[Request]) -> None:
    one, rng = scorer(dtype, jax.devices()[:1]), np.random.default_rng(1)

    def totals(asked: Sequence[Request], by: int | None = None) -> list[float]:
        size = by or len(asked)
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        return [answer.log_likelihood for part in parts for answer in one.score(part)]

    print(f"palmjax, {dtype}, {jax.devices()[0].device_kind}")
    wanted = totals(requests)
    for size in (1, 3, 8, 32):
        report(f"by {size}", totals(requests, size), wanted)
    order = rng.permutation(len(requests))
    shuffled = totals([requests[place] for place in order])
    report("shuffled", shuffled, [wanted[place] for place in order])
    long = Request(tuple(rng.integers(3, VOCABULARY, 300).tolist()), (5,))
    report("beside one of 300 tokens", totals([long, *requests])[1:], wanted)
    if len(jax.devices()) > 1:
        many = scorer(dtype, jax.devices()).score(requests)
        report(f"on {len(jax.devices())} devices", [answer.log_likelihood for answer in many], wanted)


def theirs(dtype: str, requests: Sequence[Request]) -> None:
    from lm_eval.models import huggingface

    from tests.interop.lm_eval_tasks import write_model

    wrapped: Any = huggingface
    asked = [(("", ""), list(request.context), list(request.continuation)) for request in requests]
    print(f"lm-eval hf, {dtype}, cpu")
    with tempfile.TemporaryDirectory(prefix="palmjax-") as place, contextlib.redirect_stderr(io.StringIO()):
        sizes: dict[str, Any] = {"layers": 4, "width": 256, "length": 512, "rows": VOCABULARY}
        source = write_model(Path(place) / "hf", "llama", **sizes)
        found = {}
        for size in (8, 1, 32):
            lm = wrapped.HFLM(pretrained=str(source), dtype=dtype, batch_size=size, device="cpu", logits_cache=False)
            found[size] = [total for total, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]
    for size in (1, 32):
        report(f"batch size {size} against 8", found[size], found[8])


def main() -> None:
    parser = argparse.ArgumentParser(description="How far log-likelihoods move when requests come otherwise.")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--hf", action="store_true")
    options = parser.parse_args()
    requests = questions(options.documents)
    for dtype in ("float32", "bfloat16"):
        ours(dtype, requests)
        if options.hf:
            theirs(dtype, requests)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    main()
