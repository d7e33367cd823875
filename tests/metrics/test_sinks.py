"""TensorBoard's event files, and the console with and without a terminal."""

import contextlib
import io
import os
import pty
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palmjax.metrics import sinks


def fail(text: str) -> None:
    raise AssertionError(text)


def scalars(events: list[Any]) -> dict[tuple[str, int], float]:
    return {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}


# -------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_one_folder_a_run(tmp_path: Path, read_events: Callable[[Path], list[Any]]) -> None:
    board = sinks.TensorBoard(str(tmp_path), start_step=0, report=fail)
    board.scalars("train", 10, {"loss": 2.5, "timing/mfu": None})
    board.scalars("training_eval/books", 10, {"loss": 2.75})
    board.close()
    assert scalars(read_events(tmp_path / "train")) == {("loss", 10): 2.5}
    assert scalars(read_events(tmp_path / "training_eval" / "books")) == {("loss", 10): 2.75}


def test_tensorboard_is_told_which_steps_a_resume_logs_again(
    tmp_path: Path, read_events: Callable[[Path], list[Any]]
) -> None:
    board = sinks.TensorBoard(str(tmp_path), start_step=30, report=fail)
    board.scalars("train", 31, {"loss": 2.5})
    board.close()
    restarts = [event.step for event in read_events(tmp_path / "train") if event.HasField("session_log")]
    assert restarts == [31]


def test_a_folder_that_can_not_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("a file where the folder should be")
    said: list[str] = []
    board = sinks.TensorBoard(str(tmp_path), start_step=0, report=said.append)
    for step in range(1, 50):
        board.scalars("train", step, {"loss": 1.0})
        time.sleep(0.001)
    board.close()
    assert said == [f"TensorBoard's files in {tmp_path} can't be written: File exists; the run goes on without them"]


def test_a_mistake_of_ours_in_tensorboards_thread_is_raised(tmp_path: Path) -> None:
    board = sinks.TensorBoard(str(tmp_path), start_step=0, report=fail)
    board.scalars("train", 1, {"loss": "not a number"})  # pyright: ignore[reportArgumentType]
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        board.close()


# ------------------------------------------------------------------------------------------------------ console


def test_log_lines() -> None:
    stream = io.StringIO()
    console = sinks.Lines(stream, total_steps=200)
    console.step(40, ["loss 3.214", "12.3k tok/s", "MFU 41.2%", "eta 1:23"])
    assert stream.getvalue() == "step 40/200  loss 3.214  12.3k tok/s  MFU 41.2%  eta 1:23\n"


def test_the_progress_bar_shows_the_same_and_messages_go_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        bar = sinks.Bar(terminal, total_steps=200, start_step=30)
        bar.step(40, ["loss 3.214", "eta 1:23"])
        bar.message("saved [checkpoint_40]")
        bar.close()
    text = b""
    with os.fdopen(leader, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # EIO: the other end is closed
        while chunk := screen.read(1 << 16):
            text += chunk
    before, message, after = text.decode().partition("saved [checkpoint_40]")
    assert message and " 30/200" in before and " 40/200" in after and "loss 3.214  eta 1:23" in after
