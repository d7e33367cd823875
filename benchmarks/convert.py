"""A Hugging Face checkpoint of 1 GB to palmjax and back, beside a plain copy of it: `python -m benchmarks.convert`.

The model is LLaMA's layout in float32, so that as many bytes are written as read. Copy and conversions run in turns,
each until everything is on the disk; prints the best of each, the ratios, and CPU-seconds, which a busy machine changes
less.
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
    mapped, rng = safetensors_files.Mapped(placed, writable=True), np.random.default_rng(0)
    for name, tensor in placed.items():
        mapped.array(name)[...] = rng.standard_normal(tensor.shape, np.float32)
    os.sync()
    return sum(tensor.nbytes for tensor in placed.values())


def timed(work: Callable[[Path], object], target: Path) -> tuple[float, float]:
    """Seconds of `work` until what it wrote into `target` is on the disk, and CPU-seconds of this process."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    began, spent = time.perf_counter(), time.process_time()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        work(target)
    os.sync()
    return time.perf_counter() - began, time.process_time() - spent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--layers", type=int, default=17, help="17 make 1.0 GB")
    parser.add_argument("--folder", help="where to write 4 GB (a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        source, here = place / "source", place / "here"
        size = make(source, options.layers)
        works: dict[str, tuple[Callable[[Path], object], Path]] = {
            "plain copy": (lambda target: shutil.copytree(source, target), place / "copy"),
            "to palmjax": (lambda target: convert.from_huggingface(source, target), here),
            "to transformers": (lambda target: convert.to_huggingface(str(here), target), place / "back"),
        }
        seconds: dict[str, list[tuple[float, float]]] = {what: [] for what in works}
        for _ in range(options.rounds):  # in turns, so that a busy moment of the machine meets all of them
            for what, (work, target) in works.items():
                seconds[what].append(timed(work, target))
        print(f"{size / 1e9:.2f} GB of float32, {options.layers} layers of LLaMA's layout; best of {options.rounds}")
        fastest = {what: min(times) for what, times in seconds.items()}
        for what, (best, cpu) in fastest.items():
            ratio = f"x{best / fastest['plain copy'][0]:.2f} of the copy" if what != "plain copy" else ""
            print(f"{what:16} {best:6.2f} s  {size / best / 1e6:6,.0f} MB/s  {cpu:5.2f} CPU-s  {ratio}")


if __name__ == "__main__":
    main()
