"""What a run leaves behind: a result file with its manifest, a line for each document, a table for people. No jax.

OUTPUT/result.json          the table's numbers and the manifest; no times, so equal runs write equal bytes
OUTPUT/<task>.jsonl         a document a line, in hash order: its prompt's hash, replies and values
OUTPUT/answers.jsonl        the model's answers as they came; a run that was cut off goes on from them
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palmjax.config import ConfigError
from palmjax.evaluation.evaluate import Outcome
from palmjax.evaluation.forms import Answered, Reply
from palmjax.evaluation.prompts import Prompt
from palmjax.evaluation.score import Metric
from palmjax.evaluation.stats import Estimate
from palmjax.evaluation.store import Answer
from palmjax.files import write_whole

RESULT = "result.json"
Contamination = Mapping[str, Sequence[bool | None]]
"""By task: of each document, whether the training set holds it; None where that can't be told."""


def estimate_json(found: Estimate) -> dict[str, Any]:
    """As JSON; what is not known is null."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in dataclasses.asdict(found).items()}


def result_json(
    outcomes: Sequence[Outcome], manifest: Mapping[str, Any], contamination: Contamination | None = None
) -> dict[str, Any]:
    """The content of result.json."""
    tasks = {}
    for one in outcomes:
        tasks[one.name] = {
            "headline": one.headline,
            "metrics": {name: estimate_json(found) for name, found in one.estimates.items()},
            "metric": _metric(one),
            "chance": one.chance,
            "normalised": one.normalised,
            "formats": {"scores": list(one.formats), "spread": one.spread},
            "groups": {group: estimate_json(found) for group, found in one.groups.items()},
            "counters": dict(one.counters),
        }
        if contamination is not None:
            tasks[one.name]["contamination"] = _clean_and_dirty(one, contamination[one.name])
    return {"tasks": tasks, "manifest": manifest}


def _metric(one: Outcome) -> dict[str, Any]:
    """What the headline is: sum(top) / sum(bottom) of the documents' values, if it is such a ratio; whether more of it
    is better (1) or less (-1); whether it is shown as a percentage.
    """
    metric = next((m for m in one.asked.documents.task.form.metrics if m.name == one.headline), None)
    ratio = (
        {"top": metric.top, "bottom": metric.bottom} if isinstance(metric, Metric) else {"top": None, "bottom": None}
    )
    return {**ratio, "better": getattr(metric, "better", 1), "percent": getattr(metric, "percent", False)}


def _clean_and_dirty(one: Outcome, dirty: Sequence[bool | None]) -> dict[str, Any]:
    """The headline of the documents that the training set holds, of those that it does not, and how many are which."""
    form = one.asked.documents.task.form
    found: dict[str, Any] = {"unknown": sum(flag is None for flag in dirty)}
    for name, wanted in (("clean", False), ("dirty", True)):
        part = [answered for answered, flag in zip(one.answered, dirty, strict=True) if flag is wanted]
        found[name] = estimate_json(form.estimates(part)[one.headline]) if part else None
    return found


def document_json(prompt: Prompt, answered: Answered, dirty: bool | None = None) -> dict[str, Any]:
    """A document's line."""
    document = prompt.document
    return {
        "id": document.id,
        "where": document.where,
        "cluster": document.cluster,
        "group": document.group,
        "prompt": prompt.hash,
        "shots": list(prompt.shots),
        "counts": dict(prompt.counts),
        "replies": [reply_json(reply) for reply in answered.replies],
        "values": dict(answered.values),
        "contaminated": dirty,
    }


def reply_json(reply: Reply) -> list[Any]:
    """[nats, greedy, tokens] of a likelihood; [text, finished] of a text."""
    if isinstance(reply, Answer):
        return [reply.log_likelihood, reply.greedy, reply.tokens]
    return [reply.text, reply.finished]


def write(
    folder: Path, outcomes: Sequence[Outcome], manifest: Mapping[str, Any], contamination: Contamination | None = None
) -> dict[str, Any]:
    """Writes the documents' lines, then result.json, each whole or not at all; returns the latter's content."""
    for one in outcomes:
        dirty = [None] * len(one.answered) if contamination is None else contamination[one.name]
        lines = (
            json.dumps(document_json(prompt, answered, flag)) + "\n"
            for prompt, answered, flag in zip(one.asked.prompts, one.answered, dirty, strict=True)
        )
        write_whole(folder / f"{one.name}.jsonl", "".join(lines))
    result = result_json(outcomes, manifest, contamination)
    write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def read(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """(folder, content) of a result.json, named itself or by its folder. Raises ConfigError if it is none."""
    file = Path(path) / RESULT if Path(path).is_dir() else Path(path)
    try:
        result = json.loads(file.read_text())
        if not isinstance(result["tasks"], dict) or not isinstance(result["manifest"], dict):
            raise ValueError("it has no tasks and manifest")
    except OSError as error:
        raise ConfigError(f"there is no result {file}: {error.strerror}; palmjax eval --tasks writes one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no result of palmjax eval: {error}") from error
    return file.parent, result


def read_documents(folder: Path, task: str) -> list[dict[str, Any]]:
    """A task's lines. Raises ConfigError if they are missing or damaged."""
    file = folder / f"{task}.jsonl"
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error


# --- for people ------------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The result as a table: score, standard error, 95 % interval, spread over formats, expected calibration error (of
    multiple choice), and whatever was counted.
    """
    rows = [["task", "documents", "metric", "score", "± SE", "95 % interval", "formats", "ECE", "counted"]]
    for name, task in result["tasks"].items():
        found = task["metrics"][task["headline"]]
        scale = 100 if task["metric"]["percent"] else 1
        formats, spread = task["formats"]["scores"], task["formats"]["spread"]
        spread_text = (
            ""
            if spread is None
            else (f"{scale * float(np.mean(formats)):.2f} ± {scale * spread:.2f} of {len(formats)}")
        )
        rows.append(
            [
                name,
                f"{found['n']:,}",
                task["headline"] + (" %" if scale == 100 else ""),
                _number(found["value"], scale),
                _number(found["error"], scale),
                f"[{_number(found['low'], scale)}, {_number(found['high'], scale)}]",
                spread_text,
                ""
                if (ece := task["metrics"].get("ece")) is None
                else f"{_number(ece['value'], 1)} ± {_number(ece['error'], 1)}",
                ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in task["counters"].items() if count),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = [column for column, width in enumerate(widths) if any(row[column] for row in rows[1:])]
    lines = ["  ".join(row[c].ljust(widths[c]) for c in shown).rstrip() for row in rows]
    lines += _contamination_lines(result)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _contamination_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, task in result["tasks"].items():
        if (found := task.get("contamination")) is None:
            continue
        scale = 100 if task["metric"]["percent"] else 1
        parts = [
            f"{which} {_number(found[which]['value'], scale)} ({found[which]['n']:,})"
            for which in ("clean", "dirty")
            if found[which] is not None
        ]
        told = f", {found['unknown']:,} too short to tell" if found["unknown"] else ""
        lines.append(f"{name}: 13-grams in the training set: {', '.join(parts) or 'none told'}{told}")
    return lines


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{scale * value:.2f}" if scale == 100 else f"{value:.4g}"
