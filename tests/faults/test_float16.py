"""float16 runs: overflows are passed over, the scale is saved, and one at its end stops the run."""

from __future__ import annotations

import pytest

from palmjax import guard, model_dir
from tests.e2e import jobs
from tests.faults import runs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FLOAT16 = ("Decoder.dtype='float16'", "Experiment.loss_scale=@DynamicLossScale()", "DynamicLossScale.init=1073741824.0")


def test_the_scale_finds_its_place_and_a_break_changes_nothing(job, tmp_path):
    """The scale halves from 2^30, at which all overflows; the break at step 5 comes amid that."""
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for steps, folder in ((25, folders[0]), (5, folders[1]), (25, folders[1])):
        assert runs.run(job, folder, *FLOAT16, f"TRAIN_STEPS={steps}") == 0
    states = [jobs.final_state(folder, 25) for folder in folders]
    jobs.assert_same_bits(*states)
    assert runs.losses(folders[0]) == runs.losses(folders[1])
    scale = float(states[0][".loss_scale.scale"])
    overflows = [runs.events(folder, "overflow") for folder in folders]
    assert [e["step"] for e in overflows[0]] == [e["step"] for e in overflows[1]]
    assert overflows[0][-1]["overflows"] == len(overflows[0]) > 6 and 1 < scale < 2.0**25
    changes = runs.events(folders[0], "loss scale")
    assert changes[0]["old"] == 2.0**30 and changes[-1]["new"] == scale
    lines = runs.records(folders[0], "train")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5 and lines[-1]["loss_scale"] == scale


def test_a_scale_that_can_fall_no_further_stops_the_run(job, tmp_path, capsys):
    at_its_end = ("DynamicLossScale.minimum=1073741824.0", "DynamicLossScale.max_at_minimum=4")
    assert runs.run(job, tmp_path, *FLOAT16, *at_its_end) == guard.EXIT_STOPPED
    text = capsys.readouterr().err
    assert (
        "error: step 4: the loss scale is at its minimum of 1.07374e+09" in text and "overflowed there 4 times" in text
    )
    assert model_dir.newest(tmp_path) is None
