"""The report of a real run that is killed: its seconds against those that the test itself has counted."""

from __future__ import annotations

import time
from typing import Any

import pytest

from palmjax import cli
from palmjax.report import goodput as causes
from palmjax.report.read import read
from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_killed_run_is_accounted_for(job, tmp_path, capsys):
    folder, flags = tmp_path / "run", ["TRAIN_STEPS=15", "EVAL_PERIOD=10"]
    began, alive = time.time(), []
    process: Any = job.start(folder, *flags)
    jobs.wait_for_step(folder, 8, process)
    process.kill()
    process.communicate()
    alive.append(time.time() - began)
    time.sleep(5.0)
    born = time.time()
    job.run(folder, *flags)
    alive.append(time.time() - born)
    whole = time.time() - began

    run = read(str(folder))
    assert [line["step"] for line in run.steps] == list(range(1, 16))
    assert run.state == "done" and len(run.processes) == 2
    assert run.lost_steps >= 8 - 5
    seconds = run.goodput.seconds
    assert seconds[causes.REDONE] > 0 and seconds[causes.USEFUL] > 0 and seconds[causes.EVALUATION] > 0
    # What is neither seen by the first event nor by the last: the interpreter's own end, and the kills' way here.
    assert run.goodput.wall == pytest.approx(whole, abs=3.0)
    assert seconds[causes.DOWN] == pytest.approx(whole - sum(alive), abs=3.0)
    assert seconds[causes.OTHER] < 0.2 * whole

    assert cli.main(["report", "--run", str(folder)]) == 0
    assert "done, step 15" in capsys.readouterr().out
    text = (folder / "report.html").read_text()
    assert "text_files" in text and "rows it has" in text, "the shares of the data are told"
