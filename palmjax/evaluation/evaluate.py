"""Tasks to results: prompts, one list of requests for all of them, replies, values, estimates. No jax.

The model is behind `Backend`, so that the same code runs in `palmjax eval`, in the training loop and in tests.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from palmjax.evaluation.documents import digest
from palmjax.evaluation.forms import Answered, Reply, Text, Write
from palmjax.evaluation.prompts import COUNTED, Encoded, Encoder, Prompt
from palmjax.evaluation.schedule import Request
from palmjax.evaluation.score import GAP, NEAR
from palmjax.evaluation.stats import Estimate
from palmjax.evaluation.store import Answer
from palmjax.evaluation.tasks import Documents
from palmjax.evaluation.templates import Style


class Backend(Protocol):
    """A model that answers. Both methods give answers in the order of what was asked, equal bits for equal questions
    whatever is asked beside them.
    """

    def likelihoods(self, requests: Sequence[Request]) -> Sequence[Answer]:
        """Of each request. Raises ConfigError for one that is too long for the model."""
        ...

    def texts(self, prompts: Sequence[tuple[int, ...]], write: Write, keys: Sequence[int]) -> Sequence[Text]:
        """What follows each prompt (ids with BOS), decoded as `write` says. keys: 31-bit, of each prompt's draws."""
        ...


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task's prompts in one format: of every document, in hash order."""

    documents: Documents
    style: Style
    prompts: Sequence[Prompt]

    @property
    def name(self) -> str:
        return self.documents.task.name


def ask(tasks: Sequence[Documents], encoder: Encoder, formats: int = 1) -> list[Asked]:
    """The prompts of every task in each of its first `formats` formats; as written comes first."""
    return [
        Asked(documents, style, documents.prompts(encoder, style))
        for documents in tasks
        for style in documents.formats(formats)
    ]


def answer(asked: Sequence[Asked], backend: Backend) -> list[list[Answered]]:
    """The replies and values of every document of each, all asked at once: equal requests are asked once."""
    encoded = [one for each in asked for prompt in each.prompts for one in prompt.encoded]
    requests = dict.fromkeys(request for one in encoded for request in one.requests)
    likelihoods = dict(zip(requests, backend.likelihoods(list(requests)), strict=True)) if requests else {}
    texts = _texts(asked, backend)

    def reply(one: Encoded) -> Reply:
        if isinstance(one.question, Write):
            return texts[_as_asked(one.question), one.prompt]
        found = [likelihoods[request] for request in one.requests]
        return Answer(
            math.fsum(likelihood.log_likelihood for likelihood in found),
            all(likelihood.greedy for likelihood in found),
            sum(likelihood.tokens for likelihood in found),
        )

    def answered(each: Asked) -> Iterator[Answered]:
        form = each.documents.task.form
        form = form if each.style == Style() else form.restyled(each.style)
        for prompt in each.prompts:
            replies = tuple(reply(one) for one in prompt.encoded)
            yield Answered(prompt.document, replies, form.values(prompt.document, replies))

    return [list(answered(each)) for each in asked]


def _as_asked(write: Write) -> Write:
    """How a text is decoded, without the prompt's own text."""
    return dataclasses.replace(write, context="")


def _texts(asked: Sequence[Asked], backend: Backend) -> Mapping[tuple[Write, tuple[int, ...]], Text]:
    """Of every prompt, by how it is decoded and its ids. A draw's key is of the prompt, so equal prompts are one."""
    wanted = dict.fromkeys(
        (_as_asked(one.question), one.prompt)
        for each in asked
        for prompt in each.prompts
        for one in prompt.encoded
        if isinstance(one.question, Write)
    )
    found: dict[tuple[Write, tuple[int, ...]], Text] = {}
    for write in dict.fromkeys(write for write, _ in wanted):
        prompts = [prompt for other, prompt in wanted if other == write]
        keys = [draw_key(prompt) for prompt in prompts]
        replies = backend.texts(prompts, write, keys)
        found |= {(write, prompt): text for prompt, text in zip(prompts, replies, strict=True)}
    return found


