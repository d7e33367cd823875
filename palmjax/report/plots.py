"""Pictures of a run as SVG text: curves over steps with what happened on the way, and the time by cause."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from palmjax.metrics.throughput import si
from palmjax.report import goodput as causes
from palmjax.report.read import Mark, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GRID = "#22303c", "#8894a0", "#e6eaee"
CURVE, FAINT, EVALUATED, OTHER_RUN = "#1f6f8b", "#a9cbd6", "#c2570c", "#7b4fa3"
BAD, WARN = "#b3261e", "#d99a1c"

CAUSE_COLORS = {
    causes.USEFUL: "#2b7a5d",
    causes.STARTUP: "#5b8db8",
    causes.DATA: "#d99a1c",
    causes.SAVING: "#b9722d",
    causes.EVALUATION: "#7b4fa3",
    causes.REFUSED: "#e07a6f",
    causes.REWOUND: "#b3261e",
    causes.REDONE: "#8c2f39",
    causes.DOWN: "#4a5560",
    causes.OTHER: "#c3cad1",
}

MARKERS = {"spike": ("^", BAD), "nonfinite": ("x", BAD), "overflow": ("+", WARN), "loss scale": (".", WARN)}
"""Events drawn as a symbol at their step."""

NAMES = {"nonfinite": "refused: not finite", "overflow": "refused: overflow"}
"""Events by other names in the legend."""

LINES = {"restart": (QUIET, ":"), "rewind": (BAD, "-"), "stopped": (BAD, "--"), "preempted": (WARN, "--")}
"""Events drawn as a line across the picture."""

POINTS = 2000
"""Points of a curve at most; longer ones are drawn by the smallest and the largest of each bin."""


def loss(run: Run, others: Sequence[Run] = ()) -> Figure:
    """Training loss in nats a token, with evaluations; steps taken back are drawn where they were, in red."""
    figure, axes = _axes("loss, nats a token")
    x, y = _column(run.steps, "loss")
    axes.plot(*thinned(x, y), color=FAINT, linewidth=0.8, label="train, each step")
    if len(x) >= 20:
        axes.plot(*smoothed(x, y), color=CURVE, linewidth=1.8, label="train, running median")
    for number, piece in enumerate(_pieces(run.taken_back)):
        label = "taken back" if number == 0 else None
        axes.plot(*thinned(*_column(piece, "loss")), color=BAD, linewidth=0.9, alpha=0.7, label=label)
    top = [y]
    for color, (task, lines) in zip((EVALUATED, "#2b7a5d", "#7b4fa3"), run.evaluations.items(), strict=False):
        steps, scores = _column(lines, "loss")
        axes.plot(steps, scores, color=color, marker="o", markersize=4, linewidth=1, label=f"held out: {task}")
        top.append(scores)
    for other in others:
        steps, values = _column(other.steps, "loss")
        axes.plot(*smoothed(steps, values), color=OTHER_RUN, linewidth=1.5, label=f"train, {other.folder}")
        top.append(values)
    _limit(axes, np.concatenate(top), np.concatenate([settled(values) for values in top]))
    _draw_marks(axes, run.marks)
    _finish(axes)
    return figure


def throughput(run: Run) -> Figure:
    """Tokens a second of each step."""
    figure, axes = _axes("tokens/s")
    x, y = _column(run.steps, "tokens_per_second")
    axes.plot(*thinned(x, y), color=FAINT, linewidth=0.8, label="each step")
    if len(x) >= 20:
        axes.plot(*smoothed(x, y), color=CURVE, linewidth=1.8, label="running median")
    axes.yaxis.set_major_formatter(lambda value, _: si(value))
    # A step that was waited for late seems to have taken no time: such peaks tell nothing of the speed.
    usual = smoothed(x, y)[1] if len(x) >= 20 else y
    _limit(axes, y, 1.25 * usual, bottom=0.0)
    _draw_marks(axes, run.marks)
    _finish(axes)
    return figure


def time_by_cause(run: Run) -> Figure:
    """The wall clock as one bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.1), layout="constrained")
    axes, left = figure.subplots(), 0.0
    for cause, color in CAUSE_COLORS.items():
        share = run.goodput.seconds[cause] / max(run.goodput.wall, 1e-9)
        axes.barh(0, share, left=left, color=color, height=0.8)
        if share > 0.045:
            words = f"{100 * share:.0f} %"
            axes.text(left + share / 2, 0, words, ha="center", va="center", color="white", fontsize=10)
        left += share
    axes.set(xlim=(0, 1), ylim=(-0.4, 0.4))
    axes.set_axis_off()
    return figure


