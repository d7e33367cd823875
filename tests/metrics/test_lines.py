"""JSON lines: the file after a kill, and reading a run back whatever form it has."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from palmjax.config import ConfigError
from palmjax.metrics import read_metrics
from palmjax.metrics.lines import JsonLines, drop_after, in_force, part_name


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def test_a_resume_removes_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"kind": "event", "event": "start"}, *({"kind": "train", "step": s, "loss": 1 / s} for s in range(1, 8))]
    records.insert(6, {"kind": "eval", "step": 5, "task": "a", "loss": 0.2})
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "train", "step": 8, "lo')
    writer = JsonLines(str(path), start_step=5)
    writer.write({"kind": "train", "step": 6, "loss": 9.0})
    assert lines(path) == [*records[:7], {"kind": "train", "step": 6, "loss": 9.0}]
    writer.close()


@pytest.mark.parametrize("torn", [b'{"step": 2}', b'{"step": 2, "task": "caf\xc3', b"12", b'"step"\n', b"\x00" * 64])
def test_a_last_line_that_is_not_whole_never_swallows_the_next(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    writer = JsonLines(str(path), start_step=2)
    writer.write({"step": 3})
    assert lines(path) == [{"step": 1}, {"step": 3}]
    writer.close()


def test_a_file_with_nothing_to_drop_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    inode = path.stat().st_ino
    assert drop_after(str(path), 2) == 0
    assert path.stat().st_ino == inode and os.listdir(tmp_path) == ["metrics.jsonl"]
    assert drop_after(str(tmp_path / "none.jsonl"), 0) == 0


REWOUND = [
    {"kind": "event", "event": "start", "step": 0},
    *({"kind": "train", "step": step, "loss": 1.0} for step in range(1, 9)),
    {"kind": "event", "event": "rewind", "step": 7, "number": 1, "to": 4},
    *({"kind": "train", "step": step, "loss": 0.5} for step in range(5, 10)),
]


def test_what_a_rewind_has_taken_back_stays_in_the_log_when_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in REWOUND))
    assert drop_after(str(path), 6, rewinds=1) == 3
    assert lines(path) == REWOUND[:12]
    assert drop_after(str(path), 4, rewinds=1) == 2
    assert lines(path) == REWOUND[:10], "and before the rewind was decided, its lines are a killed run's:"
    assert drop_after(str(path), 4) == 5
    assert lines(path) == REWOUND[:5]


def test_in_force_is_what_no_rewind_has_taken_back() -> None:
    evaluation = {"kind": "eval", "step": 8, "loss": 2.0}
    kept = in_force([*REWOUND[:9], evaluation, *REWOUND[9:]])
    assert [r["step"] for r in kept if r["kind"] == "train"] == list(range(1, 10))
    assert [r["loss"] for r in kept if r["kind"] == "train"] == [1.0] * 4 + [0.5] * 5
    assert evaluation not in kept and REWOUND[9] in kept and in_force(REWOUND[:9]) == REWOUND[:9]


def test_a_failed_rewrite_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        drop_after(str(path), 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_is_on_disk_when_write_returns_and_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(str(path), start_step=0)
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
    writer = JsonLines(str(path), start_step=0)
    with open("/dev/full", "a") as full:
        os.dup2(full.fileno(), writer._file.fileno())
    with pytest.raises(ConfigError) as caught:
        writer.write({"step": 1})
    reason = "No space left on device; free space and run the same command again"
    assert str(caught.value) == f"{path} can't be written: {reason}"
    writer.close()


def test_a_file_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl can't be written: Is a directory; mend that and run"):
        JsonLines(str(tmp_path / "metrics.jsonl"), start_step=0)


# ----------------------------------------------------------------------------------------------------- reading


def write_steps(path: Path, steps: range) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(str(path), start_step=0)
    writer.write({"step": 1, "loss": 2.5, "mfu": None, "event": "start"})
    writer.write({"step": 2, "loss": math.nan, "up": math.inf, "down": -math.inf})
    writer.close()
    first, second = read_metrics(tmp_path)
    assert first == {"step": 1, "loss": 2.5, "mfu": None, "event": "start"}
    assert math.isnan(second.pop("loss")) and second == {"step": 2, "up": math.inf, "down": -math.inf}


def test_a_torn_last_line_is_left_out_and_any_other_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "task": "caf\xc3')
    assert list(read_metrics(tmp_path)) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 is damaged"):
        list(read_metrics(tmp_path))
    for line in (
        '{"kind": "train", "step": "2"}',
        '{"kind": "event"}',
        '{"kind": "eval", "step": 1}',
        "[]",
        "[" * 9000,
    ):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(ConfigError, match=r"line 2 is damaged"):
            list(read_metrics(tmp_path))
        told: list[str] = []
        assert list(read_metrics(tmp_path, told.append)) == [{"step": 1}, {"step": 3}] and len(told) == 1


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """A local copy of a bucket's folder, begun from a local run. A rewind may begin a part at an earlier step."""
    write_steps(tmp_path / "metrics.jsonl", range(1, 3))
    write_steps(tmp_path / "metrics" / part_name(3, 9), range(3, 5))
    write_steps(tmp_path / "metrics" / part_name(5, 10), range(5, 9))
    write_steps(tmp_path / "metrics" / part_name(4, 99_999), range(4, 6))
    write_steps(tmp_path / "metrics" / part_name(2_000_000_000, 100_000), range(6, 8))
    write_steps(tmp_path / "metrics" / "notes.jsonl", range(100, 101))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7]


def test_a_folder_without_metrics_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics in .*metrics\.jsonl"):
        read_metrics(tmp_path)
    with pytest.raises(ConfigError, match=r"no metrics in .*none"):
        read_metrics(tmp_path / "none")
