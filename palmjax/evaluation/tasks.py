"""Tasks and suites: what is evaluated, as values that gin builds. No jax.

    palmjax eval --checkpoint DIR --tasks gin/eval/open_llm.gin

A task of your own is a scope in a gin file: a `Task` with a source (its files and what is what in a record), a form
(how it is asked and scored) and exemplars. `gin/eval/open_llm.gin` shows a dozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from palmjax.config import ConfigError, SuitePart, require, section
from palmjax.evaluation.documents import Document, SourcePart, in_hash_order
from palmjax.evaluation.forms import FormPart
from palmjax.evaluation.prompts import Encoder, Prompt, Prompter, ShotsPart
from palmjax.evaluation.templates import Style, styles


@section
class Task:
    """A benchmark. name: of its row in the table.

    source: where the documents are. form: how one is asked and scored. shots: exemplars from the train split.
    description: a template before everything; separator: one behind each exemplar.
    headline: the metric that stands for the task ("" for the form's first).
    on_overflow: what happens to a prompt that is too long. Exemplars are dropped first, whole, the farthest from the
    question first; if that is not enough, "truncate_left" cuts the context from its left (and reads a choice that is
    longer than a row in windows) and "error" stops. All is counted.
    """

    name: str
    source: SourcePart
    form: FormPart
    shots: ShotsPart | None = None
    description: str = ""
    separator: str = "\n\n"
    headline: str = ""
    on_overflow: Literal["truncate_left", "error"] = "truncate_left"

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, self, "name", "a name without '/': files are called after it")
        known = [metric.name for metric in self.form.metrics]
        if known:
            require(not self.headline or self.headline in known, self, "headline", f"one of {', '.join(known)}")

    def read(self, limit: int | None = None) -> Documents:
        """The documents, in hash order: the first `limit` of them are a fair sample, and part of any longer one's."""
        documents, pool = self.source.build(self.shots is not None)
        if not documents:
            raise ConfigError(f"task {self.name!r}: there are no documents")
        return Documents(self, in_hash_order(documents)[:limit], pool)


@dataclasses.dataclass(frozen=True)
class Documents:
    """A task's documents, read."""

    task: Task
    documents: Sequence[Document]
    pool: Sequence[Document]

    def formats(self, count: int) -> list[Style]:
        """The first `count` styles under which the task's prompts differ: fewer if its words allow no more."""
        found: dict[str, Style] = {}
        for style in styles():
            found.setdefault(repr((self.task.form.restyled(style), style.restyle(self.task.description))), style)
            if len(found) == count:
                break
        return list(found.values())

    def prompts(self, encoder: Encoder, style: Style | None = None) -> list[Prompt]:
        """Every document's prompt. Raises ConfigError, naming the document, for one that can't be asked."""
        task, style = self.task, style or Style()
        written = style == Style()
        prompter = Prompter(
            form=task.form.build() if written else task.form.restyled(style).build(),
            draw=(lambda document: ()) if task.shots is None else task.shots.build(self.pool),
            encoder=encoder,
            description=task.description if written else style.restyle(task.description),
            separator=task.separator,
            cut=task.on_overflow == "truncate_left",
        )
        return [prompter(document) for document in self.documents]


@section
class Suite(SuitePart):
    """Tasks evaluated together. limit: documents of each, by hash; None for all. formats: equivalent prompt formats
    under which each task is scored. max_length: tokens a row; None for the length of the checkpoint's training rows.
    contamination: a token store (its folder) in which the documents' 13-grams are looked for; None for none.
    seed: of what is drawn when a text is sampled.
    """

    tasks: tuple[Task, ...]
    limit: int | None = None
    formats: int = 1
    max_length: int | None = None
    contamination: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.tasks), self, "tasks", "at least one Task")
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"Suite.tasks: two tasks are named {twice[0]!r}")
        require(self.limit is None or self.limit >= 1, self, "limit", "1 or more, or None for all")
        require(self.formats >= 1, self, "formats", "1 or more")
        require(self.max_length is None or self.max_length >= 2, self, "max_length", "2 or more, or None")

    def build(self) -> list[Documents]:
        """Reads every task. Raises ConfigError, naming file, line and field, for what is no document."""
        return [task.read(self.limit) for task in self.tasks]