def svg(figure: Figure, name: str) -> str:
    """A figure as an <svg> element whose ids are its own, so that several share a page; equal figures, equal text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of y over a window of about a fortieth of the run, 5 to 201 steps, at up to POINTS steps; NaN is left
    out, and windows at the ends are shorter.
    """
    width = min(201, max(5, len(y) // 40)) | 1
    padded = np.pad(y.astype(float), width // 2, constant_values=np.nan)
    centers = np.unique(np.linspace(0, len(y) - 1, min(len(y), POINTS)).astype(int))
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)[centers]
    known = np.isfinite(windows).any(axis=1)
    out = np.full(len(centers), np.nan)
    out[known] = np.nanmedian(np.where(np.isfinite(windows[known]), windows[known], np.nan), axis=1)
    return x[centers], out


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points that have every peak: the smallest and the largest of each bin, in order."""
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x), POINTS // 2 + 1).astype(int)
    keep = []
    for begin, end in itertools.pairwise(edges.tolist()):
        part = y[begin:end]
        if np.isfinite(part).any():
            keep += sorted({begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))})
    return x[keep], y[keep]


def _axes(ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.07, right=0.8, bottom=0.12, top=0.94)  # alike, so that steps stand below each other
    axes.set(xlabel="step")
    axes.set_ylabel(ylabel)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK)
    return figure, axes


def _finish(axes: Axes) -> None:
    axes.xaxis.set_major_locator(_integer_ticks())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    axes.margins(x=0.01)


def _integer_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and one metric of lines, float64; NaN where a line has none."""
    values = [line.get(name) for line in lines]
    numbers = [math.nan if value is None else float(value) for value in values]
    return np.array([line["step"] for line in lines], float), np.array(numbers, float)


def _pieces(lines: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Lines that were taken back together (they come last first), each piece in order."""
    pieces: list[list[Mapping[str, Any]]] = []
    for line in lines:
        if pieces and pieces[-1][-1]["step"] == line["step"] + 1:
            pieces[-1].append(line)
        else:
            pieces.append([line])
    return [piece[::-1] for piece in pieces]


def settled(losses: np.ndarray) -> np.ndarray:
    """Of a long curve that has fallen, what comes behind its first twentieth: the fall from scratch would take all of
    the picture.
    """
    return losses[len(losses) // 20 :] if len(losses) >= 200 else losses


def _limit(axes: Axes, values: np.ndarray, usual: np.ndarray, bottom: float | None = None) -> None:
    """The range of all but the rarest of the `usual` values: one spike must not flatten the curve. Says it where some
    of `values` lie above.
    """
    values, usual = values[np.isfinite(values)], usual[np.isfinite(usual)]
    if not len(usual):
        return
    low, high = usual.min(), np.quantile(usual, 0.995)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    top = high + 2 * room
    axes.set_ylim(low - room if bottom is None else bottom, top)
    if above := int((values > top).sum()):
        words = f"{above:,} values are above, up to {si(values.max())}"
        axes.text(0.995, 1.01, words, transform=axes.transAxes, ha="right", va="bottom", color=QUIET, fontsize=8)


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    shown: set[str] = set()
    for mark in marks:
        label = None if mark.kind in shown else NAMES.get(mark.kind, mark.kind)
        if mark.kind in LINES:
            color, style = LINES[mark.kind]
            axes.axvline(mark.step, color=color, linestyle=style, linewidth=1, label=label)
            if mark.to is not None:
                axes.axvspan(mark.to, mark.step, color=color, alpha=0.08, linewidth=0)
        elif mark.kind in MARKERS:
            symbol, color = MARKERS[mark.kind]
            at = axes.get_xaxis_transform()
            axes.plot(
                [mark.step], [0.96], symbol, color=color, transform=at, linestyle="none", label=label, clip_on=False
            )
        else:
            continue
        shown.add(mark.kind)
