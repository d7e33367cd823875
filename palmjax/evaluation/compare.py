"""Two results on the same documents: the paired difference, ranked only where the interval allows it. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from palmjax.config import ConfigError
from palmjax.evaluation import results, stats


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of one task: B minus A in its headline. metric: what that is, as in result.json. same_prompts: whether both were
    asked the very same texts and ids.
    """

    task: str
    headline: str
    first: float
    second: float
    paired: stats.Paired
    metric: Mapping[str, Any]
    same_prompts: bool

    @property
    def verdict(self) -> str:
        """ "A", "B", or "no ranking" while 0 is inside an interval of the difference."""
        if not self.paired.decided:
            return "no ranking"
        return "B" if self.paired.difference.value * self.metric["better"] > 0 else "A"


def compare(first: str | Path, second: str | Path) -> list[Comparison]:
    """Every task that both results have. Raises ConfigError if there is none, or if its documents differ."""
    (folder1, one), (folder2, two) = results.read(first), results.read(second)
    shared = [name for name in one["tasks"] if name in two["tasks"]]
    if not shared:
        raise ConfigError(
            f"{folder1} and {folder2} have no task in common: {', '.join(one['tasks'])}; {', '.join(two['tasks'])}"
        )
    return [_task(name, (folder1, one), (folder2, two)) for name in shared]


def _task(name: str, one: tuple[Path, Mapping[str, Any]], two: tuple[Path, Mapping[str, Any]]) -> Comparison:
    tasks = [result["tasks"][name] for _, result in (one, two)]
    headline = tasks[0]["headline"]
    if headline != tasks[1]["headline"]:
        raise ConfigError(f"task {name!r}: the headlines differ: {headline} and {tasks[1]['headline']}")
    rows = [results.read_documents(folder, name) for folder, _ in (one, two)]
    ids = [[row["id"] for row in lines] for lines in rows]
    if ids[0] != ids[1]:
        shared = len(set(ids[0]) & set(ids[1]))
        raise ConfigError(
            f"task {name!r}: not the same documents: {len(ids[0]):,} and {len(ids[1]):,}, {shared:,} of them shared; "
            "evaluate both with one --limit and the same files"
        )
    top, bottom = tasks[0]["metric"]["top"], tasks[0]["metric"]["bottom"]
    if top is None or any(top not in row["values"] for lines in rows for row in lines):
        raise ConfigError(f"task {name!r}: {headline} is a number of all documents together; it can't be paired")

    def columns(lines: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        over = [1.0 if bottom is None else row["values"][bottom] for row in lines]
        return np.array([row["values"][top] for row in lines], np.float64), np.array(over, np.float64)

    clusters = [row["cluster"] for row in rows[0]]
    return Comparison(
        task=name,
        headline=headline,
        first=tasks[0]["metrics"][headline]["value"],
        second=tasks[1]["metrics"][headline]["value"],
        paired=stats.paired(columns(rows[0]), columns(rows[1]), clusters),
        metric=tasks[0]["metric"],
        same_prompts=all(a["prompt"] == b["prompt"] for a, b in zip(*rows, strict=True)),
    )


def report(found: list[Comparison], first: str, second: str) -> str:
    """For people: a line for each task, with the verdict."""
    lines = [f"A = {first}", f"B = {second}", ""]
    for one in found:
        scale = 100 if one.metric["percent"] else 1
        difference, drawn = one.paired.difference, one.paired.bootstrap
        unit = f"{one.headline} %" if scale == 100 else one.headline
        lines.append(f"{one.task}  {unit}: A {scale * one.first:.4g}, B {scale * one.second:.4g}")
        # A perplexity is compared by its nats.
        shown = "" if one.metric["top"] == one.headline else f" in {one.metric['top']}"
        lines.append(
            f"  B - A{shown} {scale * difference.value:+.4g} ± {scale * difference.error:.3g}, 95 % "
            f"[{scale * difference.low:+.3g}, {scale * difference.high:+.3g}], bootstrap "
            f"[{scale * drawn.low:+.3g}, {scale * drawn.high:+.3g}], {difference.n:,} documents"
        )
        if one.paired.p is not None:
            lines.append(
                f"  only A right {one.paired.first_only:,}, only B right {one.paired.second_only:,}, "
                f"McNemar p = {one.paired.p:.3g}"
            )
        if not one.same_prompts:
            lines.append("  note: not the same prompts; the difference is of model and prompt together")
        verdicts = {"A": "A is better", "B": "B is better", "no ranking": "no ranking: 0 is inside the interval"}
        lines.append(f"  {verdicts[one.verdict]}")
    return "\n".join(lines)
