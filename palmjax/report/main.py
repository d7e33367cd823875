"""`palmjax report --run DIR`: the report of a run as one HTML file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from palmjax import model_dir
from palmjax.config import ConfigError, DatasetConfig
from palmjax.files import write_whole
from palmjax.report.page import page
from palmjax.report.read import Run, read


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and prints where it lies and the run's goodput."""
    from palmjax import configure

    parser = argparse.ArgumentParser(
        prog="palmjax report",
        description="One self-contained HTML page about a run, finished or not: curves with what happened on the way, "
        "goodput by cause, results, data seen, configuration.",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="the run's MODEL_DIR")
    add("--output", metavar="FILE", help="where to write the page (DIR/report.html)")
    add("--compare", action="append", default=[], metavar="DIR", help="draw another run's loss beside; repeatable")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    run, others = read(options.run), [read(folder) for folder in options.compare]
    if run.config:
        try:
            experiment = configure.load([str(model_dir.as_path(options.run) / "config.gin")]).experiment
            run = dataclasses.replace(run, total_steps=experiment.train.steps)
            run = with_shares(run, experiment.train_dataset)
        except ConfigError as error:  # the stores lie elsewhere, or config.gin names modules that are not here
            print(f"note: without the shares of the data: {error}", file=sys.stderr)
    output = model_dir.as_path(options.output or f"{options.run}/report.html")
    try:
        write_whole(output, page(run, others))
    except OSError as error:
        raise ConfigError(f"--output {output} can't be written: {error.strerror or error}") from error
    print(f"{output}: {run.state}, step {run.steps[-1]['step'] if run.steps else 0:,}, goodput {run.goodput.share:.1%}")
    return 0


def with_shares(run: Run, config: DatasetConfig) -> Run:
    """The run with the shares of its data, from the token stores. Raises ConfigError if they are not there."""
    from palmjax.data import feed

    dataset = feed.open_dataset(config, build=False)
    return dataclasses.replace(run, row_length=dataset.sequence_length, shares=dataset.shares)
