"""Metrics on an object store: parts, what a resume does to them, the copy of local files, and what stays unsent."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from palmjax.metrics import Pace, read_metrics
from palmjax.metrics.remote import Mirror, PartFiles, RemoteLines
from palmjax.metrics.uploader import Source
from palmjax.model_dir import as_path

PACE = Pace(lines_per_part=4)


def write(parts: PartFiles | RemoteLines, *steps: int) -> None:
    for step in steps:
        parts.write({"kind": "train", "step": step})


def upload(source: Source) -> None:
    for _ in source.upload():
        pass


def steps(folder: Any) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def part(bucket: Any, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in bucket.objects[f"runs/a/metrics/{name}.jsonl"].splitlines()]


def names(bucket: Any) -> list[str]:
    return sorted(name.removeprefix("runs/a/metrics/").removesuffix(".jsonl") for name in bucket.objects)


# ------------------------------------------------------------------------------------------------------- parts


def test_the_last_part_is_written_anew_and_a_full_one_never_again(bucket: Any) -> None:
    parts = PartFiles(as_path(bucket.url), 0, PACE)
    write(parts, 1, 2, 3)
    upload(parts)
    assert part(bucket, "000000001-00001") == [1, 2, 3]
    write(parts, 4, 5)
    upload(parts)
    write(parts, *range(6, 14))
    upload(parts)
    writes = [name[-len("000000001-00001.jsonl") : -len(".jsonl")] for verb, name in bucket.requests if verb == "write"]
    first, second, third, fourth = "000000001-00001", "000000005-00002", "000000009-00003", "000000013-00004"
    assert writes == [first, first, second, second, third, fourth]
    assert [part(bucket, name) for name in names(bucket)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13]]
    assert steps(bucket.url) == list(range(1, 14))


def test_with_nothing_new_there_is_no_request(bucket: Any) -> None:
    parts = PartFiles(as_path(bucket.url), 0, PACE)
    write(parts, 1, 2, 3, 4)
    upload(parts)
    before = list(bucket.requests)
    upload(parts)
    upload(parts)
    assert bucket.requests == before and names(bucket) == ["000000001-00001"]


def test_lines_that_belong_to_no_step_go_with_the_last_one(bucket: Any) -> None:
    parts = PartFiles(as_path(bucket.url), 7, PACE)
    parts.write({"kind": "event", "event": "start"})
    write(parts, 8, 9, 10)
    parts.write({"kind": "event", "event": "summary"})
    upload(parts)
    assert names(bucket) == ["000000007-00001", "000000010-00002"]


@pytest.mark.parametrize("works", range(8))
def test_after_a_failure_at_any_request_each_line_is_there_once(
    bucket: Any, works: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload that resumes at step 6 and takes a part to delete, one to rewrite, and three to write."""
    earlier = PartFiles(as_path(bucket.url), 0, PACE)
    write(earlier, *range(1, 11))
    upload(earlier)
    parts = PartFiles(as_path(bucket.url), 6, PACE)
    write(parts, *range(7, 17))
    answer, left = bucket.request, works

    def request(verb: str, name: str) -> dict[str, bytes]:
        nonlocal left
        left -= 1
        if left == -1:
            raise ConnectionError("once")
        return answer(verb, name)

    monkeypatch.setattr(bucket, "request", request)
    with pytest.raises(ConnectionError, match="once"):
        upload(parts)
    write(parts, 17)
    upload(parts)
    assert steps(bucket.url) == list(range(1, 18))


# ------------------------------------------------------------------------------------------------------ resume


def test_a_resume_drops_later_steps_and_touches_no_other_part(bucket: Any) -> None:
    """Killed after step 11; the newest checkpoint is that of step 6."""
    earlier = PartFiles(as_path(bucket.url), 0, PACE)
    write(earlier, *range(1, 12))
    upload(earlier)
    bucket.requests.clear()
    parts = PartFiles(as_path(bucket.url), 6, PACE)
    write(parts, 7, 8)
    upload(parts)
    changed = [(verb, Path(name).stem) for verb, name in bucket.requests if verb in ("write", "delete")]
    assert changed == [("write", "000000005-00002"), ("delete", "000000009-00003"), ("write", "000000007-00003")]
    assert part(bucket, "000000005-00002") == [5, 6] and steps(bucket.url) == list(range(1, 9))


