"""`palmjax eval`: held-out loss, or a suite of tasks, of one checkpoint or of all as they appear; compare; verify."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from palmjax.config import ConfigError, DatasetConfig, Experiment
from palmjax.data import feed
from palmjax.evaluation import watch
from palmjax.evaluation.heldout import HeldOut
from palmjax.evaluation.tasks import Suite
from palmjax.progress import Progress
from palmjax.provenance import RunInfo

EXAMPLES = """
examples
  palmjax eval --checkpoint runs/first
  palmjax eval --checkpoint runs/first --tasks gin/eval/open_llm.gin --gin.TASKS_DIR=/data/eval --limit 200
  palmjax eval --checkpoint runs/first --tasks gin/eval/open_llm.gin --gin.TASKS_DIR=/data/eval --watch
  palmjax eval compare runs/a/eval/open_llm/checkpoint_1000 runs/b/eval/open_llm/checkpoint_1000
  palmjax eval verify runs/a/eval/open_llm/checkpoint_1000
"""


def _flags() -> argparse.ArgumentParser:
    from palmjax import configure, distributed

    parser = argparse.ArgumentParser(
        prog="palmjax eval",
        description="Held-out loss, bits per byte and token accuracy of a checkpoint, on any mesh; with --tasks, its "
        "scores on a suite of benchmarks, with their error bars and a manifest. The configuration is the checkpoint's "
        "own; gin files and bindings change it and the suite's.",
        epilog=configure.USAGE + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint_N folder, or a MODEL_DIR: its newest")
    add("--json", action="store_true", help="print the numbers as JSON")
    add("--output", metavar="PATH", help="held-out: append the JSON to this file too; --tasks: the result's folder")
    held_out = parser.add_argument_group("held-out loss")
    held_out.add_argument("--batch_size", type=int, metavar="N", help="rows a batch over all devices (EVAL_BATCH_SIZE)")
    held_out.add_argument("--max_batches", type=int, metavar="N", help="score the first N batches only")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", metavar="FILE.gin", help="a suite, such as gin/eval/open_llm.gin")
    tasks.add_argument("--limit", type=int, metavar="N", help="documents of each task: a fair sample, by hash")
    tasks.add_argument("--formats", type=int, metavar="N", help="score under N equivalent prompt formats too")
    tasks.add_argument("--contamination", metavar="STORE", help="look for the documents' 13-grams in a token store")
    tasks.add_argument("--watch", action="store_true", help="evaluate every checkpoint of MODEL_DIR as it appears")
    tasks.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="--watch: end without a new one")
    distributed.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax eval --checkpoint DIR [...]`, `palmjax eval compare A B`, `palmjax eval verify RESULT`."""
    from palmjax import configure, distributed

    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return _compare(argv[1:])
    if argv[:1] == ["verify"]:
        return _verify(argv[1:])
    flags, rest = configure.parse_flags(argv)
    options = _flags().parse_args(rest)
    _check_options(options)
    with distributed.session(options):
        return _held_out(options, flags) if options.tasks is None else _tasks(options, flags)


