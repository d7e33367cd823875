"""The page: one HTML file with its pictures inside, that needs no network and no script."""

from __future__ import annotations

import html
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from palmjax.metrics.throughput import clock, si
from palmjax.report import plots
from palmjax.report.read import Run

_NUMBER = re.compile(r"-?[\d.,:]+(e[+-]?\d+)?( ?(%|s|[kMGTP]))?")
_WHEN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")

MOST_EVENTS = 400
"""Rows of the table of events; a run that has more says how many are left out."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; background: #fff; margin: 2rem auto; max-width: 1080px;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #e6eaee; padding-bottom: .2rem; }
.state { color: #5b6873; margin: .2rem 0 1.4rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; }
.tile { border: 1px solid #e6eaee; border-radius: 6px; padding: .5rem .9rem; min-width: 7.5rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; }
.tile span { color: #5b6873; font-size: .85rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1rem; }
td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; }
th { font-weight: 600; color: #5b6873; font-size: .85rem; }
td.n, th.n { text-align: right; }
td.t { white-space: nowrap; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }
svg { max-width: 100%; height: auto; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .8rem; border-radius: 6px; }
.note { color: #5b6873; font-size: .9rem; }
"""


def page(run: Run, others: Sequence[Run] = ()) -> str:
    """The report as HTML text. others: runs whose loss is drawn beside."""
    sections = [
        _tiles(run),
        _section("Loss", plots.svg(plots.loss(run, others), "loss") if run.steps else _note("No step yet.")),
        _section("Throughput", plots.svg(plots.throughput(run), "throughput") if run.steps else _note("No step yet.")),
        _section("Where the time went", _time(run)),
        _section("Results", _results(run)),
        _section("Data seen", _data(run)),
        _section("What happened", _events(run)),
        *([_section("Left out", "".join(_note(html.escape(text)) for text in run.damaged))] if run.damaged else ()),
        _section("Processes", _processes(run)),
        _section("Checkpoints", _note(html.escape(run.checkpoints))),
        _section("Configuration", _folded("config.gin", run.config) + _folded("model-info.txt", run.model_info)),
    ]
    name = html.escape(run.folder)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f'<h1>{name}</h1>\n<p class="state">{html.escape(_state(run))}</p>\n{"".join(sections)}</body>\n</html>\n'
    )


def _state(run: Run) -> str:
    if not run.processes:
        return run.state
    return f"{run.state}; began {_when(run.processes[0].born)}, last sign of life {_when(run.processes[-1].seen)}"


def _tiles(run: Run) -> str:
    last = run.steps[-1]["step"] if run.steps else 0
    share = f" of {run.total_steps:,}" if run.total_steps and run.total_steps != last else ""
    tokens = sum(line.get("tokens", 0) for line in run.steps)
    losses = [line["loss"] for line in run.steps[-50:] if "loss" in line]
    shown = {
        "steps": f"{last:,}{share}",
        "tokens": si(tokens),
        f"train loss, last {len(losses)} steps": f"{statistics.fmean(losses):.4g}" if losses else None,
        **{f"held-out loss, {task}": f"{lines[-1]['loss']:.4g}" for task, lines in _scored(run)},
        "goodput": f"{100 * run.goodput.share:.1f} %",
        "wall clock": clock(run.goodput.wall),
        "MFU": _percent(_median(run, "mfu")),
    }
    tiles = (f'<div class="tile"><b>{v}</b><span>{html.escape(k)}</span></div>' for k, v in shown.items() if v)
    return f'<div class="tiles">{"".join(tiles)}</div>\n'


def _time(run: Run) -> str:
    wall = max(run.goodput.wall, 1e-9)
    rows = [
        (
            f'<span class="swatch" style="background:{plots.CAUSE_COLORS[cause]}"></span>{html.escape(cause)}',
            f"{seconds:,.1f}",
            f"{100 * seconds / wall:.2f} %",
        )
        for cause, seconds in run.goodput.seconds.items()
        if seconds > 0
    ]
    rows.append(("all", f"{run.goodput.wall:,.1f}", "100 %"))
    text = (
        f"Goodput {100 * run.goodput.share:.1f} %: time in steps whose result is part of the run, over the time from "
        "the first process's start to the last sign of life."
    )
    bar = plots.svg(plots.time_by_cause(run), "time")
    return bar + _table(("cause", "seconds", "share"), rows, escape=False) + _note(text)


