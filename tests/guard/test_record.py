"""guard.json and which checkpoints it makes void."""

from __future__ import annotations

import pytest

from palmjax.config import ConfigError
from palmjax.guard import Rewind, is_void, read_rewinds, remove_void, write_rewinds

FIRST = Rewind(step=95, to=70, skips=((70, 480),), loss=9.5, z=38.25)
SECOND = Rewind(step=60, to=40, skips=((40, 480),), loss=float("inf"), z=float("inf"))


def test_what_is_written_is_read(tmp_path):
    assert read_rewinds(tmp_path) == ()
    for rewinds in ((FIRST,), (FIRST, SECOND)):
        write_rewinds(tmp_path, rewinds)
        assert read_rewinds(tmp_path) == rewinds
    assert [path.name for path in tmp_path.iterdir()] == ["guard.json"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": 1, "rewinds": [{}]}', '{"format": 9, "rewinds": []}', "\0"]
)
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "guard.json").write_text(text)
    with pytest.raises(ConfigError, match=r"guard\.json can't be read"):
        read_rewinds(tmp_path)


@pytest.mark.parametrize(
    ("step", "known", "void"),
    [(70, 0, True), (40, 0, False), (80, 0, True), (80, 1, True), (40, 1, False), (80, 2, False), (30, 0, False)],
)
def test_void_is_what_a_later_rewind_has_passed_by(step, known, void):
    assert is_void(step, known, (FIRST, SECOND)) == void


def test_void_checkpoints_go_and_a_second_time_nothing_is_left_to_do(tmp_path):
    saved = {40: 0, 70: 0, 80: 1, 90: 0}
    for step in saved:
        (tmp_path / f"checkpoint_{step}" / "state").mkdir(parents=True)
    assert remove_void(tmp_path, sorted(saved), saved.__getitem__, (FIRST,)) == [90]
    assert remove_void(tmp_path, [40, 70, 80], saved.__getitem__, (FIRST,)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_40", "checkpoint_70", "checkpoint_80"]
