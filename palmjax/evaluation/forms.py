"""How a document is asked and what an answer is worth: multiple choice, prediction, generation, rolling likelihood.

A form turns a document into questions, and their replies into the document's values. Pure: no jax, no tokens.

    arc/Choices.context = "Question: {question}\\nAnswer:"                       # cloze: the choice itself is scored
    mmlu/Choices.context = "{question}\\n{options}\\nAnswer:"                    # letters: which of A. B. C. D.
    mmlu/Choices.continuation = " {letter}"
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from palmjax.config import ConfigError, Part, require, section
from palmjax.evaluation.detokenize import DetokenizerPart
from palmjax.evaluation.documents import Document, check_regex
from palmjax.evaluation.score import (
    CHOICE_METRICS,
    AnyMetric,
    Metric,
    Values,
    choice_values,
    f1,
    normalised,
)
from palmjax.evaluation.stats import Estimate
from palmjax.evaluation.store import Answer
from palmjax.evaluation.templates import Style, template

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Ask:
    """log p(continuation | context). alone: without the exemplars and description before the context. ends: with EOS
    behind the continuation.
    """

    context: str
    continuation: str
    alone: bool = False
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Write:
    """A continuation of the context of at most `max_new_tokens`, to the first of `stop` or EOS."""

    context: str
    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Part | None = None


@dataclasses.dataclass(frozen=True)
class Read:
    """log p(text), over disjoint windows that begin with BOS."""

    text: str


Question = Ask | Write | Read


@dataclasses.dataclass(frozen=True)
class Text:
    """Reply to Write. finished: whether a stop came before `max_new_tokens`."""

    text: str
    finished: bool


Reply = Answer | Text
"""An Answer to Ask and Read, a Text to Write."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """A document with the replies to its questions and the values that they give it."""

    document: Document
    replies: tuple[Reply, ...]
    values: Values


class FormPart(Part):
    """A form. `build()` refuses templates that can't be filled and returns the form itself."""

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[AnyMetric, ...]:
        """The first is the headline, unless the task names another."""

    @abc.abstractmethod
    def questions(self, document: Document) -> tuple[Question, ...]:
        """What is asked, always in the same order. Raises ConfigError, naming the document, if it can't be."""

    @abc.abstractmethod
    def example(self, document: Document) -> str:
        """The question with its right answer, as an exemplar shows it."""

    @abc.abstractmethod
    def values(self, document: Document, replies: Sequence[Reply]) -> dict[str, float]:
        """The document's values, of the replies to its questions in their order."""

    def estimates(self, answered: Sequence[Answered]) -> dict[str, Estimate]:
        """Every metric over the documents."""
        rows = [one.values for one in answered]
        clusters = [one.document.cluster for one in answered]
        return {metric.name: metric.estimate(rows, clusters) for metric in self.metrics}

    def chance(self, documents: Sequence[Document]) -> float | None:
        """The expected headline of a guess, from which a normalised score counts; None where nothing is guessed."""
        return None

    def restyled(self, style: Style) -> FormPart:
        """The same form in another prompt format. One that has no words of its own is what it was."""
        return self

    def build(self) -> FormPart:
        return self


def fill(text: str, document: Document, **more: str) -> str:
    """A template over the document's texts. Raises ConfigError, naming the document, for a text that it has not."""
    values = {**document.texts, **more}
    missing = template(text).names - values.keys()
    if missing:
        raise ConfigError(
            f"{document.where}: template {text!r} wants {', '.join(sorted(missing))}; there is {', '.join(values)}"
        )
    return template(text).fill(values.__getitem__)


