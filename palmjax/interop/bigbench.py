"""BIG-bench's JSON tasks (Srivastava et al. 2022) as documents. Pure: config and the evaluation's documents.

A task's words (its prefixes) are in its JSON, so they are texts of each document:

    bigbench/Choices.context = "{input_prefix}{input}{listed}{output_prefix}"
    bigbench/Choices.continuation = "{choice}"
    bigbench/Task.description = "{task_prefix}"
    bigbench/Task.separator = "{separator}"
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from palmjax.config import ConfigError, require, section
from palmjax.evaluation.documents import Document, SourcePart, check_regex, digest, lookup, parse_json
from palmjax.evaluation.records import checked_scores, text_of

PREFIXES = {
    "task_prefix": ("task_prefix", ""),
    "input_prefix": ("example_input_prefix", "\nQ: "),
    "output_prefix": ("example_output_prefix", "\nA: "),
    "separator": ("few_shot_example_separator", "\n"),
}
"""Text's name here -> (its name in the JSON, what it is when the JSON has none)."""

NOTED = ("name", "canary", "metrics", "preferred_score", "stop_string", "output_regex")


@section
class BigBench(SourcePart):
    """One task.json. train_share: of its examples, by a hash of their content, kept for exemplars and not evaluated:
    BIG-bench's JSON has no train split.

    An example with `target_scores` has them as choices and scores, in the file's order; its text `listed` lists them
    where the task says so (`append_choices_to_input`). Its answers are `target`, or the choices of the highest score.
    What is generated ends before the task's `stop_string`, and the first match of its `output_regex` is compared.
    """

    file: str
    folder: str = ""
    train_share: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.train_share < 1, self, "train_share", "from 0 to below 1")

    @property
    def path(self) -> str:
        return os.path.join(os.path.expanduser(self.folder), os.path.expanduser(self.file))

    def _read(self) -> Mapping[str, Any]:
        try:
            with open(self.path, encoding="utf-8") as file:
                task = parse_json(file.read(), self.path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"BigBench.file = {self.file!r} can't be read: {error}") from error
        if not isinstance(task, Mapping) or not isinstance(task.get("examples"), list):
            raise ConfigError(
                f"{self.path}: no list of `examples`: only BIG-bench's JSON tasks can be read, not Python's"
            )
        return task

    def notes(self) -> Mapping[str, str]:
        """The task's name, canary, the metrics that its authors prefer, and what it does to outputs."""
        task = self._read()
        return {name: str(task[name]) for name in NOTED if name in task}

    def unplaced(self) -> SourcePart:
        return dataclasses.replace(self, folder="")

    def build(self, exemplars: bool) -> tuple[list[Document], list[Document]]:
        task = self._read()
        found = list(self._documents(task))
        pool = [document for document in found if int(document.id[:16], 16) < self.train_share * 2.0**64]
        kept = {document.id for document in pool}
        return [document for document in found if document.id not in kept], pool

    def _documents(self, task: Mapping[str, Any]) -> Iterator[Document]:
        prefixes = {name: text_of(task.get(key, default), key, self.path) for name, (key, default) in PREFIXES.items()}
        before = text_of(task.get("choice_prefix", "\n  choice: "), "choice_prefix", self.path)
        appended = task.get("append_choices_to_input", True)
        stop, output = self._stop(task), self._output(task)
        for number, example in enumerate(task["examples"], 1):
            where = f"{self.path}: example {number}"
            question = text_of(lookup(example, "input", where), "input", where)
            scored, target = example.get("target_scores"), example.get("target")
            if not scored and target is None:
                raise ConfigError(f"{where}: it has neither 'target' nor 'target_scores'")
            choices = tuple(scored or ())
            scores = checked_scores([*scored.values()], len(scored), "target_scores", where) if scored else ()
            if target is None:
                best = max(scores)
                target = [choice for choice, score in zip(choices, scores, strict=True) if score == best]
            answers = tuple(
                text_of(item, "target", where) for item in (target if isinstance(target, list) else [target])
            )
            for field, texts in (("target_scores", choices), ("target", answers)):
                if any(not text.strip() for text in texts):
                    raise ConfigError(f"{where}: {field} has an empty text")
            yield Document(
                id=(content := digest(example)),
                where=where,
                texts={
                    **prefixes,
                    "input": question,
                    "listed": "".join(before + choice for choice in choices) if appended else "",
                    "target": answers[0],
                },
                choices=choices,
                scores=scores,
                answers=answers,
                stop=stop,
                output=output,
                cluster=content,
            )

    def _stop(self, task: Mapping[str, Any]) -> tuple[str, ...]:
        given = task.get("stop_string") or ()
        stop = (given,) if isinstance(given, str) else tuple(given)
        return tuple(text_of(text, "stop_string", self.path) for text in stop)

    def _output(self, task: Mapping[str, Any]) -> str:
        pattern = text_of(task.get("output_regex") or "", "output_regex", self.path)
        return check_regex(pattern, f"{self.path}: output_regex")