def draw_key(prompt: Sequence[int]) -> int:
    """31 bits of a prompt's content, by which what is drawn for it is seeded."""
    return int(digest(list(prompt))[:8], 16) >> 1


COUNTERS = (*COUNTED, "ties", "near_ties", "extraction_failures", "length_stops", "duplicates")
"""What is counted beside a score: shots_dropped and truncated (documents), boundary_merges and longer_than_a_row
(questions), ties (documents whose best choice was not alone), near_ties (where the next one was less than `score.NEAR`
away, in the headline's figure), extraction_failures and length_stops (outputs), duplicates (documents)."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A task's result. estimates: of every metric, in the form's order. headline: the metric that stands for it.

    formats: the headline in each prompt format, the task's own first. chance: of a guess; see `FormPart.chance`.
    groups: the headline of each group of documents (MMLU's subjects), where there are several.
    """

    asked: Asked
    answered: Sequence[Answered]
    estimates: Mapping[str, Estimate]
    headline: str
    counters: Mapping[str, int]
    formats: Sequence[float]
    chance: float | None
    groups: Mapping[str, Estimate]

    @property
    def name(self) -> str:
        return self.asked.name

    @property
    def score(self) -> Estimate:
        return self.estimates[self.headline]

    def summary(self) -> dict[str, float]:
        """The headline by its name, and its standard error where there is one: for a line of metrics."""
        error = {} if math.isnan(self.score.error) else {f"{self.headline}_error": self.score.error}
        return {self.headline: self.score.value, **error}

    @property
    def spread(self) -> float | None:
        """Standard deviation of the headline over formats; None of one format."""
        return statistics.stdev(self.formats) if len(self.formats) > 1 else None

    @property
    def normalised(self) -> float | None:
        """100 (score - chance) / (1 - chance): 0 for a guess, 100 for all right (BIG-bench's normalised score)."""
        if self.chance is None or self.chance >= 1:
            return None
        return 100 * (self.score.value - self.chance) / (1 - self.chance)


def outcomes(asked: Sequence[Asked], answered: Sequence[Sequence[Answered]]) -> list[Outcome]:
    """One for each task: that of its own format, with the headlines of the others."""
    pairs = list(zip(asked, answered, strict=True))
    grouped = [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair[0].name)]
    return [_outcome(group) for group in grouped]


def _outcome(formats: Sequence[tuple[Asked, Sequence[Answered]]]) -> Outcome:
    asked, answered = formats[0]
    form = asked.documents.task.form
    estimates = form.estimates(answered)
    headline = asked.documents.task.headline or next(iter(estimates))
    groups = sorted({one.document.group for one in answered})
    parts = {group: [one for one in answered if one.document.group == group] for group in groups}
    return Outcome(
        asked=asked,
        answered=answered,
        estimates=estimates,
        headline=headline,
        counters=count(asked, answered, headline),
        formats=[estimates[headline].value, *(form.estimates(other)[headline].value for _, other in formats[1:])],
        chance=form.chance([one.document for one in answered]),
        groups={group: form.estimates(part)[headline] for group, part in parts.items()} if len(parts) > 1 else {},
    )


def count(asked: Asked, answered: Sequence[Answered], headline: str) -> dict[str, int]:
    """COUNTERS over the documents of a task."""
    counted: dict[str, int] = {name: 0 for name in COUNTERS}
    for prompt in asked.prompts:
        for name, number in prompt.counts.items():
            counted[name] += number if name in ("boundary_merges", "longer_than_a_row") else bool(number)
    for one in answered:
        counted["length_stops"] += int(one.values.get("length_stops", 0))
        gap = one.values.get(f"{GAP}{headline}", one.values.get(f"{GAP}acc", math.inf))
        counted["ties"] += gap == 0
        counted["near_ties"] += 0 < gap < NEAR
        counted["extraction_failures"] += sum(
            int(value) for name, value in one.values.items() if name.startswith("extraction_failures")
        )
    counted["duplicates"] = len(answered) - len({one.document.id for one in answered})
    return counted
