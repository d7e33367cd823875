"""`palmjax replay --run DIR --step N`: computes a step of a run once more, compares every metric with the logged one,
bit for bit, and shows what was read.

A run is a pure function of its configuration, its rewinds and its overrides, and each start is logged with them. So
the nearest checkpoint at or before the step, or scratch where none is left, and the steps from there on give the step
again, one that a rewind has taken back included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from palmjax import checkpoint, distributed, guard, model_dir, provenance
from palmjax.config import ConfigError, section
from palmjax.data import feed
from palmjax.data.order import Skips
from palmjax.metrics import read_metrics
from palmjax.run import CONFIGS, Description, Run
from palmjax.state import TrainState
from palmjax.trained import enable_compilation_cache


@section
class Logged:
    """A train line and what it was computed under. start: the event of the start before it. rewinds: made until then.

    branch: the train lines of the same branch, by step, as far as they were computed under the same start.
    """

    line: dict[str, Any]
    start: dict[str, Any]
    rewinds: int
    branch: dict[int, dict[str, Any]]

    @property
    def skips(self) -> Skips:
        return tuple((int(step), int(rows)) for step, rows in self.start["skips"])


def find(folder: str, step: int, rewinds: int | None = None) -> Logged:
    """The line of `step`: the last one logged, or the one computed when the run had made `rewinds` rewinds.

    Raises ConfigError if there is none, saying what there is.
    """
    start: dict[str, Any] | None = None
    branches: dict[int, dict[int, dict[str, Any]]] = {}
    found: Logged | None = None
    for record in read_metrics(folder, damaged=_say_damaged):
        if record.get("event") == "start":
            start = record
        if record.get("kind") != "train" or start is None:
            continue
        made = start["rewinds"]
        branch = branches.setdefault(made, {})
        branch[record["step"]] = record
        if record["step"] == step and rewinds in (None, made):
            found = Logged(line=record, start=start, rewinds=made, branch=branch)
    if found is None:
        there = [f"{min(b)}..{max(b)}" + (f" after rewind {made}" if made else "") for made, b in branches.items()]
        behind = f" after rewind {rewinds}" if rewinds else ""
        raise ConfigError(f"{folder} has no line of step {step}{behind}; it has steps {', '.join(there) or 'none'}")
    return found


def _say_damaged(text: str) -> None:
    print(f"note: left out: {text}", file=sys.stderr)


def open_run(folder: str, logged: Logged) -> Run:
    """The run with the configuration that the step was computed with. Raises ConfigError if that is not there."""
    digest = logged.start["config"]
    path = model_dir.as_path(folder) / CONFIGS / f"{digest}.gin"
    if not path.exists():
        raise ConfigError(
            f"step {logged.line['step']} was computed with the configuration {digest}, but there is no {path}"
        )
    text = path.read_bytes().decode(errors="replace")
    if Description(operative=text).digest != digest:
        raise ConfigError(f"{path} is not the configuration that step {logged.line['step']} was computed with")
    with tempfile.TemporaryDirectory(prefix="palmjax-") as local:
        file = Path(local) / path.name
        file.write_text(text)
        from palmjax import configure

        experiment = dataclasses.replace(configure.load([str(file)]).experiment, model_dir=folder)
    enable_compilation_cache(experiment.train.compilation_cache)
    return Run(experiment, Description(operative=text))


def nearest_state(run: Run, step: int, branch: int, rewinds: Sequence[guard.Rewind]) -> tuple[TrainState, str]:
    """The state of the newest checkpoint of the branch at or before `step`, or that from which the run began; and its
    origin in words.

    branch: the rewinds made when `step` was computed, of all the `rewinds`.
    """
    for found in reversed(model_dir.steps(run.folder)):
        path = model_dir.as_path(run.folder) / f"{model_dir.PREFIX}{found}"
        if found > step:
            continue
        known = checkpoint.read_info(path).guard.get("rewinds", 0)
        if known <= branch and not guard.is_void(found, known, rewinds[:branch]):
            return checkpoint.restore_state(path, run.program.abstract_state), path.name
    initial, prog = run.experiment.checkpoint.restore.path, run.program
    with tempfile.TemporaryDirectory(prefix="palmjax-") as empty:
        start = checkpoint.start(empty, initial, prog.abstract_state, prog.initial_state, run.dataset.vocabulary)
    return start.state, start.origin


@section
class Replayed:
    """origin: where the state came from. metrics: of the step. differing: step and metric, the first that is not the
    logged one; None if all are.
    """

    origin: str
    metrics: dict[str, float]
    differing: tuple[int, str, float, float] | None


def replay(run: Run, logged: Logged, rewinds: Sequence[guard.Rewind]) -> Replayed:
    """Computes the step, and those before it back to the nearest checkpoint. All processes call it together."""
    step, differing, values = logged.line["step"], None, {}
    with ThreadPoolExecutor(1) as pool:
        run.follow(guard.Overrides.from_json(logged.start["overrides"]), step - 1, pool)
        state, origin = nearest_state(run, step - 1, logged.rewinds, rewinds)
        first = int(state.step)
        if first >= step:
            raise ConfigError(f"the run began at step {first}, behind step {step}")
        with feed.Feed(run.dataset, run.batch_sharding(), first, step, logged.skips) as batches:
            for number, batch in enumerate(batches, first):
                state, metrics = run.steps[run.dataset.batch_size(number)](state, batch)
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                differing = differing or _differing(number + 1, values, logged.branch.get(number + 1, {}))
    return Replayed(origin=origin, metrics=values, differing=differing)


def _differing(step: int, values: dict[str, float], line: dict[str, Any]) -> tuple[int, str, float, float] | None:
    """The first metric that is logged and not these bits. NaN equals NaN."""
    for name, value in values.items():
        if name in line and not np.array_equal(value, line[name], equal_nan=True):
            return step, name, value, line[name]
    return None


def rows_of(dataset: feed.Dataset, step: int, skips: Skips) -> list[dict[str, Any]]:
    """What the step's batch holds, a JSON value for each row: its global number, where it lies in which task, its
    tokens and their text.
    """
    begin, batch = dataset.first_row(step, skips), dataset.read(step, skips)
    rows = []
    for i, (task, first, end) in enumerate(dataset.locate(step, skips)):
        targets = [int(token) for token in batch.targets[i]]
        text = "".join(_texts(dataset.vocabulary, targets))
        rows.append({"row": begin + i, "task": task, "tokens": [first, end], "text": text, "targets": targets})
    return rows


def _texts(vocabulary: Any, targets: Sequence[int]) -> list[str]:
    """The documents in a row, each with a line that says where it ends."""
    texts, document = [], []
    for token in targets:
        document.append(token)
        if token == vocabulary.eos_id:
            texts.append(vocabulary.decode(document) + "\n[end of document]\n")
            document = []
    return [*texts, vocabulary.decode(document)]


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="palmjax replay",
        description="Compute one step of a run again, from its event log and its nearest checkpoint, and compare every "
        "metric with the logged one, bit for bit: exit code 1 if one differs. On the mesh, the devices and the "
        "versions that the run had.",
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run's MODEL_DIR")
    parser.add_argument("--step", required=True, type=int, metavar="N", help="as metrics.jsonl counts: from 1 on")
    parser.add_argument(
        "--rewinds", type=int, metavar="K", help="the step as computed when K rewinds had been made (default: the last)"
    )
    parser.add_argument("--print_batch", action="store_true", help="print the text of every row")
    parser.add_argument("--output", metavar="FILE", help="write the rows to FILE, a line of JSON each")
    distributed.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax replay --run DIR --step N [...]`."""
    options = _flags().parse_args(sys.argv[1:] if argv is None else argv)
    folder = str(model_dir.as_path(options.run))
    with distributed.session(options):
        logged = find(folder, options.step, options.rewinds)
        run = open_run(folder, logged)
        if jax.process_index() == 0:
            _say_what_differs(run, logged)
            rows = rows_of(run.dataset, options.step - 1, logged.skips)
            print(f"step {options.step} read rows {rows[0]['row']}..{rows[-1]['row'] + 1}")
            _show(rows, options)
        found = replay(run, logged, guard.read_rewinds(folder))
        if jax.process_index() == 0:
            _report(found, logged)
    return 0 if found.differing is None else 1


