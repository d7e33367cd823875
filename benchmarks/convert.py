"""A Hugging Face checkpoint of 1 GB to palmjax and back, beside a plain copy of it: `python -m benchmarks.convert`.

The model is LLaMA's layout in float32, so that as many bytes are written as read. Each figure is the best of three, the
copy too, with everything flushed to the disk; prints the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from palmjax.interop import convert, safetensors_files
from palmjax.interop.huggingface.llama import LLAMA

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "eos_token_id": 2,
}
"""Of 65 M parameters in the two tables and 11 M a layer."""


def make(folder: Path, layers: int) -> int:
    """A random checkpoint. Returns its bytes."""
    folder.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    planned = LLAMA.plan(LLAMA.model(config, "the benchmark"))
    placed = safetensors_files.create(folder, [(t.name, "F32", t.shape) for t in planned.values()], 10**12)
    mapped, rng = safetensors_files.Mapped(writable=True), np.random.default_rng(0)
    for tensor in placed.values():
        mapped.array(tensor)[...] = rng.standard_normal(tensor.shape, np.float32)
    os.sync()
    return sum(tensor.nbytes for tensor in placed.values())


def best(work: Callable[[Path], object], target: Path, times: int) -> float:
    """Seconds of the fastest run of `work`, flushed to the disk; what it wrote last is kept."""
    seconds = []
    for _ in range(times):
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        began = time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            work(target)
        os.sync()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--layers", type=int, default=17, help="17 make 1.0 GB")
    parser.add_argument("--folder", help="where to write 4 GB (a temporary folder)")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        size = make(place / "source", options.layers)
        copy = best(lambda target: shutil.copytree(place / "source", target), place / "copy", options.times)
        here = best(lambda target: convert.from_huggingface(place / "source", target), place / "here", options.times)
        back = best(lambda target: convert.to_huggingface(str(place / "here"), target), place / "back", options.times)
        print(f"{size / 1e9:.2f} GB of float32, {options.layers} layers of LLaMA's layout")
        for what, seconds in (("plain copy", copy), ("to palmjax", here), ("to transformers", back)):
            ratio = f"x{seconds / copy:.2f} of the copy" if what != "plain copy" else ""
            print(f"{what:16} {seconds:6.2f} s  {size / seconds / 1e6:6,.0f} MB/s  {ratio}")


if __name__ == "__main__":
    main()
