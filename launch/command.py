"""What all launchers share: the split at `--`, palmjax's command line, and a tool run or said to be missing."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

AUTO = {"PALMJAX_DISTRIBUTED": "auto"}
"""Environment that makes palmjax take the job's addresses and ranks from the cluster."""


FINAL = (0, 2, 65)
"""Exit codes behind which starting again makes no difference: done, a mistake of the user's, stopped by the guard."""


def add_max_restarts(parser: argparse.ArgumentParser, default: int) -> None:
    """The option that all launchers share."""
    parser.add_argument(
        "--max_restarts",
        "--max-restarts",
        type=_count,
        default=default,
        metavar="N",
        help="start the job again up to N times after a preemption, a lost process, a hang or a crash; not after a "
        f"mistake in the configuration or a stop by the guard ({default})",
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and palmjax's arguments: all that follows the first `--`.

    Exits with code 2 and a line of help if there is no `--` or nothing behind it.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser.usage = f"{parser.prog} [options] -- VERB FILE.gin [--gin.KEY=VALUE ...]"
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, and run nothing")
    own, dashes, rest = given[: given.index("--")] if "--" in given else given, "--" in given, []
    if dashes:
        rest = given[given.index("--") + 1 :]
    options = parser.parse_args(own)
    if not rest:
        parser.error("put palmjax's own arguments behind `--`: ... -- train gin/exp/palm_stdlib.gin")
    return options, rest


def palmjax(arguments: Sequence[str], python: str = "python3") -> list[str]:
    """The command line that runs a verb."""
    return [python, "-m", "palmjax", *arguments]


def pairs(values: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """`["KEY=VALUE", ...]` as a dict."""
    for value in values:
        if "=" not in value or not value.split("=", 1)[0].isidentifier():
            parser.error(f"--env {value}: expected KEY=VALUE")
    return dict(value.split("=", 1) for value in values)


def as_shell(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """One line that a POSIX shell runs as `command` with `environment` added."""
    assignments = [f"{key}={shlex.quote(value)}" for key, value in (environment or {}).items()]
    return " ".join([*assignments, *map(shlex.quote, command)])


def submit(command: Sequence[str], text: str | None = None) -> int:
    """Runs a submission tool with `text` on its standard input. Returns its exit code, 127 if it is missing."""
    try:
        return subprocess.run(command, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        print(f"error: {command[0]} is not installed here; --dry_run prints what it would be given", file=sys.stderr)
        return 127