@section
class Choices(FormPart):
    """Multiple choice: the choice whose continuation is likeliest.

    context, continuation: templates over the document's texts and `{choice}`, `{letter}` (A, B, ...) and `{options}`,
    all options a line each as `option` writes them. So cloze form is `continuation = " {choice}"`, letter form
    `" {letter}"`, and Winogrande's has the choice in its context.
    unconditional: the context of acc_unconditional ("" is BOS alone, as in lm-eval; "Answer:" in Brown et al. 2020);
    None asks nothing more and leaves that metric out.
    """

    context: str
    continuation: str = " {choice}"
    option: str = "{letter}. {choice}"
    unconditional: str | None = ""

    @property
    def metrics(self) -> tuple[AnyMetric, ...]:
        return tuple(m for m in CHOICE_METRICS if m.name != "acc_unconditional" or self.unconditional is not None)

    def _fill(self, text: str, document: Document, index: int) -> str:
        letters = [LETTERS[i] if i < len(LETTERS) else str(i + 1) for i in range(len(document.choices))]
        options = (
            fill(self.option, document, letter=letter, choice=choice)
            for letter, choice in zip(letters, document.choices, strict=True)
        )
        shown = "\n".join(options)
        return fill(text, document, choice=document.choices[index], letter=letters[index], options=shown)

    def _pairs(self, document: Document) -> list[tuple[str, str]]:
        if not document.choices:
            raise ConfigError(f"{document.where}: Choices needs documents with choices; set Records.choices")
        pairs = [
            (self._fill(self.context, document, index), self._fill(self.continuation, document, index))
            for index in range(len(document.choices))
        ]
        for index, (_, continuation) in enumerate(pairs):
            if not continuation.strip():
                raise ConfigError(f"{document.where}: the continuation of choice {index} is empty")
        return pairs

    def questions(self, document: Document) -> tuple[Question, ...]:
        pairs = self._pairs(document)
        asked = [Ask(context, continuation) for context, continuation in pairs]
        if self.unconditional is not None:
            asked += [Ask(self.unconditional, continuation, alone=True) for _, continuation in pairs]
        return tuple(asked)

    def example(self, document: Document) -> str:
        return "".join(self._pairs(document)[document.right[0]])

    def values(self, document: Document, replies: Sequence[Reply]) -> dict[str, float]:
        found = [reply for reply in replies if isinstance(reply, Answer)]
        given, alone = found[: len(document.choices)], found[len(document.choices) :]
        return choice_values(
            [reply.log_likelihood for reply in given],
            document.scores,
            [continuation for _, continuation in self._pairs(document)],
            [reply.tokens for reply in given],
            [reply.log_likelihood for reply in alone] if self.unconditional is not None else None,
        )

    def chance(self, documents: Sequence[Document]) -> float:
        """Of a choice taken at random (BIG-bench's low score; Srivastava et al. 2022, section 3.1)."""
        return math.fsum(math.fsum(d.scores) / len(d.scores) for d in documents) / len(documents)

    def restyled(self, style: Style) -> Choices:
        shown = "options" in template(self.context).names
        option = style.restyle_option(self.option) if shown else self.option
        return dataclasses.replace(self, context=style.restyle(self.context), option=option)


@section
class Predict(FormPart):
    """One right continuation (LAMBADA): whether it is what greedy decoding gives, and its perplexity.

    perplexity: exp of the mean nats a document.
    """

    context: str
    continuation: str

    @property
    def metrics(self) -> tuple[AnyMetric, ...]:
        return (Metric("acc", "acc", percent=True), Metric("perplexity", "nats", transform=math.exp, better=-1))

    def questions(self, document: Document) -> tuple[Question, ...]:
        continuation = fill(self.continuation, document)
        if not continuation.strip():
            raise ConfigError(f"{document.where}: the continuation is empty")
        return (Ask(fill(self.context, document), continuation),)

    def example(self, document: Document) -> str:
        return fill(self.context, document) + fill(self.continuation, document)

    def values(self, document: Document, replies: Sequence[Reply]) -> dict[str, float]:
        (reply,) = replies
        assert isinstance(reply, Answer)
        return {"acc": float(reply.greedy), "nats": -reply.log_likelihood}

    def restyled(self, style: Style) -> Predict:
        return dataclasses.replace(self, context=style.restyle(self.context))


