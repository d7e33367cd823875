"""What of a record is what: published layouts as values, so that a benchmark is a few lines of gin and no class.

hellaswag/Records.texts = {"question": "{activity_label}: {ctx}"}
hellaswag/Records.choices = "endings"
hellaswag/Records.answer = "label"
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from palmjax.config import ConfigError, section
from palmjax.evaluation.documents import (
    Document,
    Patterns,
    Record,
    SourcePart,
    check_regex,
    digest,
    find_files,
    lookup,
    read_records,
)
from palmjax.evaluation.templates import template as parsed


@section
class Records(SourcePart):
    """Documents from files of records (.jsonl, .json, .csv, .tsv, .parquet, .txt; all but parquet also .gz).

    files: patterns of what is evaluated. train: of what exemplars are drawn from; () for none. folder: that both are
    relative to.
    texts: templates over the record's fields (`"{goal}"`, `"{passage.text}"`) by name; without any, every field that is
    a text is one under its own name. parse: {field: regular expression}, searched in that text; its named groups become
    fields that `texts`, `choices`, `answers` may use. replace: (regular expression, text) pairs, done one behind the
    other in every text and choice.
    choices: the path of a list of texts, or a template for each choice. answer: the path of the right choice: its
    index, or one of `labels` (the path of a list, or the labels themselves). scores: instead of `answer`, the path of a
    list with each choice's worth (TruthfulQA's labels).
    answers: templates, or the path of a text or of a list of texts: outputs that are right.
    group, cluster: templates; see `Document`.
    """

    files: Patterns
    train: Patterns = ()
    folder: str = ""
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parse: Mapping[str, str] = dataclasses.field(default_factory=dict)
    replace: tuple[tuple[str, str], ...] = ()
    choices: str | tuple[str, ...] = ()
    answer: str | None = None
    labels: str | tuple[str, ...] = ()
    scores: str | None = None
    answers: str | tuple[str, ...] = ()
    group: str = ""
    cluster: str = ""

    def __post_init__(self) -> None:
        for pattern in (*self.parse.values(), *(pattern for pattern, _ in self.replace)):
            check_regex(pattern, "Records:")
        if self.choices and (self.answer is None) == (self.scores is None):
            raise ConfigError("Records.answer or Records.scores must be given with `choices`: one of the two")

    def unplaced(self) -> SourcePart:
        return dataclasses.replace(self, folder="")

    def build(self, exemplars: bool) -> tuple[list[Document], list[Document]]:
        pool = self.train if exemplars else ()
        return list(self._documents(self.files, "files")), list(self._documents(pool, "train"))

    def _documents(self, patterns: Patterns, field: str) -> Iterator[Document]:
        for path in find_files(patterns, self.folder, f"Records.{field}"):
            records = read_records(path)
            first = next(records, None)
            if first is None:
                raise ConfigError(f"{path}: it holds no records")
            for where, record in (first, *records):
                yield self.document(record, where)

    def document(self, record: Record, where: str) -> Document:
        """The document that a record says. Raises ConfigError, naming `where` and the field, if it says none."""
        content = digest(record)
        record = dict(record)
        for name, pattern in self.parse.items():
            found = re.search(pattern, text_of(lookup(record, name, where), name, where), re.DOTALL)
            if found is None:
                raise ConfigError(f"{where}: field {name!r} does not match {pattern!r}")
            record |= {group: text or "" for group, text in found.groupdict().items()}
        templates = self.texts or {name: f"{{{name}}}" for name, value in record.items() if isinstance(value, str)}
        choices = self._texts(record, self.choices, "choices", where)
        if len(choices) == 1:
            raise ConfigError(f"{where}: field {self.choices!r} has one choice only")
        return Document(
            id=content,
            where=where,
            texts={name: self._fill(template, record, where) for name, template in templates.items()},
            choices=choices,
            scores=self._worth(record, len(choices), where) if choices else (),
            answers=self._texts(record, self.answers, "answers", where),
            group=self._fill(self.group, record, where),
            cluster=digest(self._fill(self.cluster, record, where)) if self.cluster else content,
        )

    def _fill(self, text: str, record: Record, where: str) -> str:
        def value(path: str) -> str:
            return text_of(lookup(record, path, where), path, where)

        return self._replaced(parsed(text).fill(value))

    def _replaced(self, text: str) -> str:
        for pattern, replacement in self.replace:
            text = re.sub(pattern, replacement, text)
        return text

    def _texts(self, record: Record, given: str | tuple[str, ...], field: str, where: str) -> tuple[str, ...]:
        """Texts of a path or of templates, none of them empty."""
        if not given:
            return ()
        if isinstance(given, tuple):
            texts = [self._fill(template, record, where) for template in given]
        else:
            found = lookup(record, given, where)
            found = [found] if isinstance(found, (str, int, float)) else found
            if not isinstance(found, Sequence):
                raise ConfigError(f"{where}: field {given!r} must be a list of texts, got {found!r}")
            texts = [self._replaced(text_of(item, f"{given}.{index}", where)) for index, item in enumerate(found)]
            if not texts:
                raise ConfigError(f"{where}: field {given!r} is an empty list")
        for index, text in enumerate(texts):
            if not text.strip():
                raise ConfigError(f"{where}: {field}[{index}] (field {given!r}) is empty")
        return tuple(texts)

    def _worth(self, record: Record, count: int, where: str) -> tuple[float, ...]:
        if self.scores is not None:
            found = lookup(record, self.scores, where)
            return checked_scores(found, count, self.scores, where)
        assert self.answer is not None
        given = lookup(record, self.answer, where)
        index = self._index(given, record, count, where)
        return tuple(float(choice == index) for choice in range(count))

    def _index(self, given: Any, record: Record, count: int, where: str) -> int:
        labels = lookup(record, self.labels, where) if isinstance(self.labels, str) else self.labels
        text = str(given).strip()
        if labels:
            names = [str(label).strip() for label in labels]
            if len(names) != count:
                raise ConfigError(f"{where}: {len(names)} labels for {count} choices")
            if text not in names:
                raise ConfigError(f"{where}: field {self.answer!r} is {given!r}, which is none of the labels {names}")
            return names.index(text)
        if isinstance(given, bool):
            return int(given)
        if not re.fullmatch(r"-?\d+", text):
            raise ConfigError(
                f"{where}: field {self.answer!r} is {given!r}, not an index; Records.labels says what it means"
            )
        if not 0 <= int(text) < count:
            hidden = " (a test split whose answers are not published?)" if int(text) < 0 else ""
            raise ConfigError(f"{where}: field {self.answer!r} is {text}, and there are {count} choices{hidden}")
        return int(text)


def text_of(value: Any, path: str, where: str) -> str:
    """A field as text. Raises ConfigError for an object, a list or nothing."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    got = "nothing" if value is None else type(value).__name__
    raise ConfigError(f"{where}: field {path!r} must be text, got {got}")


def checked_scores(found: Any, count: int, path: str, where: str) -> tuple[float, ...]:
    """A worth for each choice: finite numbers, not all equal. Raises ConfigError for anything else."""
    if not isinstance(found, Sequence) or len(found) != count:
        raise ConfigError(f"{where}: field {path!r} must be a list of {count} numbers, one a choice; got {found!r}")
    for number in found:
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ConfigError(f"{where}: field {path!r} has {number!r} among its numbers")
    if len(set(found)) == 1:
        raise ConfigError(f"{where}: field {path!r} gives every choice the same worth, {found[0]}")
    return tuple(float(number) for number in found)
