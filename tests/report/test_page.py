"""The page of a run that everything happened to: whole, self-contained, with the right numbers and pictures."""

from __future__ import annotations

import dataclasses
import html.parser
import re

import numpy as np
import pytest

from palmjax import cli, files
from palmjax.report import goodput as causes
from palmjax.report import page, plots
from palmjax.report.read import Run, read
from tests.report import stories


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "story <1> & more"
    stories.write(folder)
    return read(str(folder))


MEDIANS = [2.0, 5.0, 3.0, 7.0, 5.0, 7.0, 5.0]
"""Of 1 9 2 8 3 7 NaN, over windows of five that end where the values do."""


class Tags(html.parser.HTMLParser):
    """Tags that are open, and what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_startendtag(self, tag, attrs) -> None:
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    return tags


def test_the_story_is_told_whole(run):
    assert [line["step"] for line in run.steps] == list(range(1, 1201))
    assert len(run.taken_back) == 140 and run.lost_steps == 37
    assert run.state == "done" and [process.ended for process in run.processes] == [None, "preempted", "done"]
    assert [mark.kind for mark in run.marks] == [
        *["lost", "restart", "nonfinite", "spike", "rewind", "preempted", "restart"]
    ]
    assert run.goodput.seconds[causes.DOWN] == pytest.approx(60 + 240, abs=0.01)
    assert run.goodput.seconds[causes.EVALUATION] == pytest.approx(7 * 6)
    assert run.goodput.seconds[causes.STARTUP] == pytest.approx(3 * 9 + 4 * 12, abs=0.5)
    assert run.goodput.seconds[causes.DATA] == pytest.approx(0.6 * 6)  # step 633 twice
    assert [line["step"] for line in run.evaluations["held_out"]] == [200, 400, 600, 800, 1000, 1200]


def test_the_page_needs_nothing_and_escapes_everything(run):
    text = page(dataclasses.replace(run, shares=[("a", 0.75, 1000), ("b", 0.25, 9_000_000)], row_length=1024), [run])
    tags = parsed(text)
    assert not tags.fetched and "<script" not in text and "@import" not in text and "url(http" not in text
    assert "<1>" not in text and "<not a tag>" not in text
    words = " ".join(" ".join(tags.text).split())
    assert "story <1> & more" in words and "TRAIN_STEPS = 1200 # <not a tag>" in words
    for cause, seconds in run.goodput.seconds.items():
        assert (f"{cause} {seconds:,.1f}" in words) == (seconds > 0), cause
    assert f"{100 * run.goodput.share:.1f} %" in words
    assert "a 75.00 % 57,600 1,000 57.6" in words  # 1200 steps of 64 rows
    assert "37 steps" in words and "back from step 640 to step 500, past 2000 rows" in words
    assert len(text) < 1_000_000


def test_ids_of_the_pictures_are_their_own_and_equal_runs_give_equal_pages(run):
    text = page(run)
    ids = re.findall(r'\bid="([^"]+)"', text)
    shapes = [name for name in ids if re.fullmatch(r"[a-z]?[0-9a-f]{8,}", name)]
    assert shapes and len(shapes) == len(set(shapes))
    assert page(run) == text


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "event", "event": "start", "time": 1000.0, "step": 0}\n')
    text = page(read(str(tmp_path)))
    parsed(text)
    assert "No step yet." in text and "Nothing went wrong." in text


def test_a_damaged_line_is_left_out_and_told_and_a_restart_says_how_the_one_before_ended(tmp_path):
    start = '{"kind": "event", "event": "start", "time": %d, "step": %d, "origin": "/runs/a/checkpoint_1"}\n'
    step = '{"kind": "train", "step": %d, "loss": 2.0, "seconds": 1.0, "tokens": 64, "tokens_per_second": 64.0}\n'
    again = '{"kind": "event", "event": "restart", "time": 2001, "step": 1, "attempt": 1, "exit_code": 137}\n'
    text = start % (1000, 0) + step % 1 + '{"kind": "tra\x01in"\n' + start % (2000, 1) + again + step % 2
    (tmp_path / "metrics.jsonl").write_text(text)
    run = read(str(tmp_path))
    assert [line["step"] for line in run.steps] == [1, 2] and len(run.damaged) == 1
    assert [mark.text for mark in run.marks] == ["from checkpoint_1; the one before ended with exit code 137"]
    shown = page(run)
    parsed(shown)
    assert "metrics.jsonl, line 3 is damaged" in shown and "<td>killed</td>" in shown


def test_a_curve_is_not_flattened_by_its_beginning_or_by_a_peak(run):
    losses = np.concatenate([np.geomspace(10, 2, 40), np.full(960, 2.0) + np.sin(np.arange(960)) / 10])
    losses[500] = 50.0
    steps = [{"step": i, "loss": float(loss), "tokens_per_second": 100.0} for i, loss in enumerate(losses, 1)]
    axes = plots.loss(dataclasses.replace(run, steps=steps, taken_back=(), evaluations={}, marks=())).axes[0]
    assert 2.1 < axes.get_ylim()[1] < 2.5 and "values are above, up to 50" in axes.texts[0].get_text()


def test_long_curves_keep_their_peaks_and_gaps():
    y = np.sin(np.arange(100_000) / 5000)
    y[77_777], y[12_345] = 30.0, -30.0
    y[50_000:50_500] = np.nan
    x, thin = plots.thinned(np.arange(100_000.0), y)
    assert len(x) <= plots.POINTS and (np.diff(x) > 0).all()
    assert {30.0, -30.0} <= set(thin)
    x, smooth = plots.smoothed(np.arange(100_000.0), y)
    assert len(x) == len(smooth) <= plots.POINTS and x[0] == 0 and x[-1] == 99_999
    assert np.isnan(smooth[np.searchsorted(x, 50_250)]) and np.nanmax(smooth) < 1.01
    np.testing.assert_array_equal(plots.smoothed(np.arange(7.0), np.array([1, 9, 2, 8, 3, 7, np.nan]))[1], MEDIANS)


def test_the_verb_writes_the_page_and_refuses_what_is_no_run(tmp_path, capsys):
    stories.write(tmp_path / "run")
    (tmp_path / "run" / "config.gin").unlink()
    assert cli.main(["report", "--run", str(tmp_path / "run"), "--compare", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "run" / "report.html") in out and "done, step 1,200, goodput 5" in out
    parsed((tmp_path / "run" / "report.html").read_text())
    output = tmp_path / "other.html"
    assert cli.main(["report", "--run", str(tmp_path / "run"), "--output", str(output)]) == 0 and output.exists()
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert "there are no metrics" in capsys.readouterr().err
    assert cli.main(["report", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "no" / "a.html")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_report_that_is_killed_leaves_the_one_before(tmp_path, monkeypatch):
    class Killed(BaseException):
        """What a kill is to a test in the verb's own process."""

    def kill(_: int) -> None:
        raise Killed

    stories.write(tmp_path / "run", steps=1000)
    page = tmp_path / "run" / "report.html"
    page.write_text("the one before")
    monkeypatch.setattr(files.os, "fsync", kill)  # all is written then, and nothing has its name
    with pytest.raises(Killed):
        cli.main(["report", "--run", str(tmp_path / "run")])
    assert page.read_text() == "the one before"
