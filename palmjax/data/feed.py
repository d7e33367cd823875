"""Datasets as functions of the step, and their batches as prefetched global arrays.

Imports config, the modules of data, numpy and jax; `data.build`, and with it seqio and TensorFlow, only when a store
has to be built or a task has never been asked for before.

    open_dataset(config) -> Dataset
    Dataset.read(step) -> Batch of numpy arrays
    Feed(dataset, sharding, start_step, stop_step) -> iterator of Batches of global jax.Arrays
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import queue
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from palmjax.config import ConfigError, DatasetConfig
from palmjax.data import index
from palmjax.data.batch import Batch, RowLayout
from palmjax.data.order import Order, Ramp, Skips, integer_weights, ramp_of
from palmjax.data.store import TokenStore
from palmjax.data.vocabulary import Vocabulary

POLL_PERIOD = 1.0  # seconds between looks for a store that another process builds
LINE_PERIOD = 30.0  # seconds between lines about it


class Batches(Protocol):
    """What a Feed draws from: a Dataset, or an EvaluationPass over one."""

    @property
    def sequence_length(self) -> int: ...

    def batch_sizes(self) -> tuple[int, ...]: ...

    def batch_size(self, step: int) -> int: ...

    def read(self, step: int, skips: Skips = (), rows: slice | None = None) -> Batch: ...


def open_dataset(config: DatasetConfig, build: bool = True) -> Dataset:
    """Opens the stores of a config; those that are not there are built first. Only building needs seqio.

    In a job of several processes the first builds and the others wait; store_dir must then be shared. Raises
    ConfigError for whatever in the config cannot work, for a damaged store, and, if `build` is False, for a store that
    is not finished.
    """
    length = row_length(config)
    ramp = ramp_of(config.batch_size)
    sources = index.lookup(config)
    if sources is None and not build:
        raise ConfigError(
            f"no finished token store of {config.mixture_or_task_name!r}, split {config.split!r}, in {config.store_dir}"
        )
    if sources is None and jax.process_index() == 0:
        from palmjax.data import build as builder

        sources = builder.build_stores(config)
    elif sources is None:
        sources = _wait_for_stores(config)
    stores = [TokenStore(f"{config.store_dir.rstrip('/')}/{source.path}") for source in sources]
    return Dataset(config, stores, [source.rate for source in sources], length, ramp)


def row_length(config: DatasetConfig) -> int:
    """Tokens a row: the sum of `task_feature_lengths`; inputs, if any, precede the targets as in T5X's decoders."""
    lengths = dict(config.task_feature_lengths)
    if "targets" not in lengths or set(lengths) - {"inputs", "targets"}:
        raise ConfigError(f"task_feature_lengths is {lengths}; it must be {{'targets': T}}, or have 'inputs' beside it")
    total = sum(lengths.values())
    if any(not isinstance(value, int) or value < 0 for value in lengths.values()) or total < 1:
        raise ConfigError(f"task_feature_lengths is {lengths}; lengths are positive integers")
    return total


