"""`palmjax plan FILE.gin --topology v4:12x16x16 --slices 2`: the verb."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from palmjax import configure
from palmjax.config import ConfigError, Experiment, MeshConfig
from palmjax.configure.text import shipped_folders
from palmjax.plan import build, check, chips, compiler, layouts, remedies, report, search, topology
from palmjax.progress import Progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="palmjax plan",
        usage="palmjax plan FILE.gin --topology CHIP:SHAPE [--slices N] [--search | --check] [--gin.KEY=VALUE ...]",
        description="Compile a job's train step for a machine that need not be there: does it fit, how long is a step, "
        "where does the time go, which layout is best.",
        epilog=f"chips: {', '.join(chips.KEYS)}\n\n{configure.USAGE}\n"
        "example: palmjax plan gin/exp/palm_540b.gin --topology v4:12x16x16 --slices 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE.gin", help=argparse.SUPPRESS)  # one right after --check or another switch
    add("--topology", metavar="CHIP:SHAPE", help="v4:12x16x16, v5e:16x16, h200:8, cpu:8, ...")
    add("--slices", type=int, default=1, metavar="N", help="equal slices joined by the data centre's network (1)")
    add("--batch_size", type=int, metavar="ROWS", help="rows a step (default: the run's largest batch)")
    add("--output", metavar="DIR", help="write plan.json and plan.png here")
    add(
        "--remedies",
        type=int,
        default=1,
        metavar="N",
        help="for a step that does not fit, compile changes until N fit (1)",
    )
    add("--search", action="store_true", help="compile the likeliest layouts and rank them")
    add("--budget", type=int, default=12, metavar="K", help="layouts a search compiles (12)")
    add("--jobs", type=int, default=2, metavar="N", help="compilers side by side (2)")
    add("--batch_sizes", metavar="A,B", help="batches a search tries, rows (default: the run's largest)")
    add("--check", action="store_true", help="hold each FILE.gin against the plan in its header")
    add("--update", action="store_true", help="with --check: write the new figures into the headers")
    add("--json", action="store_true", help="print the plan as JSON")
    add("--cache", default=compiler.CACHE, metavar="DIR", help=f"compiled steps ({compiler.CACHE})")
    add("--timeout", type=float, default=3600, metavar="SECONDS", help="give a compilation up after this (3600)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Plans one job, searches its layouts, or checks files. Returns 0 if all fits, 1 if not or the compiler failed."""
    flags, rest = configure.parse_flags(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(rest)
    if wrong := [file for file in options.files if not file.endswith(".gin")]:
        raise ConfigError(f"{wrong[0]}: plans are made of gin files")
    flags = dataclasses.replace(flags, files=(*options.files, *flags.files))
    if not os.environ.get("JAX_PLATFORMS"):  # this process computes shapes only: leave any accelerator alone
        jax.config.update("jax_platforms", "cpu")
        os.environ["JAX_PLATFORMS"] = "cpu"  # for the compilers
    if options.update and not options.check:
        raise ConfigError("--update goes with --check")
    if options.check:
        if options.topology is not None or options.search:
            raise ConfigError("--check takes topologies from the files' headers: no --topology, no --search")
        return check.check(flags.files, functools.partial(replan, options.cache, options.timeout), options.update)
    if options.topology is None:
        raise ConfigError(f"--topology is missing: for which machine? For example {topology.EXAMPLES}")
    for name in ("batch_size", "budget", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value}: must be at least 1")
    if options.remedies < 0:
        raise ConfigError(f"--remedies={options.remedies}: must be 0 (compile none) or more")
    target = topology.parse(options.topology, options.slices)
    try:
        experiment = configure.load(flags.files, flags.bindings, flags.search_paths, placeholders=True).experiment
    except ConfigError as error:
        if _model_alone(flags):
            raise ConfigError(_completed(flags.files[-1], options.topology)) from error
        raise
    if options.output is not None:
        _make_folder(options.output)  # what can't be written is told before minutes of compiling
    if options.search:
        return _search(experiment, target, flags, options)
    if experiment.mesh == MeshConfig() and target.devices > 1:
        print("note: no mesh is set, so every device holds all parameters (MeshConfig.data = -1)", file=sys.stderr)
    print(f"compiling for {target} ...", file=sys.stderr, flush=True)
    try:
        plan = build.compile(experiment, target, rows=options.batch_size, cache=options.cache, timeout=options.timeout)
    except compiler.CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.json:
        print(report.text(plan), end="", flush=True)
        if plan.time is not None and not plan.options and (fast := layouts.FAST.get(target.key)):
            print(f"  note: compiled without flags; often faster with LIBTPU_INIT_ARGS='{fast}'")
    changes = _remedies(experiment, target, plan, options)
    found = plan.to_json() | {"to_fit": [remedy.to_json() for remedy in changes]}
    _write(plan, found, options.output)
    if options.json:
        print(json.dumps(found))
    elif not plan.fits and plan.hbm_bytes is not None:
        print("\nTO FIT  the best first")
        print("\n".join(remedies.lines(changes)) or f"  {remedies.least(experiment, target, plan)}")
    return 0 if plan.fits else 1


def _model_alone(flags: configure.Flags) -> bool:
    """Whether the files make a model and nothing else."""
    try:
        configure.load_model(flags.files, (), flags.search_paths)
    except ConfigError:
        return False
    return True


def _completed(model: str, target: str) -> str:
    """What to plan instead of the file of a model: the shipped run of that name, or a command line."""
    name = os.path.basename(model)
    shipped = Path(shipped_folders()[1], "exp", name).is_file()
    parts = f"palmjax plan run/train.gin {shlex.quote(model)} optim/palm_adafactor.gin data/jsonl.gin mesh/fsdp.gin"
    needed = f"--topology {target} --gin.BATCH_SIZE=512 --gin.TRAIN_STEPS=100000"
    return (
        f"{model} is a model alone, without mesh, batch and data; plan "
        + (f"gin/exp/{name}, or, with values of your own:" if shipped else "a run of it:")
        + f"\n  {parts} {needed} --gin.TASK_FEATURE_LENGTHS='{{\"targets\": 2048}}'"
    )


def _remedies(
    experiment: Experiment, target: topology.Topology, plan: build.Plan, options: argparse.Namespace
) -> list[remedies.Remedy]:
    """What would make a step fit that does not; nothing for one that does."""
    if plan.fits or plan.hbm_bytes is None:
        return []
    return remedies.proved(
        experiment,
        target,
        plan,
        wanted=options.remedies,
        cache=options.cache,
        timeout=options.timeout,
        progress=lambda words: print(f"does not fit; {words} ...", file=sys.stderr, flush=True),
    )


def replan(cache: str, timeout: float, path: str, arguments: str) -> build.Plan:
    """The plan that a recorded command gives now, for the file at `path`."""
    flags, rest = configure.parse_flags(shlex.split(arguments))
    options = dict(zip(rest[::2], rest[1::2], strict=False))
    known = {"--topology", "--slices", "--batch_size"}
    numbers = all(options[name].isdigit() for name in ("--slices", "--batch_size") if name in options)
    if "--topology" not in options or set(options) - known or len(rest) % 2 or not numbers or len(flags.files) != 1:
        raise ConfigError(
            f"{path}: a recorded plan takes --topology, --slices, --batch_size and --gin.*, not {arguments}"
        )
    target = topology.parse(options["--topology"], int(options.get("--slices", 1)))
    experiment = configure.load([path], flags.bindings, flags.search_paths, placeholders=True).experiment
    rows = int(options["--batch_size"]) if "--batch_size" in options else None
    return build.compile(experiment, target, rows=rows, options="", cache=cache, timeout=timeout)


def _search(experiment: Experiment, target: topology.Topology, flags: configure.Flags, options: Any) -> int:
    rows = _rows(options)
    with Progress("compiling layouts", unit="layouts", line_period=0) as progress:
        result = search.search(
            experiment,
            target,
            rows=rows,
            budget=options.budget,
            jobs=options.jobs,
            cache=options.cache,
            timeout=options.timeout,
            progress=lambda done, total, newest: progress(done, total, search.progress_line(newest)),
        )
    print(search.table(result))
    text = search.winner(result, flags.files, [configure.as_gin(binding) for binding in flags.bindings])
    print(text, end="")
    best = result.best
    if options.output and best is not None and best.plan is not None:
        _write(best.plan, best.plan.to_json(), options.output)
        with open(os.path.join(options.output, "best.gin"), "w") as file:
            file.write(text)
        report.pareto(result, os.path.join(options.output, "pareto.png"))
    return 0


def _rows(options: Any) -> list[int] | None:
    if options.batch_sizes is None:
        return None if options.batch_size is None else [options.batch_size]
    try:
        rows = [int(part) for part in options.batch_sizes.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1:
        raise ConfigError(f"--batch_sizes={options.batch_sizes}: numbers of rows, as in 1024,2048")
    return rows


def _make_folder(output: str) -> None:
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output={output} can't be written: {error.strerror}") from error


def _write(plan: build.Plan, values: dict[str, Any], folder: str | None) -> None:
    """plan.json (`values`) and plan.png in `folder`, if one is given. Raises ConfigError if it can't be written."""
    if folder is None:
        return
    try:
        with open(os.path.join(folder, "plan.json"), "w") as file:
            json.dump(values, file, indent=1)
        report.picture(plan, os.path.join(folder, "plan.png"))
    except OSError as error:
        raise ConfigError(f"--output={folder} can't be written: {error.strerror}") from error