def _show(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    if options.print_batch:
        for row in rows:
            print(f"--- row {row['row']}: {row['task']}, tokens {row['tokens'][0]}..{row['tokens'][1]}\n{row['text']}")
    if options.output:
        try:
            Path(options.output).write_text("".join(json.dumps(row) + os.linesep for row in rows))
        except OSError as error:
            raise ConfigError(f"--output={options.output} can't be written: {error.strerror}") from error


def _say_what_differs(run: Run, logged: Logged) -> None:
    """Warns of what may give other bits."""
    mesh, code = dict(run.mesh.shape), provenance.code_version()
    if mesh != logged.start["mesh"]:
        print(f"note: the mesh was {logged.start['mesh']} and is {mesh}: sums in another order", file=sys.stderr)
    if code["source"] != logged.start["code"]["source"]:
        print("note: palmjax's source is not that of the run", file=sys.stderr)


def _report(found: Replayed, logged: Logged) -> None:
    step, loss = logged.line["step"], logged.line["loss"]
    print(f"from {found.origin}: loss {found.metrics['loss']!r} at step {step}, logged {loss!r}")
    if found.differing is None:
        print(f"all {len(found.metrics)} metrics have the logged bits")
    else:
        at, name, value, was = found.differing
        print(f"{name} of step {at} is {value!r} and was logged as {was!r}")


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
