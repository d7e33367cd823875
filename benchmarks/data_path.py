"""How fast the data path reads rows, on one core, beside numpy reading the same rows from one mapped file.

    python -m benchmarks.data_path [--length 512] [--batch 8] [--tokens 50000000]

The stream is random bytes' ids in a temporary token store, rows are read in shuffled order from a warm page cache, and
both readers give int32 [batch, length]. numpy's has no checksums, no documents, no parts: it is the floor.
`Dataset.read` adds shuffling and the Batch (inputs, weights, segments, positions); `Feed` adds the jax.Arrays and the
thread. Every figure is the best of three runs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from palmjax.config import DatasetConfig
from palmjax.data import index
from palmjax.data.batch import ConcatenateAndCut
from palmjax.data.feed import Dataset, Feed, open_dataset
from palmjax.data.store import Folder, PartWriter, TokenStore, write_manifest
from palmjax.data.vocabulary import Bytes

CONSUMED = 10_000  # tokens/s of a model of 4 layers, d 256, on two cores: what must be read at least 20 times as fast
SECONDS = 2.0


def write_data(folder: str, num_tokens: int) -> None:
    """The same random tokens as a token store of four parts and as one file of uint16."""
    vocabulary, stream = Bytes(), np.random.default_rng(0).integers(3, 259, num_tokens, dtype=np.uint16)
    store, records = Folder(f"{folder}/random/train"), []
    for part, tokens in enumerate(np.array_split(stream, 4)):
        writer = PartWriter(store, part, vocabulary)
        for document in np.array_split(tokens, max(len(tokens) // 4096, 1)):
            writer.add(document)
        records.append(writer.finish())
    write_manifest(store, "random", "train", vocabulary, records)
    stream.tofile(f"{folder}/tokens.bin")


def best_rate(step: Callable[[int], object], rows: int) -> float:
    """Rows a second of step(0), step(1), ...; the best of three runs of SECONDS each."""
    rates, number = [], 0
    for _ in range(3):
        began, first = time.perf_counter(), number
        while (elapsed := time.perf_counter() - began) < SECONDS:
            step(number)
            number += 1
        rates.append((number - first) * rows / elapsed)
    return max(rates)


def readers(folder: str, dataset: Dataset, length: int, batch: int) -> dict[str, Callable[[int], object]]:
    mapped = np.memmap(f"{folder}/tokens.bin", np.uint16, mode="r").reshape(-1)
    rows = np.random.default_rng(1).permutation(len(mapped) // length)
    columns = np.arange(length)
    store = TokenStore(f"{folder}/random/train")
    feed = Feed(dataset, jax.sharding.SingleDeviceSharding(jax.devices()[0]))

    def some(number: int) -> np.ndarray:
        return rows.take(np.arange(number * batch, (number + 1) * batch), mode="wrap") * length

    def read_mapped(number: int) -> np.ndarray:
        return mapped[some(number)[:, None] + columns].astype(np.int32)

    def read_store(number: int) -> object:
        starts = some(number)
        return store.read(starts, starts + length, length)

    assert np.array_equal(read_mapped(0), store.read(some(0), some(0) + length, length)[0])
    return {
        "numpy memmap": read_mapped,
        "TokenStore.read": read_store,
        "Dataset.read": dataset.read,
        "Feed": lambda _: jax.block_until_ready(next(feed).tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    flags = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # before jax and tensorstore start their threads, which inherit it
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_data(folder, flags.tokens)
        print(f"core {core}; {flags.tokens:,} tokens written in {time.perf_counter() - began:.1f} s")
        config = DatasetConfig(
            mixture_or_task_name="random",
            task_feature_lengths={"targets": flags.length},
            batch_size=flags.batch,
            packing=ConcatenateAndCut(),
            store_dir=folder,
        )
        index.save(config, [index.Source("random", "random/train", 1.0)])
        rates: dict[str, float] = {}
        print(f"{'':18}{'rows/s':>12}{'tokens/s':>16}{'of numpy':>10}{'x ' + format(CONSUMED, ','):>12}")
        for name, step in readers(folder, open_dataset(config), flags.length, flags.batch).items():
            rates[name] = best_rate(step, flags.batch)
            tokens = rates[name] * flags.length
            share = rates[name] / rates["numpy memmap"]
            print(f"{name:18}{rates[name]:12,.0f}{tokens:16,.0f}{share:10.2f}{tokens / CONSUMED:11.0f}x")


if __name__ == "__main__":
    main()
