"""Requests a second of generation beside transformers, and whether a request's bits depend on its company.
`python -m benchmarks.generate`

One random LLaMA (4 layers, width 256, float32), made by transformers and imported: the same weights on both sides, and
the same greedy tokens, which is checked. Prompts of 8 to 200 tokens, sorted by length and given in batches of 8 to
transformers, which pads them on the left, and as one list to palmjax. Both have run once before they are timed.
Processor seconds, which other programs on the machine do not move, are printed beside seconds.

Then, for each way to continue: all requests together, against each of some alone, in another order and among strangers:
how many differ in a token, and the largest difference of a log-probability. On XLA:CPU both are 0; on another backend
this prints what they are.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palmjax import checkpoint, configure, decode, model_dir, trained
from palmjax.interop import convert
from palmjax.sampling import Greedy, Temperature

BATCH = 8
WAYS = {
    "greedy": Greedy(),
    "sampled": Temperature(temperature=0.8, top_p=0.95),
    "beams": decode.BeamSearch(beams=4),
    "contrastive": decode.ContrastiveSearch(),
}


def models(folder: Path) -> tuple[Any, Any, Any]:
    """transformers' model, ours, and our parameters."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=1024,
        initializer_range=0.06,
        pad_token_id=0,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder / "theirs")
    convert.from_huggingface(folder / "theirs", folder / "ours")
    path = model_dir.resolve(folder / "ours")
    info = checkpoint.read_info(path)
    with trained.config_file(path, info) as file:
        opened = trained.open_checkpoint(path, info, configure.load([file]).experiment)
    return theirs, opened.model, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), opened.params())


def by_transformers(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens in batches of BATCH, padded on the left."""
    import torch

    out: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        longest = max(len(prompts[index]) for index in chosen)
        ids, mask = (torch.zeros((len(chosen), longest), dtype=torch.long) for _ in range(2))
        for row, index in enumerate(chosen):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        for row, index in enumerate(chosen):
            out[index] = found[row, longest:].tolist()
    return [out[index] for index in range(len(prompts))]


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """What a call returns, and the least seconds and processor seconds of several, after one that compiles."""
    result, seconds, processor = call(), float("inf"), float("inf")
    for _ in range(repeats):
        began, used = time.perf_counter(), time.process_time()
        call()
        seconds = min(seconds, time.perf_counter() - began)
        processor = min(processor, time.process_time() - used)
    return result, seconds, processor


def compare_speed(theirs: Any, model: Any, params: Any, prompts: list[list[int]], new: int, repeats: int) -> None:
    peer, *of_peer = timed(lambda: by_transformers(theirs, prompts, new), repeats)
    found, *ours = timed(lambda: decode.generate(model, params, prompts, new, bos=None, stop=None), repeats)
    equal = sum(one.tokens.tolist() == other for one, other in zip(found, peer, strict=True))
    print(f"{len(prompts)} requests of {new} new tokens, greedy; {equal} texts are equal", flush=True)
    for name, (seconds, processor) in {"transformers": of_peer, "palmjax": ours}.items():
        rate = len(prompts) / seconds
        print(f"  {name:13} {seconds:6.2f} s, {processor:6.2f} processor seconds, {rate:6.1f} requests/s")
    print(f"  palmjax / transformers: x{of_peer[0] / ours[0]:.2f} by time, x{of_peer[1] / ours[1]:.2f} by processor")


def compare_company(model: Any, params: Any, prompts: list[list[int]], new: int) -> None:
    print(f"on {jax.devices()[0].device_kind}: {len(prompts)} requests together, against")
    for name, way in WAYS.items():

        def run(chosen: list[int], strangers: int = 0, way: Any = way) -> list[decode.Continuation]:
            crowd = [[7] * (5 + 23 * i % 190) for i in range(strangers)]
            ids = [*chosen, *range(1000, 1000 + strangers)]
            given = [*(prompts[i] for i in chosen), *crowd]
            return decode.generate(model, params, given, new, requests=ids, bos=None, stop=2, sampling=way)

        every = list(range(len(prompts)))
        together = run(every)
        cases: dict[str, list[tuple[int, decode.Continuation]]] = {
            "alone": [(i, run([i])[0]) for i in every[:: max(1, len(every) // 6)]],
            "reversed": list(zip(every[::-1], run(every[::-1]), strict=True)),
            "among strangers": list(zip(every, run(every, strangers=13), strict=False)),
        }
        words = []
        for case, pairs in cases.items():
            other = [i for i, one in pairs if one.tokens.tolist() != together[i].tokens.tolist()]
            same = [(one, together[i]) for i, one in pairs if i not in other]
            largest = max((float(np.abs(a.log_probs - b.log_probs).max()) for a, b in same), default=0.0)
            words.append(f"{case} {len(other)}/{len(pairs)} differ, |log p| {largest:.2g}")
        print(f"  {name:12} {'; '.join(words)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 1024, length).tolist() for length in rng.integers(8, 200, options.requests)]
    with tempfile.TemporaryDirectory() as folder:
        theirs, model, params = models(Path(folder))
        compare_speed(theirs, model, params, prompts, options.new_tokens, options.repeats)
        compare_company(model, params, prompts[:24], options.new_tokens)


if __name__ == "__main__":
    main()
