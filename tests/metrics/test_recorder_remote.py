"""The recorder on an object store: all that a local run has, an outage survived, and no step that waits for it."""

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from palmjax.metrics import Pace, Recorder, Throughput, in_force, read_metrics

THROUGHPUT = Throughput(model_flops=1e6, peak_flops=None, devices=1)
PACE = Pace(lines=0.02, events=0.02, spacing=0.01, retry=0.02, longest_retry=0.05, close=20.0, lines_per_part=8)


def make(bucket: Any, *, pace: Pace = PACE, **options: Any) -> tuple[Recorder, io.StringIO]:
    stream = io.StringIO()
    options = {"total_steps": 60, "tensorboard": False, "log_period": 5, **options}
    return Recorder(bucket.url, THROUGHPUT, stream=stream, pace=pace, **options), stream


def run(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.record(step, {"loss": jnp.float32(1 / step)}, tokens=10)


def trained(bucket: Any) -> list[int]:
    return [line["step"] for line in read_metrics(bucket.url) if line["kind"] == "train"]


def test_a_run_in_a_bucket_leaves_what_a_local_one_does(
    bucket: Any, tmp_path: Path, read_events: Callable[[Path], list[Any]]
) -> None:
    local = Recorder(str(tmp_path / "local"), THROUGHPUT, total_steps=60, log_period=5, stream=io.StringIO())
    remote, stream = make(bucket, tensorboard=True)
    for recorder in (local, remote):
        with recorder:
            recorder.event("start", step=0, mesh={"data": 1})
            run(recorder, range(1, 21))
            recorder.evaluation(20, "books", {"loss": float("nan")}, seconds=1.0)
    bucket.save(tmp_path / "remote")

    def shape(folder: Any) -> list[tuple[Any, ...]]:
        return [(line["kind"], line.get("step"), line.get("event"), *sorted(line)) for line in read_metrics(folder)]

    def tags(folder: Path) -> list[tuple[int, str]]:
        return [(event.step, value.tag) for event in read_events(folder) for value in event.summary.value]

    assert shape(bucket.url) == shape(tmp_path / "remote") == shape(tmp_path / "local")
    for run_name in ("train", "training_eval/books"):
        found = tags(tmp_path / "remote" / run_name)
        assert found and found == tags(tmp_path / "local" / run_name)
    folders = {name.removeprefix("runs/a/").split("/")[0] for name in bucket.objects}
    assert folders == {"metrics", "train", "training_eval"} and "don't reach" not in stream.getvalue()


def test_a_resumed_run_has_one_line_a_step(bucket: Any, wait_until: Callable[[Callable[[], bool]], None]) -> None:
    """Killed in step 30, the newest checkpoint being that of step 17."""
    first, _ = make(bucket)
    run(first, range(1, 31))
    first.flush()
    wait_until(lambda: bool(bucket.objects) and trained(bucket) == list(range(1, 31)))
    second, _ = make(bucket, start_step=17)
    with second:
        run(second, range(18, 25))
    assert trained(bucket) == list(range(1, 25))
    lost = [line for line in read_metrics(bucket.url) if line.get("event") == "lost"]
    assert sum(line["steps"] for line in lost) == 30 - 17 and all(line["seconds"] > 0 for line in lost)
    first._release()  # its thread, which a kill would have ended


def test_events_and_flushes_are_uploaded_soon(bucket: Any, wait_until: Callable[[Callable[[], bool]], None]) -> None:
    recorder, _ = make(bucket, pace=Pace(spacing=0.01))
    recorder.event("start", step=0)
    wait_until(lambda: len(bucket.objects) == 1)
    run(recorder, range(1, 3))
    with recorder.paused():
        wait_until(lambda: trained(bucket) == [1, 2])
    recorder.close()


def test_an_outage_is_told_once_and_loses_nothing(
    bucket: Any, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    recorder, stream = make(bucket, tensorboard=True)
    with recorder:
        run(recorder, range(1, 10))
        wait_until(lambda: bool(bucket.objects))
        bucket.down = True
        run(recorder, range(10, 40))
        failed = len(bucket.requests)
        wait_until(lambda: len(bucket.requests) > failed + 5)
        bucket.down = False
        run(recorder, range(40, 51))
    assert trained(bucket) == list(range(1, 51))
    told = [line for line in stream.getvalue().splitlines() if "the bucket is out of reach" in line]
    assert len(told) == 1 and "the run goes on" in told[0]


def test_a_step_does_not_wait_for_an_upload(bucket: Any, wait_until: Callable[[Callable[[], bool]], None]) -> None:
    bucket.seconds = 2.0
    recorder, _ = make(bucket, tensorboard=True, pace=dataclasses.replace(PACE, lines_per_part=1000))
    run(recorder, range(1, 3))  # compiles what the recorder itself needs
    wait_until(lambda: bucket.count("list") + bucket.count("is_dir") > 0)
    longest, began = 0.0, time.monotonic()
    for step in range(3, 60):
        value = jnp.float32(step).block_until_ready()
        before = time.monotonic()
        recorder.record(step, {"loss": value}, tokens=10)
        recorder.event("tick", step=step)
        recorder.flush()
        longest = max(longest, time.monotonic() - before)
        time.sleep(0.05)
    assert time.monotonic() - began > 2.5 and bucket.count("write") >= 1  # an upload ran all the while
    assert longest < 0.5
    recorder.close()
    assert trained(bucket) == list(range(1, 60))


def test_an_exception_still_uploads_what_was_written(bucket: Any) -> None:
    recorder, _ = make(bucket, pace=Pace())
    with pytest.raises(KeyboardInterrupt), recorder:
        run(recorder, range(1, 10))
        raise KeyboardInterrupt
    assert trained(bucket) == list(range(1, 9))  # the step under way is not fetched


def test_a_bucket_out_of_reach_from_the_start_ends_neither_the_run_nor_its_end(bucket: Any) -> None:
    bucket.down = True
    recorder, stream = make(bucket, pace=Pace(spacing=0.01, retry=0.02, close=0.3, lines_per_part=8))
    with recorder:
        run(recorder, range(1, 21))
    told, *_, kept = [line for line in stream.getvalue().splitlines() if "metrics" in line]
    assert "don't reach bucket:/runs/a: ConnectionError" in told and "(21 lines are missing)" in kept
    spool = kept.split("copy what is in ")[1].removesuffix(" there")
    assert [line["step"] for line in read_metrics(spool) if line["kind"] == "train"] == list(range(1, 21))


def test_a_process_that_is_not_primary_asks_nothing_of_the_bucket(bucket: Any) -> None:
    recorder, _ = make(bucket, is_primary=False, tensorboard=True)
    with recorder:
        run(recorder, range(1, 4))
        recorder.event("start")
    assert bucket.requests == [] and bucket.objects == {}


def test_what_a_rewind_has_taken_back_stays_in_the_bucket(bucket: Any) -> None:
    """Step 12 of 12 is rewound to 6 and done again; a kill after that drops only what is done anew."""
    for first, last, rewinds in ((0, 12, 0), (6, 10, 1), (8, 11, 1)):
        recorder, _ = make(bucket, start_step=first, rewinds=rewinds)
        with recorder:
            run(recorder, range(first + 1, last + 1))
            recorder.flush()
            if last == 12:
                recorder.event("rewind", step=12, number=1, to=6)
    assert trained(bucket) == [*range(1, 13), 7, 8, 9, 10, 11]
    assert [line["step"] for line in in_force(read_metrics(bucket.url)) if line["kind"] == "train"] == [*range(1, 12)]