def _results(run: Run) -> str:
    names = list(dict.fromkeys(name for lines in run.evaluations.values() for name in _scores(lines[-1])))
    rows = []
    for task, lines in run.evaluations.items():
        best = min(lines, key=lambda line: line.get("loss", float("inf")))
        shown = {"last": lines[-1]} | ({"lowest loss": best} if best["step"] != lines[-1]["step"] else {})
        for which, line in shown.items():
            rows.append((task, which, f"{line['step']:,}", *(_number(line.get(name)) for name in names)))
    table = _table(("held out", "", "step", *names), rows) if rows else ""
    seconds = _median(run, "seconds")
    speed, mfu, hfu = (_median(run, name) for name in ("tokens_per_second", "mfu", "hfu"))
    train = {
        "median step": None if seconds is None else f"{seconds:.4g} s",
        "median tokens/s": None if speed is None else si(speed),
        "median MFU": _percent(mfu),
        "median HFU": _percent(hfu),
        "processes": f"{len(run.processes):,}",
        "steps lost by kills and done again": f"{run.lost_steps:,}",
        "rewinds": f"{run.count('rewind'):,}",
        "steps taken back": f"{len(run.taken_back):,}",
        "updates refused (not finite)": f"{sum(line.get('nonfinite', 0) > 0 for line in run.steps):,}",
    }
    return table + _table(("training", ""), [(name, value) for name, value in train.items() if value is not None])


def _scores(line: Mapping[str, Any]) -> list[str]:
    """Names of the metrics in an evaluation's line."""
    return [n for n, value in line.items() if isinstance(value, int | float) and n not in ("step", "seconds")]


def _data(run: Run) -> str:
    if run.shares is None or not run.row_length:
        return _note("The shares of the mixture are not known here: the token stores are not where config.gin says.")
    rows_read = sum(line.get("tokens", 0) for line in run.steps) / run.row_length
    rows = []
    for task, share, available in run.shares:
        seen = share * rows_read
        rows.append((task, f"{100 * share:.2f} %", f"{seen:,.0f}", f"{available:,}", f"{seen / available:.3g}"))
    return _table(("task", "share", "rows seen", "rows it has", "epochs"), rows)


def _events(run: Run) -> str:
    shown = run.marks[:MOST_EVENTS]
    rows = [(f"{m.step:,}", "" if m.time is None else _when(m.time), m.kind, m.text) for m in shown]
    left = len(run.marks) - len(shown)
    more = _note(f"{left:,} more are in metrics.jsonl.") if left else ""
    return _table(("step", "when", "what", ""), rows) + more if rows else _note("Nothing went wrong.")


def _processes(run: Run) -> str:
    rows = [
        (
            str(i),
            _when(p.born),
            clock(p.seen - p.born),
            f"{p.first:,} to {p.last:,}",
            p.ended or _silent(i, run),
        )
        for i, p in enumerate(run.processes, 1)
    ]
    return _table(("process", "began", "lived", "steps", "end"), rows)


def _silent(number: int, run: Run) -> str:
    """How a process ended that has not said it."""
    return "killed" if number < len(run.processes) else "killed or running"


def _scored(run: Run) -> list[tuple[str, Sequence[Any]]]:
    return [(task, lines) for task, lines in run.evaluations.items() if lines and "loss" in lines[-1]]


def _median(run: Run, name: str) -> float | None:
    values = [line[name] for line in run.steps if line.get(name) is not None]
    return statistics.median(values) if values else None


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}\n"


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>\n'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], escape: bool = True) -> str:
    def cell(text: str) -> str:
        kind = ' class="n"' if _NUMBER.fullmatch(text) else ' class="t"' if _WHEN.fullmatch(text) else ""
        return f"<td{kind}>{html.escape(text) if escape else text}</td>"

    rows = list(rows)
    columns = [[row[i] for row in rows if i < len(row) and row[i]] for i in range(len(head))]
    kinds = [' class="n"' if column and all(map(_NUMBER.fullmatch, column)) else "" for column in columns]
    names = [f"<th{kind}>{html.escape(text)}</th>" for text, kind in zip(head, kinds, strict=True)]
    lines = ["".join(names), *("".join(cell(t) for t in row) for row in rows)]
    return "<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>\n"


def _folded(name: str, text: str) -> str:
    if not text:
        return _note(f"There is no {name}.")
    return f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>\n"
