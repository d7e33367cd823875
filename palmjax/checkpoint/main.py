"""`palmjax checkpoint verify|list|diff|prune DIR`: the verb. It needs no model and no gin file."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence

from palmjax import model_dir
from palmjax.checkpoint import inspect, keep, seal
from palmjax.checkpoint.reading import read_info
from palmjax.config import ConfigError
from palmjax.model_dir import PREFIX, as_path

DESCRIPTION = """Look after the checkpoints of a run.

  verify DIR     read every file and every array of a checkpoint, or of all in a MODEL_DIR, and compare them with the
                 checksums recorded when they were saved; exit code 1 if one is damaged
  list DIR       the checkpoints of a MODEL_DIR: step, size, time, held-out metrics, version
  diff A B       each array's largest difference, and what else differs; exit code 1 if anything does (0 if not)
  prune DIR      delete all but the newest --keep (and every multiple of --keep_every, and those with a file PINNED)
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="palmjax checkpoint", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="action", required=True, metavar="{verify,list,diff,prune}")
    for name in ("verify", "list"):
        verbs.add_parser(name).add_argument("dir", metavar="DIR", help="a checkpoint_N folder or a MODEL_DIR")
    differ = verbs.add_parser("diff")
    differ.add_argument("a", metavar="A", help="a checkpoint_N folder, or a MODEL_DIR: its newest")
    differ.add_argument("b", metavar="B")
    differ.add_argument("--all", action="store_true", help="list equal arrays too")
    prune = verbs.add_parser("prune")
    prune.add_argument("dir", metavar="DIR", help="a MODEL_DIR that no run is using")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="how many of the newest stay")
    prune.add_argument("--keep_every", "--keep-every", type=int, metavar="K", help="multiples of K stay too")
    prune.add_argument("--dry_run", "--dry-run", action="store_true", help="say what would go, and delete nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if `verify` found damage or `diff` a difference. Raises ConfigError for what can't be read."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    match options.action:
        case "verify":
            return _verify(options.dir)
        case "list":
            return _list(options.dir)
        case "diff":
            return _diff(options.a, options.b, options.all)
        case _:
            return _prune(options.dir, options.keep, options.keep_every, options.dry_run)


def _checkpoints(given: str) -> list[str]:
    """The checkpoint folders that DIR means, whole or not, by step."""
    path = as_path(given)
    if re.fullmatch(rf"{PREFIX}\d+", path.name) or (path / "info").is_dir():
        if not path.is_dir():
            raise ConfigError(model_dir.absence(path))
        return [str(path)]
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}: expected a {PREFIX}N folder or a MODEL_DIR that holds some")
    found = [(int(m[1]), p) for p in path.iterdir() if (m := re.fullmatch(rf"{PREFIX}(\d+)", p.name))]
    if not found:
        raise ConfigError(f"{path} holds no checkpoint")
    return [str(p) for _, p in sorted(found, key=lambda pair: pair[0])]


def _verify(given: str) -> int:
    damaged = 0
    for folder in _checkpoints(given):
        began = time.monotonic()
        try:
            verdict = inspect.verify(folder)
        except model_dir.Unreadable as error:
            damaged += 1
            print(f"{folder}: NOT READ\n  {str(error).splitlines()[0]}")
            continue
        damaged += bool(verdict.problems)
        if verdict.problems:
            print(f"{folder}: DAMAGED")
        else:
            seconds = time.monotonic() - began
            what = f"{verdict.files} files, {verdict.arrays} arrays, {_size(verdict.bytes)}"
            print(f"{folder}: as it was saved ({what}; {seconds:.1f} s)")
        for line in (*verdict.problems, *(f"note: {note}" for note in verdict.notes)):
            print(f"  {line}")
    return 1 if damaged else 0


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"


def _list(given: str) -> int:
    folders = _checkpoints(given)
    print(f"{'step':>10}  {'size':>9}  {'saved':16}  {'row of the data':>15}  held-out; code")
    for folder in folders:
        path = as_path(folder)
        try:
            info, listed = read_info(folder), seal.read(path)
        except ConfigError as error:
            print(f"{path.name.removeprefix(PREFIX):>10}  {str(error).splitlines()[0]}")
            continue
        size = sum(size for size, _ in listed.values()) if listed else 0
        saved = (path / "commit_success.txt").stat()
        stamp = getattr(saved, "st_mtime", None) or getattr(saved, "mtime", 0)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp))
        scores = "  ".join(f"{name} {value:.4g}" for name, value in info.metrics.items()) or "-"
        code = info.code.get("commit", info.code.get("source", ""))[:12]
        pinned = "  PINNED" if (path / keep.PINNED).exists() else ""
        print(
            f"{info.step:>10}  {_size(size) if size else '-':>9}  {when:16}  {info.data.first_row:>15,}  "
            f"{scores}; {info.code.get('palmjax', '')} {code}{pinned}"
        )
    return 0


def _diff(a: str, b: str, everything: bool) -> int:
    changes, others = inspect.diff(model_dir.resolve(a), model_dir.resolve(b))
    for change in changes:
        if change.before != change.after:
            print(f"{change.name}: {change.before or 'not there'} -> {change.after or 'not there'}")
        elif not change.same:
            largest = f"{change.largest:.3g}" if change.largest else "0 (other bits of equal values)"
            print(f"{change.name} {change.before}: largest difference {largest}")
        elif everything:
            print(f"{change.name} {change.before}: equal")
    equal = sum(change.same for change in changes)
    print(f"{equal} of {len(changes)} arrays are equal, bit for bit")
    for line in others:
        print(line)
    return 0 if equal == len(changes) and not others else 1


def _prune(given: str, newest: int, every: int | None, dry_run: bool) -> int:
    folder = as_path(given)
    if newest < 1 or (every is not None and every < 1):
        raise ConfigError("--keep and --keep_every are 1 or more")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    if not any(path.name.startswith(PREFIX) for path in folder.iterdir()):
        raise ConfigError(f"{folder} holds no checkpoint; prune takes a MODEL_DIR")
    with model_dir.lock(given):
        gone, stay = keep.prune(given, keep=newest, keep_every=every, dry_run=dry_run)
    word = "would delete" if dry_run else "deleted"
    for name, which in ((word, gone), ("kept", stay)):
        print(f"{name} {len(which)}: {', '.join(f'{PREFIX}{step}' for step in which) or '-'}")
    return 0