def _check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for a flag that has no meaning beside the others."""
    wrong = (
        ("batch_size", "max_batches") if options.tasks is not None else ("limit", "formats", "contamination", "watch")
    )
    given = [f"--{name}" for name in wrong if getattr(options, name) not in (None, False)]
    if given:
        raise ConfigError(f"{given[0]} has no effect {'with' if options.tasks is not None else 'without'} --tasks")


# --- held-out loss ---------------------------------------------------------------------------------------------------


def _dataset_config(experiment: Experiment, batch_size: int | None) -> DatasetConfig:
    config = experiment.train_eval_dataset
    if config is None:
        raise ConfigError(
            "Experiment.train_eval_dataset is None: --gin.Experiment.train_eval_dataset=@train_eval/DatasetConfig()"
        )
    if batch_size is None:
        return config
    if batch_size < 1:
        raise ConfigError(f"--batch_size={batch_size}: must be at least 1")
    return dataclasses.replace(config, batch_size=batch_size)


def _held_out(options: argparse.Namespace, flags: Any) -> int:
    """Prints the held-out numbers of one checkpoint."""
    from palmjax import checkpoint, configure, model_dir, trained

    path = model_dir.resolve(options.checkpoint)
    info = checkpoint.read_info(path)
    with trained.config_file(path, info) as file:
        experiment = configure.load([file, *flags.files], flags.bindings, flags.search_paths).experiment
    trained.enable_compilation_cache(experiment.train.compilation_cache)
    opened = trained.open_checkpoint(path, info, experiment)
    dataset = feed.open_dataset(_dataset_config(experiment, options.batch_size))
    checkpoint.check_vocabulary(path, info, dataset.vocabulary)
    heldout = HeldOut(dataset, opened.model, opened.mesh, experiment.sharding)
    params = opened.params()
    began = time.perf_counter()
    primary = jax.process_index() == 0
    title = f"evaluating on {heldout.task} ({heldout.split})"
    with Progress(title, unit="batches") if primary else contextlib.nullcontext() as progress:
        result = heldout.run(params, options.max_batches, progress)
    record = {
        "checkpoint": path,
        "step": info.step,
        "task": heldout.task,
        "split": heldout.split,
        **result.metrics(),
        "seconds": time.perf_counter() - began,
    }
    if primary:
        _write(record, options.json, options.output)
    return 0


def _report(record: dict[str, Any]) -> str:
    """The held-out numbers for people."""
    lines = [
        f"{record['checkpoint']} (step {record['step']:,}) on {record['task']} ({record['split']})",
        f"  held-out loss   {record['loss']:.5f} nats a token",
        f"  bits per byte   {record['bits_per_byte']:.5f}" if "bits_per_byte" in record else "",
        f"  token accuracy  {100 * record['accuracy']:.3f} %",
        f"  tokens          {record['tokens']:,.0f}",
        f"  bytes           {record['bytes']:,.0f}",
        f"  seconds         {record['seconds']:.1f}",
    ]
    return "\n".join(line for line in lines if line)


def _write(record: dict[str, Any], as_json: bool, output: str | None) -> None:
    line = json.dumps(record)
    print(line if as_json else _report(record), flush=True)
    if output is not None:
        try:
            with open(output, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise ConfigError(f"--output={output} can't be written: {error.strerror}") from error


# --- tasks -----------------------------------------------------------------------------------------------------------


def _tasks(options: argparse.Namespace, flags: Any) -> int:
    """Evaluates a suite on one checkpoint, or on all of a MODEL_DIR as they appear."""
    from palmjax import model_dir
    from palmjax.evaluation import results

    bindings = [
        *([f"Suite.limit={options.limit}"] if options.limit is not None else []),
        *([f"Suite.formats={options.formats}"] if options.formats is not None else []),
        *([f"Suite.contamination={options.contamination!r}"] if options.contamination is not None else []),
    ]
    name = Path(options.tasks).stem
    opener = watch.Opener(_loader([options.tasks], flags, bindings))
    if options.watch:
        folder = Path(options.output or model_dir.as_path(options.checkpoint) / "eval" / name)
        return watch.follow(options.checkpoint, folder, opener, timeout=options.timeout)
    path = model_dir.resolve(options.checkpoint)
    folder = Path(options.output or Path(path).parent / "eval" / name / Path(path).name)
    result = opener.evaluate(path, folder)
    if jax.process_index() == 0:
        print(json.dumps(result) if options.json else results.table(result), flush=True)
        print(f"{folder / results.RESULT}", file=sys.stderr, flush=True)
    return 0


def _loader(suite_files: Sequence[str], flags: Any, bindings: Sequence[str] = ()) -> watch.Load:
    """How a checkpoint's suite and experiment come of the command line. bindings: those of other flags.

    It raises ConfigError for a change of the task that was trained on: the tokenizer would be that task's.
    """
    from palmjax import configure, trained

    def load(path: str, info: RunInfo) -> tuple[Suite, str, Experiment]:
        given = [*flags.bindings, *bindings]
        with trained.config_file(path, info) as file:
            own = configure.load([file]).experiment.train_dataset
            files = [file, *flags.files]
            suite, loaded = configure.load_with(Suite, suite_files, files, given, flags.search_paths)
        changed = loaded.experiment.train_dataset
        if (own.tasks, own.mixture_or_task_name) != (changed.tasks, changed.mixture_or_task_name):
            kind = info.vocabulary.to_json()["kind"]
            raise ConfigError(
                f"{path}: prompts are tokenized by the checkpoint's own vocabulary ({kind}): the task that it was "
                "trained on, and with it the tokenizer, can't be changed beside --tasks"
            )
        return suite.value, suite.operative, loaded.experiment

    return load


def _compare(argv: Sequence[str]) -> int:
    from palmjax.evaluation import compare

    parser = argparse.ArgumentParser(
        prog="palmjax eval compare",
        description="The paired difference of two results on the same documents: standard error over clusters, "
        "bootstrap interval, McNemar's test. A and B are ranked only where both intervals leave out 0.",
    )
    parser.add_argument("first", metavar="A", help="a result's folder or its result.json")
    parser.add_argument("second", metavar="B", help="the other")
    options = parser.parse_args(argv)
    print(compare.report(compare.compare(options.first, options.second), options.first, options.second))
    return 0


def _verify(argv: Sequence[str]) -> int:
    from palmjax import configure, distributed, model_dir
    from palmjax.evaluation import results, verify

    parser = argparse.ArgumentParser(
        prog="palmjax eval verify",
        description="Makes every hash of a result's manifest again, asks the checkpoint some of its requests anew, and "
        "says what is not as it was. Exit code 1 if anything is not.",
    )
    parser.add_argument("result", metavar="RESULT", help="a result's folder or its result.json")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="log-likelihoods to compute again (32)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of which ones (0)")
    parser.add_argument("--checkpoint", metavar="DIR", help="where the checkpoint is now, if it was moved")
    distributed.add_flags(parser)
    flags, rest = configure.parse_flags(argv)
    options = parser.parse_args(rest)
    with distributed.session(options):
        folder, content = results.read(options.result)
        with tempfile.TemporaryDirectory(prefix="palmjax-") as where:
            file = Path(where) / "suite.gin"
            file.write_text(content["manifest"]["suite"])
            opener = watch.Opener(_loader([str(file)], flags))
            path = model_dir.resolve(options.checkpoint or content["manifest"]["checkpoint"]["path"])
            found = verify.verify(folder, content["manifest"], opener, path, options.requests, options.seed)
        if jax.process_index() == 0:
            print("\n".join(found.lines), flush=True)
        return 0 if found.holds else 1


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
