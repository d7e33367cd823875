"""Datasets as functions of the step, evaluation passes, and feeds onto eight devices. No seqio is needed."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from palmjax.config import ConfigError, DatasetConfig
from palmjax.data import feed as feed_module
from palmjax.data import index
from palmjax.data.batch import Batch, ConcatenateAndCut, PackDocuments
from palmjax.data.feed import Dataset, EvaluationPass, Feed, open_dataset
from palmjax.data.order import BatchRamp
from palmjax.data.store import Folder, PartWriter, write_manifest
from palmjax.data.vocabulary import Bytes

FIELDS = [field.name for field in dataclasses.fields(Batch)]
VOCABULARY = Bytes()
MIXTURE = {"small": (30, 1.0), "large": (200, 3.0)}  # documents and rate


def text_of(task: str, number: int) -> str:
    return f"{task} {number} " + "x" * (number * 7 % 60)


def config(store_dir: Path, **changes: Any) -> DatasetConfig:
    values = {
        "mixture_or_task_name": "a_mixture",
        "task_feature_lengths": {"targets": 32},
        "batch_size": 8,
        "packing": ConcatenateAndCut(),
        "store_dir": str(store_dir),
        "seed": 3,
    }
    return DatasetConfig(**(values | changes))


def write_stores(settings: DatasetConfig, only: str | None = None) -> None:
    """What building would leave: stores of two parts each, and the index entry of the config."""
    sources = []
    for task, (count, rate) in MIXTURE.items():
        if only in (None, task):
            folder = Folder(f"{settings.store_dir}/{task}/train-0")
            writers = [PartWriter(folder, part, VOCABULARY) for part in range(2)]
            for number in range(count):
                writers[number * 2 // count].add(np.array([*VOCABULARY.encode(text_of(task, number)), 1]))
            write_manifest(folder, task, "train", VOCABULARY, [writer.finish() for writer in writers])
            sources.append(index.Source(task, f"{task}/train-0", rate))
    index.save(settings, sources)


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores")
    write_stores(config(path))
    write_stores(config(path, mixture_or_task_name="small"), only="small")
    return path


def assert_equal(batch: Batch, expected: Batch) -> None:
    for name in FIELDS:
        value, wanted = np.asarray(getattr(batch, name)), np.asarray(getattr(expected, name))
        assert value.dtype == wanted.dtype and np.array_equal(value, wanted), name


def rows_sharding(rows: int = 4, rest: int = 2) -> NamedSharding:
    mesh = jax.make_mesh((rows, rest), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    return NamedSharding(mesh, PartitionSpec("data"))


def stream(store_dir: Path, task: str) -> list[int]:
    return [i for number in range(MIXTURE[task][0]) for i in (*VOCABULARY.encode(text_of(task, number)), 1)]


def test_rows_are_the_text(store_dir: Path) -> None:
    dataset = open_dataset(config(store_dir, shuffle=False))
    batch = dataset.read(2)
    for targets, (task, start, stop) in zip(np.asarray(batch.targets), dataset.locate(2), strict=True):
        assert targets.tolist() == stream(store_dir, task)[start:stop]
    assert dataset.tokens_total == sum(len(stream(store_dir, task)) for task in MIXTURE)
    assert dataset.num_rows == sum(len(stream(store_dir, task)) // 32 for task in MIXTURE)
    assert (dataset.sequence_length, dataset.vocabulary, len(dataset.token_bytes)) == (32, VOCABULARY, 259)
    assert "75.00 % large" in dataset.describe()


def test_shares_are_the_mixtures_rates_and_small_sources_repeat_in_epochs(store_dir: Path) -> None:
    dataset = open_dataset(config(store_dir))
    tasks, starts = zip(*((task, start) for step in range(100) for task, start, _ in dataset.locate(step)), strict=True)
    assert tasks.count("small") == 200  # a quarter of 800 rows, exactly
    rows_in_small = len(stream(store_dir, "small")) // 32
    seen = [start for task, start in zip(tasks, starts, strict=True) if task == "small"]
    epochs = [seen[i : i + rows_in_small] for i in range(0, len(seen) - rows_in_small, rows_in_small)]
    assert len(epochs) > 3
    assert all(sorted(epoch) == [row * 32 for row in range(rows_in_small)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("packing", [ConcatenateAndCut(), PackDocuments()])
def test_a_step_is_the_same_in_parts_and_after_a_restart(store_dir: Path, packing: Any) -> None:
    settings = config(store_dir, packing=packing, batch_size=BatchRamp(stages=((0, 8), (3, 12))))
    dataset, again = open_dataset(settings), open_dataset(settings)
    for step in (0, 2, 3, 50):
        whole = dataset.read(step)
        assert whole.targets.shape == (dataset.batch_size(step), 32)  # pyright: ignore[reportAttributeAccessIssue]
        parts = [again.read(step, rows=slice(i, i + 2)) for i in range(0, dataset.batch_size(step), 2)]
        assert_equal(jax.tree.map(lambda *fields: np.concatenate(fields), *parts), whole)


def test_skipping_moves_the_later_steps_on(store_dir: Path) -> None:
    dataset = open_dataset(config(store_dir))
    skips = ((5, 24),)  # three batches of 8
    assert_equal(dataset.read(4, skips), dataset.read(4))
    assert_equal(dataset.read(5, skips), dataset.read(8))
    assert_equal(dataset.read(9, skips), dataset.read(12))
    assert dataset.first_row(9, skips) == 9 * 8 + 24


def test_fingerprint_is_that_of_the_order(store_dir: Path) -> None:
    base = config(store_dir)
    same = [base, dataclasses.replace(base, batch_size=16), dataclasses.replace(base, workers=3)]
    other = [
        dataclasses.replace(base, seed=4),
        dataclasses.replace(base, shuffle=False),
        dataclasses.replace(base, packing=PackDocuments()),
        dataclasses.replace(base, task_feature_lengths={"targets": 16}),
        dataclasses.replace(base, mixture_or_task_name="small"),
    ]
    assert len({open_dataset(settings).fingerprint for settings in same}) == 1
    assert len({open_dataset(settings).fingerprint for settings in [base, *other]}) == 6


@pytest.mark.parametrize("packing", [ConcatenateAndCut(), PackDocuments()])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 5000])
def test_evaluation_covers_every_token_once_at_any_batch_size(store_dir: Path, packing: Any, batch_size: int) -> None:
    dataset = open_dataset(config(store_dir, packing=packing, batch_size=batch_size))
    batches = list(dataset.eval_batches())
    assert len(batches) == dataset.evaluation().num_batches
    assert all(batch.targets.shape == (batch_size, 32) for batch in batches)  # pyright: ignore
    tokens = np.concatenate([np.asarray(batch.targets)[np.asarray(batch.weights) > 0] for batch in batches])
    assert tokens.tolist() == stream(store_dir, "small") + stream(store_dir, "large")
    last = batches[-1]
    assert not np.any(np.asarray(last.segments)[np.asarray(last.weights) == 0])


def test_evaluation_is_read_in_parts_too(store_dir: Path) -> None:
    whole = open_dataset(config(store_dir, batch_size=64)).evaluation()
    last = whole.num_batches - 1
    batch = whole.read(last)
    parts = [whole.read(last, rows=slice(i, i + 16)) for i in range(0, 64, 16)]  # the last of them all padding
    assert not np.any(parts[-1].weights)
    assert_equal(jax.tree.map(lambda *fields: np.concatenate(fields), *parts), batch)


@pytest.mark.multidevice
@pytest.mark.parametrize("length_axis", [None, "tensor"])
def test_a_feed_gives_the_batches_that_are_read(store_dir: Path, length_axis: str | None) -> None:
    dataset = open_dataset(config(store_dir, batch_size=BatchRamp(stages=((0, 8), (4, 16)))))
    sharding = NamedSharding(rows_sharding().mesh, PartitionSpec("data", length_axis))
    skips = ((3, 40),)
    with Feed(dataset, sharding, start_step=2, stop_step=7, skips=skips) as feed:
        batches = list(feed)
    assert len(batches) == 5 and feed.seconds_waited > 0
    for step, batch in enumerate(batches, start=2):
        assert all(getattr(batch, name).sharding == sharding for name in FIELDS)
        assert_equal(batch, dataset.read(step, skips))


class Recorder:
    """A dataset that notes what is read of it."""

    def __init__(self, dataset: Dataset | EvaluationPass):
        self._dataset, self.reads = dataset, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def read(self, step: int, skips: Any = (), rows: slice | None = None) -> Batch:
        self.reads.append((step, rows))
        return self._dataset.read(step, skips, rows)


@pytest.mark.multidevice
def test_every_row_is_read_once_however_many_devices_hold_it(store_dir: Path) -> None:
    recorder: Any = Recorder(open_dataset(config(store_dir)))
    with Feed(recorder, rows_sharding(2, 4), stop_step=3) as feed:
        list(feed)
    assert recorder.reads == [(step, slice(0, 8)) for step in range(3)]
    assert feed_module._runs({(8, 12), (0, 4), (12, 16), (4, 6)}) == [(0, 6), (8, 16)]


@pytest.mark.multidevice
def test_an_evaluation_pass_can_be_fed(store_dir: Path) -> None:
    whole = open_dataset(config(store_dir, batch_size=64)).evaluation()
    with Feed(whole, rows_sharding(), stop_step=whole.num_batches) as feed:
        for number, batch in enumerate(feed):
            assert_equal(batch, whole.read(number))
    assert number == whole.num_batches - 1


def test_a_feed_reads_ahead_but_no_further(store_dir: Path) -> None:
    recorder: Any = Recorder(open_dataset(config(store_dir)))
    with Feed(recorder, jax.sharding.SingleDeviceSharding(jax.devices()[0]), prefetch=3) as feed:
        next(feed)
        deadline = time.monotonic() + 20
        while len(recorder.reads) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(recorder.reads) == 5  # one taken, three ready, one waiting for room


def test_closing_ends_the_thread_and_the_iteration(store_dir: Path) -> None:
    dataset = open_dataset(config(store_dir))
    feed = Feed(dataset, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    next(feed)
    feed.close()
    feed.close()
    assert not any(thread.name == "palmjax-feed" for thread in threading.enumerate())
    assert next(feed, None) is None


def test_a_feed_hands_on_what_goes_wrong_in_its_thread(tmp_path: Path) -> None:
    settings = config(tmp_path, shuffle=False, mixture_or_task_name="small")
    write_stores(settings, only="small")
    file = tmp_path / "small/train-0/part-00001/tokens/c/0"
    data = bytearray(file.read_bytes())
    data[4] ^= 1
    file.write_bytes(data)
    feed = Feed(open_dataset(settings), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with pytest.raises(ConfigError, match="part-00001/tokens/c/0 is damaged"):
        for _ in range(100):
            next(feed)
    assert next(feed, None) is None


@pytest.mark.multidevice
def test_a_batch_that_does_not_divide_is_refused_at_once(store_dir: Path) -> None:
    dataset = open_dataset(config(store_dir, batch_size=BatchRamp(stages=((0, 8), (1000, 10)))))
    with pytest.raises(ConfigError, match="a batch of 10 rows of 32 tokens does not divide"):
        Feed(dataset, rows_sharding())


@pytest.mark.parametrize("lengths", [{}, {"inputs": 8}, {"targets": 0}, {"targets": 8.0}, {"targets": 8, "words": 2}])
def test_impossible_lengths_are_refused(store_dir: Path, lengths: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="task_feature_lengths"):
        open_dataset(config(store_dir, task_feature_lengths=lengths))


def test_inputs_and_targets_share_a_row_as_in_t5x(store_dir: Path) -> None:
    assert open_dataset(config(store_dir, task_feature_lengths={"inputs": 10, "targets": 6})).sequence_length == 16


def test_a_length_that_the_store_cannot_give_is_refused(store_dir: Path) -> None:
    tokens = len(stream(store_dir, "small"))
    with pytest.raises(ConfigError, match=f"'small', split 'train': .*from {tokens:,} tokens.*'targets': {tokens}"):
        open_dataset(config(store_dir, task_feature_lengths={"targets": 100_000}))


def test_without_building_an_unknown_store_is_an_error(store_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no finished token store of 'other', split 'train'"):
        open_dataset(config(store_dir, mixture_or_task_name="other"), build=False)


def test_other_processes_wait_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path)
    monkeypatch.setattr(feed_module.jax, "process_index", lambda: 1)
    monkeypatch.setattr(feed_module, "POLL_PERIOD", 0.02)
    first = threading.Timer(0.3, write_stores, [settings])
    first.start()
    dataset = open_dataset(settings)
    first.join()
    assert dataset.num_rows > 0
    assert "process 1 waits for process 0" in capsys.readouterr().err
