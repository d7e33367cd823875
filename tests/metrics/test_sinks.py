"""The JSONL file after a kill, TensorBoard's event files, and the console with and without a terminal."""

import contextlib
import errno
import io
import json
import os
import pty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palmjax.metrics import sinks


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(events: list[Any]) -> dict[tuple[str, int], float]:
    return {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def test_a_resume_removes_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"kind": "event", "event": "start"}, *({"kind": "train", "step": s, "loss": 1 / s} for s in range(1, 8))]
    records.insert(6, {"kind": "eval", "step": 5, "loss": 0.2})
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "train", "step": 8, "lo')
    writer = sinks.JsonLines(str(path), start_step=5)
    writer.write({"kind": "train", "step": 6, "loss": 9.0})
    assert lines(path) == [*records[:7], {"kind": "train", "step": 6, "loss": 9.0}]
    writer.close()


@pytest.mark.parametrize("torn", [b'{"step": 2}', b'{"step": 2, "task": "caf\xc3', b"12", b'"step"\n', b"\x00" * 64])
def test_a_last_line_that_is_not_whole_never_swallows_the_next(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    writer = sinks.JsonLines(str(path), start_step=2)
    writer.write({"step": 3})
    assert lines(path) == [{"step": 1}, {"step": 3}]
    writer.close()


def test_a_file_with_nothing_to_drop_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    inode = path.stat().st_ino
    assert sinks.drop_after(str(path), 2) == 0
    assert path.stat().st_ino == inode and os.listdir(tmp_path) == ["metrics.jsonl"]
    assert sinks.drop_after(str(tmp_path / "none.jsonl"), 0) == 0


def test_a_failed_rewrite_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        sinks.drop_after(str(path), 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_is_on_disk_when_write_returns_and_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = sinks.JsonLines(str(path), start_step=0)
    writer.write({"step": 1, "loss": float("nan"), "up": float("inf"), "down": -float("inf"), "mfu": None})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": "NaN", "up": "Infinity", "down": "-Infinity", "mfu": None}
    writer.close()


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is Linux's")
    path = tmp_path / "metrics.jsonl"
    writer = sinks.JsonLines(str(path), start_step=0)
    with open("/dev/full", "a") as full:
        os.dup2(full.fileno(), writer._file.fileno())
    with pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
        writer.write({"step": 1})
    assert caught.value.errno == errno.ENOSPC
    with contextlib.suppress(OSError):  # what is left in Python's buffer fails once more
        writer.close()


# -------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_one_folder_a_run(tmp_path: Path, read_events: Callable[[Path], list[Any]]) -> None:
    board = sinks.TensorBoard(str(tmp_path), start_step=0)
    board.scalars("train", 10, {"loss": 2.5, "timing/mfu": None})
    board.scalars("training_eval/books", 10, {"loss": 2.75})
    board.close()
    assert scalars(read_events(tmp_path / "train")) == {("loss", 10): 2.5}
    assert scalars(read_events(tmp_path / "training_eval" / "books")) == {("loss", 10): 2.75}


def test_tensorboard_is_told_which_steps_a_resume_logs_again(
    tmp_path: Path, read_events: Callable[[Path], list[Any]]
) -> None:
    board = sinks.TensorBoard(str(tmp_path), start_step=30)
    board.scalars("train", 31, {"loss": 2.5})
    board.close()
    restarts = [event.step for event in read_events(tmp_path / "train") if event.HasField("session_log")]
    assert restarts == [31]


def test_a_failure_in_tensorboards_thread_is_raised(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("a file where the folder should be")
    board = sinks.TensorBoard(str(tmp_path), start_step=0)
    board.scalars("train", 1, {"loss": 1.0})
    with pytest.raises(OSError):
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
