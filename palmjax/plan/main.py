"""`palmjax plan FILE.gin --topology v4:12x16x16 --slices 2`: the verb."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from palmjax import configure
from palmjax.config import ConfigError
from palmjax.plan import build, chips, compiler, report, topology


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
    add("--topology", metavar="CHIP:SHAPE", help="v4:12x16x16, v5e:16x16, h200:8, cpu:8, ...")
    add("--slices", type=int, default=1, metavar="N", help="equal slices joined by the data centre's network (1)")
    add("--batch_size", type=int, metavar="ROWS", help="rows a step (default: the run's largest batch)")
    add("--output", metavar="DIR", help="write plan.json and plan.png here")
    add("--json", action="store_true", help="print the plan as JSON")
    add("--cache", default=compiler.CACHE, metavar="DIR", help=f"compiled steps ({compiler.CACHE})")
    add("--timeout", type=float, default=3600, metavar="SECONDS", help="give a compilation up after this (3600)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Plans one job. Returns 0 if it fits, 1 if not or if the compiler failed."""
    flags, rest = configure.parse_flags(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(rest)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this process computes shapes only; the compiler has its own
    if options.topology is None:
        raise ConfigError(f"--topology is missing: for which machine? For example {topology.EXAMPLES}")
    target = topology.parse(options.topology, options.slices)
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch_size={options.batch_size}: must be at least 1")
    experiment = configure.load(flags.files, flags.bindings, flags.search_paths, placeholders=True).experiment
    print(f"compiling for {target} ...", file=sys.stderr, flush=True)
    try:
        plan = build.compile(experiment, target, rows=options.batch_size, cache=options.cache, timeout=options.timeout)
    except compiler.CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(plan, options.output)
    print(json.dumps(plan.to_json()) if options.json else report.text(plan), end="\n" if options.json else "")
    return 0 if plan.fits else 1


def write(plan: build.Plan, folder: str | None) -> None:
    """plan.json and plan.png in `folder`, if one is given. Raises ConfigError if it can't be written."""
    if folder is None:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "plan.json"), "w") as file:
            json.dump(plan.to_json(), file, indent=1)
        report.picture(plan, os.path.join(folder, "plan.png"))
    except OSError as error:
        raise ConfigError(f"--output={folder} can't be written: {error.strerror}") from error