@section
class Rolling(FormPart):
    """The likelihood of a whole text (WikiText): bits a byte of UTF-8, perplexity a byte and a word.

    detokenizer: makes the text that is scored of the one that is published (`detokenize.WikiText`); words and bytes
    that the likelihood is divided by are always the latter's. None scores it as it is.
    words: what a word is parted by, a regular expression.
    """

    text: str = "{text}"
    detokenizer: DetokenizerPart | None = None
    words: str = r"\s+"

    def __post_init__(self) -> None:
        check_regex(self.words, "Rolling.words =")

    @property
    def metrics(self) -> tuple[AnyMetric, ...]:
        return (
            Metric("bits_per_byte", "bits", "bytes", better=-1),
            Metric("byte_perplexity", "nats", "bytes", math.exp, better=-1),
            Metric("word_perplexity", "nats", "words", math.exp, better=-1),
        )

    def questions(self, document: Document) -> tuple[Question, ...]:
        text = fill(self.text, document)
        if not text:
            raise ConfigError(f"{document.where}: the text is empty")
        return (Read(text if self.detokenizer is None else self.detokenizer.build()(text)),)

    def example(self, document: Document) -> str:
        raise ConfigError("Rolling has no exemplars: a text is read from its beginning; leave Task.shots out")

    def values(self, document: Document, replies: Sequence[Reply]) -> dict[str, float]:
        (reply,), text = replies, fill(self.text, document)
        assert isinstance(reply, Answer)
        nats = -reply.log_likelihood
        words = len(re.split(self.words, text))
        return {"nats": nats, "bits": nats / math.log(2), "bytes": float(len(text.encode())), "words": float(words)}


@section
class Extract:
    """The answer in an output: the first (or last) match of a regular expression, its first group if it has one.

    It is searched in the output alone, never in the prompt. `Extract()` is the whole output.
    """

    pattern: str = r"(?s)\A\s*(.*?)\s*\Z"
    last: bool = False

    def __post_init__(self) -> None:
        check_regex(self.pattern, "Extract.pattern =")

    def find(self, output: str) -> str | None:
        """The answer, or None if the output has none."""
        found = list(re.finditer(self.pattern, output))
        if not found:
            return None
        match = found[-1 if self.last else 0]
        return next((group for group in match.groups() if group is not None), match[0])


@section
class Generate(FormPart):
    """A text is generated, answers are taken out of it, and they are compared with the right ones.

    context: template. target: the template of the right answer in an exemplar: with a chain of thought it is that
    chain. stop: texts that end the output, beside the document's own (`Document.stop`). extract: name -> Extract; each
    has its own exact_match, such as `exact_match_strict`, and outputs from which it finds nothing are counted.
    ignore: regular expressions deleted from outputs and answers before they are compared. squad: compare as SQuAD does
    (`score.normalised`), and report F1 too. sampling: a `palmjax.sampling.SamplingPart`; None is greedy.
    """

    context: str
    target: str
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 256
    sampling: Part | None = None
    extract: Mapping[str, Extract] = dataclasses.field(default_factory=lambda: {"": Extract()})
    ignore: tuple[str, ...] = ()
    squad: bool = False

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, self, "max_new_tokens", "1 or more")
        require(bool(self.extract), self, "extract", "at least one Extract")
        for pattern in self.ignore:
            check_regex(pattern, "Generate.ignore:")

    @property
    def metrics(self) -> tuple[AnyMetric, ...]:
        exact = tuple(Metric(named("exact_match", n), named("exact_match", n), percent=True) for n in self.extract)
        return exact + tuple(Metric(named("f1", n), named("f1", n), percent=True) for n in self.extract if self.squad)

    def questions(self, document: Document) -> tuple[Question, ...]:
        if not document.answers:
            raise ConfigError(f"{document.where}: Generate needs documents with answers; set Records.answers")
        stop = tuple(dict.fromkeys((*self.stop, *document.stop)))
        return (Write(fill(self.context, document), self.max_new_tokens, stop, self.sampling),)

    def example(self, document: Document) -> str:
        return fill(self.context, document) + fill(self.target, document)

    def _compared(self, text: str) -> str:
        for pattern in self.ignore:
            text = re.sub(pattern, "", text)
        return normalised(text) if self.squad else text.strip()

    def values(self, document: Document, replies: Sequence[Reply]) -> dict[str, float]:
        (reply,) = replies
        assert isinstance(reply, Text)
        values = {"length_stops": float(not reply.finished)}
        answers = [self._compared(answer) for answer in document.answers]
        output = Extract(pattern=document.output).find(reply.text) if document.output else reply.text
        for name, extract in self.extract.items():
            found = None if output is None else extract.find(output)
            values[named("extraction_failures", name)] = float(found is None)
            given = None if found is None else self._compared(found)
            values[named("exact_match", name)] = float(given in answers)
            if self.squad:
                values[named("f1", name)] = max((f1(given, a) for a in answers), default=0.0) if given else 0.0
        return values

    def restyled(self, style: Style) -> Generate:
        return dataclasses.replace(self, context=style.restyle(self.context))


def named(value: str, extract: str) -> str:
    return f"{value}_{extract}" if extract else value