def test_a_resume_after_nothing_was_lost_writes_only_its_own(bucket: Any) -> None:
    earlier = PartFiles(as_path(bucket.url), 0, PACE)
    write(earlier, *range(1, 7))
    upload(earlier)
    bucket.requests.clear()
    parts = PartFiles(as_path(bucket.url), 6, PACE)
    upload(parts)
    assert bucket.count("write") == bucket.count("delete") == 0
    write(parts, 7)
    upload(parts)
    assert names(bucket)[-1] == "000000007-00003" and bucket.count("write") == 1


def test_a_run_from_the_beginning_removes_all_of_the_one_before(bucket: Any) -> None:
    earlier = PartFiles(as_path(bucket.url), 0, PACE)
    write(earlier, *range(1, 10))
    upload(earlier)
    upload(PartFiles(as_path(bucket.url), 0, PACE))
    assert bucket.objects == {}


def test_a_local_run_copied_to_a_bucket_goes_on_there(bucket: Any) -> None:
    bucket.objects["runs/a/metrics.jsonl"] = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st'
    parts = PartFiles(as_path(bucket.url), 2, PACE)
    write(parts, 3, 4)
    upload(parts)
    assert bucket.objects["runs/a/metrics.jsonl"] == b'{"step": 1}\n{"step": 2}\n'
    assert steps(bucket.url) == [1, 2, 3, 4]


def test_the_paths_of_etils_can_do_all_that_is_asked_of_them(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    earlier = PartFiles(epath.Path(tmp_path), 0, PACE)
    write(earlier, *range(1, 12))
    upload(earlier)
    parts = PartFiles(epath.Path(tmp_path), 6, PACE)
    write(parts, 7)
    upload(parts)
    assert steps(tmp_path) == steps(epath.Path(tmp_path)) == [1, 2, 3, 4, 5, 6, 7]


# ------------------------------------------------------------------------------------------------------ mirror


def test_only_files_that_changed_are_copied(bucket: Any, tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, as_path(bucket.url), PACE)
    upload(mirror)
    for folder in ("train", "training_eval/books"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "events").write_bytes(folder.encode())
    upload(mirror)
    assert bucket.objects == {
        "runs/a/train/events": b"train",
        "runs/a/training_eval/books/events": b"training_eval/books",
    }
    with open(tmp_path / "train" / "events", "ab") as events:
        events.write(b" and more")
    bucket.down = True
    with pytest.raises(ConnectionError):
        upload(mirror)
    bucket.down = False
    bucket.requests.clear()
    upload(mirror)
    assert bucket.requests == [("write", "runs/a/train/events")]
    assert bucket.objects["runs/a/train/events"] == b"train and more"


# ------------------------------------------------------------------------------------------------------- close


def test_closing_uploads_everything_and_leaves_nothing_behind(bucket: Any) -> None:
    sink = RemoteLines(as_path(bucket.url), 0, pytest.fail, PACE)
    write(sink, *range(1, 6))
    (sink.spool / "train").mkdir()
    (sink.spool / "train" / "events").write_bytes(b"events")
    sink.close()
    assert steps(bucket.url) == [1, 2, 3, 4, 5] and bucket.objects["runs/a/train/events"] == b"events"
    assert not sink.spool.exists()


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
def test_what_can_not_be_uploaded_is_kept_and_named(
    bucket: Any, tmp_path: Path, hangs: bool, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    pace = Pace(lines_per_part=4, spacing=0.01, close=0.3)
    console = io.StringIO()
    sink = RemoteLines(as_path(bucket.url), 0, lambda text: print(text, file=console), pace)
    write(sink, *range(1, 7))
    sink.flush()
    wait_until(lambda: len(bucket.objects) == 2)
    if hangs:
        bucket.seconds = 5.0
    else:
        bucket.down = True
    write(sink, *range(7, 12))
    sink.close()
    said = console.getvalue().splitlines()
    lacking = "metrics did not all reach bucket:/runs/a (5 lines are missing)"
    assert said[-1] == f"{lacking}: copy what is in {sink.spool} there"
    assert len(said) == (1 if hangs else 2)
    bucket.save(tmp_path)
    for kept in sink.spool.rglob("*.jsonl"):
        kept.replace(tmp_path / "metrics" / kept.name)
    assert steps(tmp_path) == list(range(1, 12))
