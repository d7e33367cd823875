"""A poisoned range of rows: the spike is noticed, the run goes back and past it, and a kill at any instant of that
leads to the same bits.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from palmjax import guard, model_dir, replay
from palmjax.checkpoint import read_info
from palmjax.config import ConfigError
from palmjax.metrics import read_metrics
from tests.e2e import jobs
from tests.faults import poison, runs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Killed(BaseException):
    """What a kill is to a test in the run's own process."""


def test_poisoned_rows_cost_the_guarded_run_nothing(finished):
    clean, undefended, defended = (
        runs.heldout(folder) for folder in (finished.clean, finished.undefended, finished.defended)
    )
    assert defended == pytest.approx(clean, rel=0.01)
    assert undefended > 1.1 * clean, "the rows must do harm to a run without a guard, or this shows nothing"
    assert not runs.events(finished.clean, "spike"), "a clean run has no spike"


def test_the_spike_is_rewound_and_its_rows_are_skipped(finished):
    (spike,), (rewind,) = (runs.events(finished.defended, name) for name in ("spike", "rewind"))
    assert spike["first_step"] == 51 and spike["step"] == 52, "noticed at the second step of noise"
    assert rewind["to"] == 40 and rewind["number"] == 1
    assert rewind["rows"][0] <= runs.POISON[0] and runs.POISON[1] <= rewind["rows"][1]
    assert guard.read_rewinds(finished.defended) == (
        guard.Rewind(step=52, to=40, skips=((40, 480),), loss=spike["loss"], z=spike["z"]),
    )
    assert sorted(runs.losses(finished.defended)) == list(range(1, runs.STEPS + 1))
    assert max(loss for step, loss in runs.losses(finished.defended).items() if step > 40) < 2
    before, after = (runs.losses(folder) for folder in (finished.clean, finished.defended))
    assert all(after[step] == before[step] for step in range(1, 41)), "what was before is as it was"


def test_what_was_taken_back_stays_in_the_log_and_in_no_checkpoint(finished):
    lines = [r for r in read_metrics(finished.defended) if r["kind"] == "train"]
    assert [r["step"] for r in lines][39:55] == [*range(40, 54), 41, 42], "51 and 52 spike; 53 was under way"
    infos = {step: read_info(finished.defended / f"checkpoint_{step}") for step in model_dir.steps(finished.defended)}
    assert all(info.guard["rewinds"] == (step > 40) for step, info in infos.items())
    assert infos[runs.STEPS].data.skips == ((40, 480),)
    assert infos[runs.STEPS].data.first_row == runs.STEPS * 16 + 480
    assert not list(finished.defended.glob("void_*"))


@pytest.mark.parametrize("instant", ["before the record", "after the record", "before the next save"])
def test_interrupted_at_any_instant_of_a_rewind_it_ends_with_the_same_bits(job, finished, tmp_path, instant):
    folder = tmp_path / "run"

    def end() -> None:
        raise Killed

    with poison.scrambled(*runs.POISON):
        with pytest.raises(Killed), poison.interrupted(instant, end):
            runs.run(job, folder, *runs.SPIKE)
        assert runs.run(job, folder, *runs.SPIKE) == 0
    assert_same_run(folder, finished.defended)


def test_sigkill_amid_a_rewind(job, finished, tmp_path):
    folder = tmp_path / "run"
    flags = [jobs.GIN, *(f"--gin.{binding}" for binding in runs.bindings(job, folder, *runs.SPIKE))]
    command = [sys.executable, "-m", "tests.faults.poison", *map(str, runs.POISON), "amid the removal", *flags]
    killed = subprocess.run(
        command, cwd=jobs.ROOT, env=jobs.environment(8), capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert len(guard.read_rewinds(folder)) == 1 and max(model_dir.steps(folder)) > 40, "a void checkpoint is left"
    with poison.scrambled(*runs.POISON):
        assert runs.run(job, folder, *runs.SPIKE) == 0
    assert_same_run(folder, finished.defended)


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    assert guard.read_rewinds(folder) == guard.read_rewinds(undisturbed)
    assert runs.losses(folder) == runs.losses(undisturbed)
    assert len(runs.events(folder, "rewind")) == 1
    states = [jobs.final_state(one, runs.STEPS) for one in (folder, undisturbed)]
    jobs.assert_same_bits(*states)
    infos = [read_info(one / f"checkpoint_{runs.STEPS}") for one in (folder, undisturbed)]
    assert infos[0].data == infos[1].data and infos[0].guard == infos[1].guard


def test_a_run_whose_record_of_rewinds_is_gone_is_refused(job, finished, tmp_path):
    """Later rewinds would take no checkpoint for void that they have passed."""
    shutil.copytree(finished.defended / "checkpoint_70", tmp_path / "checkpoint_70")
    with pytest.raises(ConfigError, match=r"checkpoint_70 was saved behind 1 rewinds, of which guard\.json knows 0"):
        runs.run(job, tmp_path, *runs.SPIKE)
    assert model_dir.steps(tmp_path) == [70]


def test_when_no_rewind_is_left_the_run_stops_and_says_what_it_read(job, tmp_path, capsys):
    with poison.scrambled(*runs.POISON):
        assert runs.run(job, tmp_path, *runs.SPIKE, "SpikeRule.max_rewinds=0") == guard.EXIT_STOPPED
    text = capsys.readouterr().err
    assert "rows 800..832" in text and "SpikeRule.max_rewinds = 0" in text and "--step 52 --print_batch" in text
    assert max(model_dir.steps(tmp_path)) == 50, "nothing is saved of a spike"
    assert runs.events(tmp_path, "stopped")[0]["step"] == 52


# --- replay --------------------------------------------------------------------------------------------------------


def replayed(folder: Path, step: int, *flags: str) -> int:
    with poison.scrambled(*runs.POISON):
        return replay.main(["--run", str(folder), "--step", str(step), *flags])


def test_replay_computes_a_step_behind_a_rewind_with_the_same_bits(finished, capsys):
    assert replayed(finished.defended, 68) == 0
    out = capsys.readouterr().out
    assert "from checkpoint_65" in out and "metrics have the logged bits" in out
    assert f"rows {67 * 16 + 480}..{68 * 16 + 480}" in out


def test_replay_shows_the_batch_that_a_rewind_has_taken_back(finished, tmp_path, capsys):
    """Its checkpoints are gone: it is computed from the one that the run went back to."""
    assert replayed(finished.defended, 51, "--rewinds=0", "--print_batch", f"--output={tmp_path / 'rows'}") == 0
    out = capsys.readouterr().out
    assert "from checkpoint_40" in out and "metrics have the logged bits" in out
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(800, 816)) and rows[0]["task"] == "text_files"
    assert rows[3]["text"].splitlines()[0][:20] in out
    noise = np.concatenate([row["targets"] for row in rows])
    assert len(set(noise.tolist())) > 200, "bytes of every kind: no text looks so"


def test_replay_finds_a_number_that_is_not_what_the_step_gives(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    for name in ("configs", "checkpoint_40"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(finished.clean / name)
    lines = [json.loads(line) for line in (finished.clean / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train" and line["step"] == 43:
            line["loss"] = float(np.nextafter(np.float32(line["loss"]), np.float32(9)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replay.main(["--run", str(folder), "--step", "43"]) == 1
    assert "loss of step 43 is" in capsys.readouterr().out
    assert replay.main(["--run", str(folder), "--step", "42"]) == 0
    with pytest.raises(ValueError, match=r"no line of step 81; it has steps 1\.\.80"):
        replay.main(["--run", str(folder), "--step", "81"])