def _wait_for_stores(config: DatasetConfig) -> list[index.Source]:
    began = printed = time.monotonic()
    while (sources := index.lookup(config)) is None:
        now = time.monotonic()
        if now - printed > LINE_PERIOD or printed == began:
            print(
                f"palmjax: process {jax.process_index()} waits for process 0 to build the token store of "
                f"{config.mixture_or_task_name!r} in {config.store_dir}, which both must see ({now - began:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
            printed = now
        time.sleep(POLL_PERIOD)
    return sources


class Dataset:
    """Rows of one or several token stores in a fixed order. `read` is a pure function of the step.

    sequence_length: tokens a row. vocabulary: that of all its stores. token_bytes: int32 [vocabulary size], the UTF-8
    bytes that each id stands for. num_rows: rows that training draws from, over all stores. tokens_total: their tokens.
    """

    def __init__(
        self, config: DatasetConfig, stores: Sequence[TokenStore], rates: Sequence[float], length: int, ramp: Ramp
    ):
        self.config = config
        self.sequence_length = length
        self.vocabulary: Vocabulary = stores[0].vocabulary
        self.token_bytes: np.ndarray = self.vocabulary.token_bytes()
        self.tokens_total = sum(store.num_tokens for store in stores)
        self._stores, self._rates, self._ramp = list(stores), list(rates), ramp
        self._layouts = [self._layout(store) for store in stores]
        self.num_rows = sum(layout.num_rows for layout in self._layouts)
        self._order = Order(
            ramp=ramp,
            weights=integer_weights(rates),
            row_counts=tuple(layout.num_rows for layout in self._layouts),
            source_keys=tuple(zlib.crc32(store.task.encode()) for store in stores),
            seed=config.seed,
            shuffle=config.shuffle,
        )

    def _layout(self, store: TokenStore) -> RowLayout:
        try:
            return self.config.packing.build(store.num_tokens, store.document_ends, self.sequence_length)
        except ConfigError as error:
            raise ConfigError(f"task {store.task!r}, split {store.split!r}: {error}") from error

    def batch_size(self, step: int) -> int:
        """Rows of a step over all hosts."""
        return self._ramp.rows(step)

    def batch_sizes(self) -> tuple[int, ...]:
        """All the different batch sizes, in the order in which they come."""
        return self._ramp.sizes

    def first_row(self, step: int, skips: Skips = ()) -> int:
        """The global number of a step's first row: rows seen or skipped before it."""
        return self._ramp.first_row(step, skips)

    def read(self, step: int, skips: Skips = (), rows: slice | None = None) -> Batch:
        """A step's batch, or its part `rows`, as numpy arrays.

        skips: pairs (from_step, rows): from that step on so many rows of the global order are passed over.
        Raises ConfigError, naming the file, if a store turns out to be damaged.
        """
        return self._read(*self._order.of_step(step, skips, rows))

    def locate(self, step: int, skips: Skips = (), rows: slice | None = None) -> list[tuple[str, int, int]]:
        """(task, first token, end) of each row of a step's batch: its place in the task's token stream."""
        source, row = self._order.of_step(step, skips, rows)
        spans = [self._layouts[s].spans(row[i : i + 1]) for i, s in enumerate(source)]
        return [(self._stores[s].task, int(a[0]), int(b[0])) for s, (a, b) in zip(source, spans, strict=True)]

    def evaluation(self) -> EvaluationPass:
        """One pass over every token, for evaluation."""
        return EvaluationPass(self)

    def eval_batches(self) -> Iterator[Batch]:
        """The numpy batches of one pass over every token; see `EvaluationPass`."""
        whole = self.evaluation()
        return (whole.read(number) for number in range(whole.num_batches))

    def _read(self, source: np.ndarray, row: np.ndarray) -> Batch:
        """The Batch of rows given as (source, row within the source), int64 [n] each."""
        parts, order = [], []
        for number, (store, layout) in enumerate(zip(self._stores, self._layouts, strict=True)):
            mine = np.flatnonzero(source == number)
            if mine.size or (number == 0 and not source.size):
                starts, stops = layout.spans(row[mine])
                targets, weights = store.read(starts, stops, layout.stream_length)
                parts.append(layout.batch(targets, weights, starts, stops, self.vocabulary.bos_id))
                order.append(mine)
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(np.concatenate(order))
        return jax.tree.map(lambda *fields: np.concatenate(fields)[back], *parts)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the global order of rows: stores, shares, length, packing, seed and shuffling.

        Batch sizes are not in it: they only cut that order into steps.
        """
        text = json.dumps(
            [
                [[store.task, store.split, store.fingerprint] for store in self._stores],
                self._order.weights,
                self.sequence_length,
                repr(self.config.packing),
                self.config.seed,
                self.config.shuffle,
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def shares(self) -> list[tuple[str, float, int]]:
        """(task, share of the rows that are read, rows that it has) of each store."""
        total, layouts = sum(self._order.weights), self._layouts
        rows = zip(self._stores, self._order.weights, layouts, strict=True)
        return [(store.task, weight / total, layout.num_rows) for store, weight, layout in rows]

    def describe(self) -> str:
        """A few lines for people: what is read, how much of it, and in which shares."""
        lines = [
            f"{self.config.mixture_or_task_name} ({self.config.split}): "
            f"{self.num_rows:,} rows of {self.sequence_length:,} "
            f"from {self.tokens_total:,} tokens; vocabulary of {self.vocabulary.size:,}"
        ]
        if len(self._stores) > 1:
            lines += [
                f"  {100 * share:6.2f} % {store.task}: {store.num_tokens:,} tokens in {store.num_documents:,} documents"
                for store, (_, share, _) in zip(self._stores, self.shares, strict=True)
            ]
        return "\n".join(lines)

    def verify(self) -> None:
        """Reads every byte of every store. Raises ConfigError naming the first damaged file."""
        for store in self._stores:
            store.verify()


class EvaluationPass:
    """Every token of a dataset once, whatever the batch size: each store's rows in order, the last row padded.

    Batches have the dataset's first batch size; rows missing in the last are padding, with weight 0 throughout.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self.sequence_length = dataset.sequence_length
        counts = [layout.num_eval_rows for layout in dataset._layouts]
        self._begins = np.cumsum([0, *counts])
        self.num_rows = int(self._begins[-1])
        self.num_batches = -(-self.num_rows // dataset.batch_size(0))

    def batch_size(self, step: int) -> int:
        return self._dataset.batch_size(0)

    def batch_sizes(self) -> tuple[int, ...]:
        return (self._dataset.batch_size(0),)

    def read(self, step: int, skips: Skips = (), rows: slice | None = None) -> Batch:
        """The batch of number `step`, or its part `rows`, as numpy arrays."""
        size = self.batch_size(step)
        numbers = (step * size + np.arange(size))[rows or slice(None)]
        real = numbers[numbers < self.num_rows]
        source = np.searchsorted(self._begins, real, side="right") - 1
        batch = self._dataset._read(source, real - self._begins[source])
        missing = len(numbers) - len(real)
        return jax.tree.map(lambda field: np.pad(field, ((0, missing), (0, 0))), batch) if missing else batch


class Feed:
    """The batches of steps start_step .. stop_step - 1 as global `jax.Array`s, prepared ahead by one thread.

    Each process reads only the rows that its devices hold, each once. To rewind or to skip, close it and make another:
    that costs nothing but the first read. An exception in the thread is raised by the next `next`.

    seconds_waited: time that the consumer spent waiting for a batch; if it grows with the steps, the data is too slow.
    """

    def __init__(
        self,
        dataset: Batches,
        sharding: jax.sharding.Sharding,
        start_step: int = 0,
        stop_step: int | None = None,
        skips: Skips = (),
        prefetch: int = 2,
    ):
        """sharding: of [rows, length] arrays. stop_step: None never ends. prefetch: batches prepared ahead.

        Raises ConfigError if a batch size does not divide over the devices.
        """
        self._dataset, self._sharding, self._skips = dataset, sharding, tuple(skips)
        for rows in dataset.batch_sizes():
            self._check_divides(rows)
        self.seconds_waited = 0.0
        self._steps = iter(range(start_step, stop_step)) if stop_step is not None else _count(start_step)
        self._ready: queue.Queue[Any] = queue.Queue(max(prefetch, 1))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="palmjax-feed", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside jax or TensorStore must not outlive the interpreter

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        began = time.monotonic()
        item = self._ready.get()
        self.seconds_waited += time.monotonic() - began
        if isinstance(item, Batch):
            return item
        self.close()
        raise StopIteration if item is None else item

    def close(self) -> None:
        """Stops the thread and forgets what was prepared. May be called more than once."""
        self._closed.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            for step in self._steps:
                if not self._put(self._global_batch(step)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Waits for room, but not for a consumer that has closed the feed. Returns whether it was handed over."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _global_batch(self, step: int) -> Batch:
        shape = (self._dataset.batch_size(step), self._dataset.sequence_length)
        indices = self._sharding.addressable_devices_indices_map(shape).values()
        runs = _runs({_span(where[0], shape[0]) for where in indices if where})
        local = [(first, stop, self._dataset.read(step, self._skips, slice(first, stop))) for first, stop in runs]

        def array(name: str) -> jax.Array:
            def piece(where: tuple[slice, ...] | None) -> np.ndarray:
                assert where is not None
                first, stop = _span(where[0], shape[0])
                begin, batch = next((begin, batch) for begin, end, batch in local if begin <= first and stop <= end)
                return getattr(batch, name)[first - begin : stop - begin, where[1]]

            return jax.make_array_from_callback(shape, self._sharding, piece)

        kind = type(local[0][2])
        present = [field.name for field in dataclasses.fields(kind) if getattr(local[0][2], field.name) is not None]
        return kind(**{name: array(name) for name in present})

    def _check_divides(self, rows: int) -> None:
        shape = (rows, self._dataset.sequence_length)
        try:
            self._sharding.shard_shape(shape)
        except ValueError as error:
            raise ConfigError(
                f"a batch of {rows} rows of {shape[1]} tokens does not divide over the devices: {self._sharding}"
            ) from error


def _span(where: slice, size: int) -> tuple[int, int]:
    start, stop, _ = where.indices(size)
    return start, stop


def _runs(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans, with those that touch or overlap joined."""
    runs: list[tuple[int, int]] = []
    for first, stop in sorted(spans):
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((first, stop))
    return runs


def _count(step: int) -> Iterator[int]:
    while True:
        yield step
        step += 1
