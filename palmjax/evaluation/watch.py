"""Checkpoints to results: one that is named, or each of a MODEL_DIR as it appears, with a plot of scores over steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from palmjax import checkpoint, model_dir, trained
from palmjax.config import ConfigError, Experiment
from palmjax.evaluation import results, weights
from palmjax.evaluation.suites import Session, Which
from palmjax.evaluation.tasks import Suite
from palmjax.files import say, write_whole
from palmjax.provenance import RunInfo

SCORES, PLOT = "scores.json", "scores.png"
POLL = 2.0
"""Seconds between two looks for a new checkpoint."""


Load = Callable[[str, RunInfo], tuple[Suite, str, Experiment]]
"""(checkpoint, its info) -> the suite, its gin text, and the experiment with the command line's changes."""


class Opener:
    """Opens checkpoints with a suite. Prompts and programs are made for the first one and kept for those like it."""

    def __init__(self, load: Load):
        self._load = load
        self._session: Session | None = None
        self._for: tuple[Any, ...] = ()

    def open(self, path: str) -> tuple[trained.Trained, Session]:
        """The checkpoint's model and the session to evaluate it in."""
        info = checkpoint.read_info(path)
        suite, definition, experiment = self._load(path, info)
        trained.enable_compilation_cache(experiment.train.compilation_cache)
        opened = trained.open_checkpoint(path, info, experiment)
        wanted = (suite, experiment.model, experiment.mesh, experiment.sharding, info.vocabulary)
        if self._session is None or self._for != wanted:
            self._session = Session(suite, experiment, opened.model, opened.mesh, info.vocabulary, definition)
            self._for = wanted
        return opened, self._session

    def evaluate(self, path: str, folder: Path) -> dict[str, Any]:
        """Evaluates one checkpoint and writes its result in `folder`. All processes of a job call it together."""
        opened, session = self.open(path)
        params = opened.params()
        which = Which(checkpoint=path, step=opened.info.step, weights=weights.fingerprint(params))
        return session.evaluate(params, which, folder)


# --- continuous evaluation -------------------------------------------------------------------------------------------


def follow(model: str, folder: Path, opener: Opener, timeout: float) -> int:
    """Evaluates every whole checkpoint of MODEL_DIR in the order of their steps, then waits for more.

    Ends when the run's last step is evaluated, or after `timeout` seconds without a new checkpoint. What was evaluated
    before is not again: run the same command after a kill. One that the run deletes meanwhile is told and passed over;
    a job of several processes, which may not notice alike, ends with it. Returns the process's exit code.
    """
    waited = time.monotonic()
    while True:
        step = _next(model, folder)
        if step is not None:
            path = str(model_dir.as_path(model) / f"{model_dir.PREFIX}{step}")
            try:
                result = opener.evaluate(path, folder / f"{model_dir.PREFIX}{step}")
            except ConfigError:
                if model_dir.is_whole(path) or jax.process_count() > 1:
                    raise
                say(f"step {step:,}: passed over, since the run has deleted {path} (SaveCheckpointConfig.keep)")
                continue
            if jax.process_index() == 0:
                print(f"step {step:,}\n{results.table(result)}", flush=True)
                plot(folder)
            waited = time.monotonic()
        elif _finished(model, folder) or time.monotonic() - waited > timeout:
            return 0
        else:
            time.sleep(min(POLL, timeout))


def _steps(folder: Path) -> list[int]:
    """Steps that have a result below `folder`, rising."""
    found = [path.parent.name.removeprefix(model_dir.PREFIX) for path in folder.glob(f"*/{results.RESULT}")]
    return sorted(int(step) for step in found if step.isdigit())


def _next(model: str, folder: Path) -> int | None:
    """The first step that has a checkpoint and no result; process 0's view counts."""
    left = sorted(set(model_dir.steps(model)) - set(_steps(folder)))
    step = left[0] if left else -1
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        step = int(multihost_utils.broadcast_one_to_all(jax.numpy.int32(step)))
    return None if step < 0 else step


def _finished(model: str, folder: Path) -> bool:
    """Whether the newest checkpoint is that of the run's last step, and evaluated."""
    newest = model_dir.newest(model)
    if newest is None:
        return False
    info = checkpoint.read_info(str(model_dir.as_path(model) / f"{model_dir.PREFIX}{newest}"))
    last = str(info.flat_config.get("train.steps", ""))
    return last.isdigit() and newest >= int(last) and newest in _steps(folder)


def scores(folder: Path) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The headline's estimate of every task at every step that has a result."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for step in _steps(folder):
        _, result = results.read(folder / f"{model_dir.PREFIX}{step}")
        for name, task in result["tasks"].items():
            point = {"metric": task["headline"], "percent": task["metric"]["percent"], "chance": task["chance"]}
            found.setdefault(name, {})[step] = {**point, **task["metrics"][task["headline"]]}
    return found


def plot(folder: Path) -> None:
    """Writes scores.json and scores.png: a panel for each task, its headline over steps with its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = scores(folder)
    write_whole(folder / SCORES, json.dumps(found, indent=1) + "\n")
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.0 * rows), squeeze=False, sharex=True)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (name, points) in zip(axes.flat, found.items(), strict=False):
        _panel(axis, name, points)
    figure.tight_layout()
    partial = folder / f"{PLOT}.part"
    figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    partial.replace(folder / PLOT)


def _panel(axis: Any, name: str, points: Mapping[int, Mapping[str, Any]]) -> None:
    steps, latest = list(points), list(points.values())[-1]
    scale = 100 if latest["percent"] else 1
    values = [scale * point["value"] for point in points.values()]
    bounds = [
        [scale * (point[end] if point[end] is not None else point["value"]) for point in points.values()]
        for end in ("low", "high")
    ]
    axis.fill_between(steps, *bounds, alpha=0.2, linewidth=0)
    axis.plot(steps, values, marker="o", markersize=3)
    if latest["chance"] is not None and latest["metric"].startswith("acc"):
        axis.axhline(scale * latest["chance"], color="grey", linestyle=":", linewidth=1, label="chance")
        axis.legend(loc="best", fontsize=7, frameon=False)
    axis.set_title(name, fontsize=10)
    axis.set_ylabel(latest["metric"].replace("_", " ") + (" (%)" if scale == 100 else ""), fontsize=8)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8, labelbottom=True)
    axis.grid(alpha=0.3)
