"""The recorder: one step late, one line a step, the same after a resume, silent where it is not the primary."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from palmjax.metrics import Recorder, Throughput

THROUGHPUT = Throughput(model_flops=1e6, hardware_flops=1.25e6, peak_flops=1e12, devices=4)


def make(tmp_path: Path, **options: Any) -> tuple[Recorder, io.StringIO]:
    stream = io.StringIO()
    options = {"total_steps": 20, "log_period": 5, "tensorboard": False, "stream": stream, **options}
    return Recorder(str(tmp_path), options.pop("throughput", THROUGHPUT), **options), stream


def lines(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def device_metrics(step: int) -> dict[str, jax.Array]:
    return {"loss": jnp.float32(1 / step), "accuracy": jnp.float32(0.5), "learning_rate": jnp.float32(1e-2)}


def slow_scalar(seconds: float) -> Any:
    """A scalar that the device needs at least `seconds` for; returns at once."""

    @jax.jit
    def work(rounds: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda _, x: jnp.sin(x) + 1e-3, x).mean()

    x = jnp.linspace(0, 1, 1 << 14)
    work(jnp.int32(0), x).block_until_ready()
    started = time.perf_counter()
    work(jnp.int32(200), x).block_until_ready()
    rate = 200 / (time.perf_counter() - started)
    return work(jnp.int32(rate * seconds), x)


def test_a_step_is_written_when_the_next_is_launched_without_waiting_for_that(tmp_path: Path) -> None:
    recorder, _ = make(tmp_path)
    assert recorder.record(1, device_metrics(1), tokens=100) is None
    assert lines(tmp_path) == []
    slow = slow_scalar(2.0)
    earlier = recorder.record(2, {"loss": slow}, tokens=100)
    assert not slow.is_ready(), "record waited for the step that had just been launched"
    assert earlier == {"loss": 1.0, "accuracy": 0.5, "learning_rate": pytest.approx(1e-2)}
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert recorder.flush() == {"loss": float(slow)}
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert recorder.flush() is None
    recorder.close()


def test_the_line_of_a_step(tmp_path: Path) -> None:
    recorder, _ = make(tmp_path)
    with recorder:
        for step in (1, 2):
            time.sleep(0.05)
            recorder.record(step, device_metrics(step), tokens=1000, data_wait=0.01, checkpoint_block=0.02)
    line = lines(tmp_path)[1]
    seconds = line.pop("seconds")
    assert line.pop("tokens_per_second") == pytest.approx(1000 / seconds)
    assert line.pop("mfu") == pytest.approx(1000 / seconds * 1e6 / 1e12)
    assert line.pop("hfu") == pytest.approx(1000 / seconds * 1.25e6 / 1e12)
    assert line.pop("learning_rate") == pytest.approx(1e-2)
    given = {"loss": 0.5, "accuracy": 0.5, "tokens": 1000, "data_wait": 0.01, "checkpoint_block": 0.02}
    assert line == {"kind": "train", "step": 2, **given}


def test_mfu_is_null_without_a_known_peak(tmp_path: Path) -> None:
    recorder, stream = make(tmp_path, throughput=Throughput(model_flops=1e6, peak_flops=None, devices=1), log_period=1)
    with recorder:
        for step in (1, 2):
            recorder.record(step, device_metrics(step), tokens=1000)
    assert lines(tmp_path)[0]["mfu"] is None and lines(tmp_path)[0]["hfu"] is None
    assert "FLOP/s" in stream.getvalue() and "MFU" not in stream.getvalue()


def test_seconds_lie_between_completions_and_leave_out_pauses(tmp_path: Path) -> None:
    started = time.perf_counter()  # before the recorder, whose first step begins when it is made
    recorder, _ = make(tmp_path)
    with recorder:
        for step in range(1, 5):
            time.sleep(0.03)
            recorder.record(step, device_metrics(step), tokens=1)
        with recorder.paused():
            assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]  # a pause begins with a flush
            time.sleep(0.4)
        recorder.record(5, device_metrics(5), tokens=1)
    outside = time.perf_counter() - started
    seconds = [line["seconds"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert len(seconds) == 5 and seconds[4] < 0.3
    assert 0.12 <= sum(seconds) <= outside - 0.4


def test_a_resumed_run_has_one_line_a_step(tmp_path: Path) -> None:
    """Killed after step 8, inside the line of step 9; the newest checkpoint is that of step 6."""
    first, _ = make(tmp_path)
    for step in range(1, 10):
        first.record(step, device_metrics(step), tokens=10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    second, _ = make(tmp_path, start_step=6)
    with second:
        for step in range(7, 13):
            second.record(step, {"loss": jnp.float32(-step)}, tokens=10)
    steps = [(line["step"], line["loss"]) for line in lines(tmp_path) if line["kind"] == "train"]
    assert [step for step, _ in steps] == list(range(1, 13))
    assert [loss for _, loss in steps[6:]] == [-7.0, -8.0, -9.0, -10.0, -11.0, -12.0]


def test_log_lines_come_every_period_and_forget_the_compilation(tmp_path: Path) -> None:
    recorder, stream = make(tmp_path)
    time.sleep(1.0)  # compiling
    with recorder:
        for step in range(1, 12):
            time.sleep(0.01)
            recorder.record(step, device_metrics(step), tokens=1000)
    shown = stream.getvalue().splitlines()
    assert [line.split()[1] for line in shown[:-1]] == ["1/20", "5/20", "10/20"]
    assert shown[0] == "step 1/20  loss 1.000"
    assert re.fullmatch(r"step 5/20  loss 0\.200  \S+ tok/s  MFU \S+%  HFU \S+%  eta 0:0[0-4]", shown[1]), shown[1]
    slowest = re.match(r"10 steps after the first: p50 \S+ s, p95 (\S+) s  \S+ tok/s", shown[-1])
    assert slowest and float(slowest[1]) < 0.9


def test_summary_percentiles(tmp_path: Path) -> None:
    recorder, _ = make(tmp_path)
    assert recorder.summary()["steps"] == 0 and recorder.summary()["step_seconds_p50"] is None
    recorder._seconds = [float(n) for n in range(1, 101)]
    recorder._tokens, recorder._data_wait = 5050 * 8, 505.0
    summary = recorder.summary()
    assert (summary["steps"], summary["step_seconds_p50"], summary["step_seconds_p95"]) == (100, 50.0, 95.0)
    assert summary["tokens_per_second"] == 8.0 and summary["data_wait_share"] == pytest.approx(0.1)
    recorder.close()
    written = lines(tmp_path)[-1]
    assert written["event"] == "summary" and written["step_seconds_p95"] == 95.0


def test_evaluations_and_events(tmp_path: Path) -> None:
    recorder, stream = make(tmp_path)
    with recorder:
        recorder.evaluation(20, "books", {"loss": 2.0, "bits_per_byte": 2.885}, seconds=3.0)
        recorder.event("skip", step=20, first=5, last=9)
    evaluation, event = lines(tmp_path)[:2]
    assert evaluation == {
        "kind": "eval",
        "step": 20,
        "task": "books",
        "loss": 2.0,
        "bits_per_byte": 2.885,
        "seconds": 3.0,
    }
    assert abs(event.pop("time") - time.time()) < 60 and 0 <= time.monotonic() - event.pop("monotonic") < 60
    assert event == {"kind": "event", "event": "skip", "step": 20, "first": 5, "last": 9}
    assert "eval books at step 20  loss 2  bits_per_byte 2.885" in stream.getvalue()


def test_tensorboard_has_t5x_tags(tmp_path: Path, read_events: Callable[[Path], list[Any]]) -> None:
    recorder, _ = make(tmp_path, tensorboard=True)
    with recorder:
        for step in range(1, 6):
            time.sleep(0.01)
            recorder.record(step, device_metrics(step), tokens=1000)
        recorder.flush()
        recorder.evaluation(5, "books", {"loss": 2.0, "accuracy": 0.25}, seconds=3.0)

    def tags(folder: Path, step: int) -> dict[str, float]:
        events = [event for event in read_events(folder) if event.step == step]
        return {value.tag: value.simple_value for event in events for value in event.summary.value}

    train = tags(tmp_path / "train", 5)
    assert train["loss"] == train["loss_per_nonpadding_target_token"] == pytest.approx(0.2)
    assert train["accuracy"] == 0.5 and train["learning_rate"] == pytest.approx(1e-2)
    speed = train["timing/target_tokens_per_second"]
    assert train["timing/target_tokens_per_second_per_core"] == pytest.approx(speed / 4)
    assert train["timing/steps_per_second"] == pytest.approx(speed / 1000)
    assert train["timing/mfu"] == pytest.approx(speed * 1e6 / 1e12)
    evaluation = tags(tmp_path / "training_eval" / "books", 5)
    assert evaluation["loss_per_nonpadding_target_token"] == evaluation["loss"] == 2.0
    assert evaluation["accuracy"] == 0.25 and evaluation["timing/evaluate_seconds"] == 3.0


def test_a_process_that_is_not_primary_returns_the_same_and_writes_nothing(tmp_path: Path) -> None:
    recorder, stream = make(tmp_path / "run", is_primary=False, tensorboard=True)
    with recorder:
        assert recorder.record(1, device_metrics(1), tokens=10) is None
        assert recorder.record(2, {"loss": jnp.float32(0.5)}, tokens=10) == pytest.approx(
            {"loss": 1.0, "accuracy": 0.5, "learning_rate": 1e-2}
        )
        recorder.evaluation(2, "books", {"loss": 2.0}, seconds=1.0)
        recorder.event("skip")
        recorder.message("hello")
        assert recorder.flush() == {"loss": 0.5}
    assert not (tmp_path / "run").exists() and stream.getvalue() == ""


def test_one_transfer_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: calls.append(len(tree)) or original(tree))
    recorder, _ = make(tmp_path)
    with recorder:
        for step in range(1, 4):
            recorder.record(step, device_metrics(step), tokens=10)
    assert calls == [3, 3, 3]


def test_an_exception_closes_the_files_without_touching_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, _ = make(tmp_path)
    with pytest.raises(KeyboardInterrupt), recorder:
        recorder.record(1, device_metrics(1), tokens=10)
        monkeypatch.setattr(jax, "device_get", lambda tree: pytest.fail("fetched from a device that may have failed"))
        raise KeyboardInterrupt
    assert lines(tmp_path) == []


def test_a_pipe_loads_neither_rich_nor_tensorboardx(tmp_path: Path) -> None:
    program = (
        "import sys; from palmjax.metrics import Recorder, Throughput\n"
        "rates = Throughput(model_flops=1.0, peak_flops=None, devices=1)\n"
        f"with Recorder({str(tmp_path)!r}, rates, total_steps=1, tensorboard=False) as r: r.record(1, {{}}, tokens=1)\n"
        "assert not {'rich', 'tensorboardX'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def test_an_observer_sees_every_step_once_and_its_events_follow_the_line(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def observer(step: int, values: Any) -> list[tuple[str, dict[str, Any]]]:
        seen.append((step, values["loss"]))
        return [("odd", {"step": step, "why": "it is the third"})] if step == 3 else []

    recorder, stream = make(tmp_path, observer=observer)
    silent, _ = make(tmp_path / "other", observer=observer, is_primary=False)
    for one in (recorder, silent):
        with one:
            for step in range(1, 5):
                one.record(step, device_metrics(step), tokens=1)
            with one.paused():
                pass
    assert seen == 2 * [(step, float(jnp.float32(1 / step))) for step in range(1, 5)]
    kinds = [(line["kind"], line.get("event"), line.get("step")) for line in lines(tmp_path)]
    assert kinds[2:5] == [("train", None, 3), ("event", "odd", 3), ("train", None, 4)]
    assert "odd: it is the third" in stream.getvalue()
