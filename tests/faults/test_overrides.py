"""A run that follows overrides.json: given before a start, and appearing on its way."""

from __future__ import annotations

import json

import pytest

from palmjax import guard, model_dir, replay
from palmjax.checkpoint import read_info
from palmjax.guard import Overrides
from tests.e2e import jobs
from tests.faults import runs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_run_follows_a_change_at_its_next_checkpoint_and_goes_on_with_it_after_a_break(job, tmp_path, capsys):
    """At step 10 of 30. Another run is broken off at 20 and goes on: the same bits."""
    value = {"learning_rate": [[12, 1e-3]], "skip_rows": [[320, 400]]}
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for folder in folders:
        assert runs.run(job, folder, "TRAIN_STEPS=10") == 0
        (folder / "overrides.json").write_text(json.dumps(value))
    assert runs.run(job, folders[0], "TRAIN_STEPS=30") == 0
    assert runs.run(job, folders[1], "TRAIN_STEPS=20") == 0
    assert runs.run(job, folders[1], "TRAIN_STEPS=30") == 0
    assert runs.losses(folders[0]) == runs.losses(folders[1])
    jobs.assert_same_bits(*(jobs.final_state(folder, 30) for folder in folders))
    lines = runs.records(folders[0], "train")
    rates = {line["step"]: line["learning_rate"] for line in lines}
    assert rates[12] == pytest.approx(1e-2) and rates[13] == pytest.approx(1e-3), "13 is the update after 12 steps"
    info = read_info(folders[0] / "checkpoint_30")
    assert info.guard["overrides"] == value and info.data.first_row == 30 * 16 + 80 and info.data.skips == ((20, 80),)
    assert runs.events(folders[0], "start")[-1]["overrides"] == value
    assert replay.main(["--run", str(folders[0]), "--step", "28"]) == 0
    assert "rows 512..528" in capsys.readouterr().out


def test_a_file_that_appears_on_the_way_is_read_at_the_next_checkpoint_and_a_mistake_in_it_ends_nothing(
    job,
    tmp_path,
    monkeypatch,
    capsys,
):
    file, seen = tmp_path / "overrides.json", []
    read = Overrides.read

    def reading(folder):
        """Before each look into MODEL_DIR: nothing, then a mistake, then what is meant."""
        seen.append(max(model_dir.steps(tmp_path), default=0))
        if len(seen) == 2:
            file.write_text('{"learning_rates": []}')
        if len(seen) == 3:
            file.write_text('{"learning_rate": [[10, 0.001]]}')
        return read(folder)

    monkeypatch.setattr(guard.Overrides, "read", reading)
    assert runs.run(job, tmp_path, "TRAIN_STEPS=20") == 0
    text = capsys.readouterr().err
    assert "not followed: " in text and "'learning_rates' is not known" in text
    rates = {line["step"]: line["learning_rate"] for line in runs.records(tmp_path, "train")}
    assert [rates[step] for step in (10, 11)] == pytest.approx([1e-2, 1e-3])
    assert [e["step"] for e in runs.events(tmp_path, "overrides")] == [10]
    assert [e["step"] for e in runs.events(tmp_path, "start")] == [0, 10]
