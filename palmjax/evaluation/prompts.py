"""Documents to requests: exemplars, prompt texts, token ids. Pure functions of (task, vocabulary, document).

Nothing here knows which other documents are asked, in which order, on how many hosts: a document's prompt can't depend
on it. Whatever is not as the task wrote it (a shot dropped, a prompt cut, a token that spans context and continuation)
is counted per document.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

from palmjax.config import ConfigError, Part, require, section
from palmjax.data.vocabulary import Vocabulary
from palmjax.evaluation.documents import Document, digest, in_hash_order
from palmjax.evaluation.forms import FormPart, Question, Read, Write, fill
from palmjax.evaluation.schedule import Request, rolling

Draw = Callable[[Document], tuple[Document, ...]]
"""The exemplars of a document, in the order in which they are shown."""


# --- exemplars -------------------------------------------------------------------------------------------------------


class ShotsPart(Part):
    """Which exemplars a document gets. `build(pool)` returns a `Draw` from the documents of the train split."""

    count: int

    @abc.abstractmethod
    def build(self, pool: Sequence[Document]) -> Draw: ...


def _pools(pool: Sequence[Document]) -> dict[str, list[Document]]:
    """Distinct exemplars of each group, in an order that is the files' contents alone."""
    distinct = in_hash_order({document.id: document for document in pool}.values())
    return {
        group: [document for document in distinct if document.group == group]
        for group in {document.group for document in distinct}
    }


def _drawn(pool: Sequence[Document], count: int, key: str, but: str, group: str) -> tuple[Document, ...]:
    """`count` distinct documents other than `but`, by numbers that are hashes of (key, 0), (key, 1), ..."""
    able = len(pool) - any(document.id == but for document in pool)
    if able < count:
        where = f" of group {group!r}" if group else ""
        raise ConfigError(f"{count} exemplars are wanted{where}, and the train split has {able}; see Records.train")
    chosen: dict[str, Document] = {}
    draw = 0
    while len(chosen) < count:
        number = int.from_bytes(hashlib.sha256(f"{key}:{draw}".encode()).digest(), "big")
        found = pool[number % len(pool)]
        if found.id != but:
            chosen.setdefault(found.id, found)
        draw += 1
    return tuple(chosen.values())


@section
class Drawn(ShotsPart):
    """`count` exemplars drawn for each document by (seed, document id) from its group, without replacement.

    They depend on nothing else: not on the other documents, their order, a limit, or the number of hosts.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.count >= 0, self, "count", "0 or more")

    def build(self, pool: Sequence[Document]) -> Draw:
        pools = _pools(pool) if self.count else {}

        def draw(document: Document) -> tuple[Document, ...]:
            group = document.group
            return _drawn(pools.get(group, []), self.count, f"{self.seed}:{document.id}", document.id, group)

        return draw


@section
class Shared(ShotsPart):
    """The same `count` exemplars for every document of a group, drawn by (seed, group): its prefix is computed once.

    A document that is among them itself (train and test overlap) gets the next one in its place.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.count >= 0, self, "count", "0 or more")

    def build(self, pool: Sequence[Document]) -> Draw:
        pools = _pools(pool) if self.count else {}

        def draw(document: Document) -> tuple[Document, ...]:
            group = document.group
            return _drawn(pools.get(group, []), self.count, f"{self.seed}:{group}", document.id, group)

        return draw


# --- tokens ----------------------------------------------------------------------------------------------------------


class Encoder:
    """Texts to requests for one model. max_length: tokens that a row may have.

    BOS stands once at the front of a prompt where the checkpoint's vocabulary puts one, and alone where there is
    no context.
    """

    def __init__(self, vocabulary: Vocabulary, max_length: int):
        self.vocabulary, self.max_length = vocabulary, max_length
        self._last: tuple[str, list[int]] = ("", [])

    def _encode(self, text: str) -> list[int]:
        try:
            return self.vocabulary.encode(text)
        except UnicodeEncodeError as error:
            raise ConfigError(f"{text[:40]!a} is not UTF-8 text: it has half of a surrogate pair") from error

    def _context(self, text: str) -> list[int]:
        """Ids of a context, of which the choices of one question ask again and again."""
        if self._last[0] != text:
            self._last = (text, self._encode(text))
        return self._last[1]

    def _opening(self, ids: Sequence[int]) -> list[int]:
        """What goes before `ids`: BOS, unless the text itself brought it; and never nothing."""
        bos = self.vocabulary.bos_id if not ids else self.vocabulary.prompt_bos
        return [] if bos is None or (ids and ids[0] == bos) else [bos]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int], bool]:
        """(context ids with BOS, continuation ids, whether a token spans the two).

        As lm-eval's `_encode_pair`: spaces at the end of the context go to the continuation, both are tokenized
        together, and the ids are parted at the length of the context's own. Where a token spans the two they are parted
        before it, so that it is scored, and no id is scored that the text does not have.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        alone, whole = self._context(kept), self._encode(kept + continuation)
        split = 0
        while split < min(len(alone), len(whole) - 1) and alone[split] == whole[split]:
            split += 1
        merged = split < len(alone)
        return [*self._opening(whole[:split]), *whole[:split]], whole[split:], merged

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt to continue, BOS included."""
        ids = self._encode(text)
        return [*self._opening(ids), *ids]

    def windows(self, text: str) -> list[Request]:
        """The requests that score a whole text, BOS before its first token."""
        ids = self._encode(text)
        if ids and ids[0] == self.vocabulary.bos_id:
            ids = ids[1:]
        return rolling(ids, self.vocabulary.bos_id, self.max_length)

    def cut(self, ids: list[int], room: int) -> list[int]:
        """The last of `ids` that fit in `room`, with the BOS that they begin with."""
        if len(ids) <= room:
            return ids
        opening = ids[:1] if ids[0] == self.vocabulary.prompt_bos else []
        return [*opening, *ids[len(ids) - room + len(opening) :]]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A question in ids: `requests` to score (several for a text of many windows), or a `prompt` to continue."""

    question: Question
    requests: tuple[Request, ...] = ()
    prompt: tuple[int, ...] = ()


COUNTED = ("shots_dropped", "truncated", "boundary_merges", "longer_than_a_row")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """All that is asked about a document. hash: of its texts and ids. shots: ids of the exemplars shown.

    counts: shots_dropped, truncated (1 if the context lost tokens at its left), boundary_merges (questions with a token
    that spans context and continuation), longer_than_a_row (questions whose continuation alone is).
    """

    document: Document
    shots: tuple[str, ...]
    encoded: tuple[Encoded, ...]
    counts: Mapping[str, int]

    @property
    def hash(self) -> str:
        asked = [repr(one.question) for one in self.encoded]
        ids = [[[r.context, r.continuation] for r in one.requests] + [one.prompt] for one in self.encoded]
        return digest([asked, ids])


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Makes a document's prompt: description, exemplars with `separator` behind each, question.

    cut: whether a prompt that is too long without any exemplar loses tokens at its left, and a continuation longer than
    a row is read in windows behind the context's last token; otherwise it is refused.
    """

    form: FormPart
    draw: Draw
    encoder: Encoder
    description: str = ""
    separator: str = "\n\n"
    cut: bool = True

    def __call__(self, document: Document) -> Prompt:
        """Raises ConfigError, naming the document, if it can't be asked."""
        shots = self.draw(document)
        examples = [self.form.example(shot) for shot in shots]
        description, separator = fill(self.description, document), fill(self.separator, document)
        questions = self.form.questions(document)
        try:
            for dropped in range(len(examples) + 1):
                lead = description + "".join(example + separator for example in examples[dropped:])
                told = [self._led(question, lead) for question in questions]
                if self._fits(told) or dropped == len(examples):
                    break
            encoded, counts = self._finish(told)
        except ConfigError as error:
            raise ConfigError(f"{document.where}: {error}") from error
        counts = {"shots_dropped": dropped, **counts}
        return Prompt(document, tuple(shot.id for shot in shots[dropped:]), tuple(encoded), counts)

    def _led(self, question: Question, lead: str) -> tuple[Question, list[int], list[int], bool]:
        """The question behind its lead: (itself, context ids, continuation ids, merged)."""
        if isinstance(question, Read):
            return question, [], [], False
        if isinstance(question, Write):
            question = dataclasses.replace(question, context=lead + question.context)
            return question, self.encoder.prompt(question.context), [], False
        if not question.alone:
            question = dataclasses.replace(question, context=lead + question.context)
        context, continuation, merged = self.encoder.pair(question.context, question.continuation)
        if question.ends:
            continuation.append(self.encoder.vocabulary.eos_id)
        return question, context, continuation, merged

    def _new_tokens(self, question: Question, continuation: list[int]) -> int:
        """Tokens that a row has behind the context: the last one is never read."""
        return (question.max_new_tokens if isinstance(question, Write) else len(continuation)) - 1

    def _fits(self, told: list[tuple[Question, list[int], list[int], bool]]) -> bool:
        return all(
            len(context) + self._new_tokens(question, continuation) <= self.encoder.max_length
            for question, context, continuation, _ in told
        )

    def _finish(self, told: list[tuple[Question, list[int], list[int], bool]]) -> tuple[list[Encoded], dict[str, int]]:
        """(encoded, what was counted). Contexts are all cut to the room beside the longest continuation that fits."""
        limit = self.encoder.max_length
        asked = [one for one in told if not isinstance(one[0], Read)]
        longer = sum(len(continuation) > limit for _, _, continuation, _ in asked)
        follows = [self._new_tokens(question, ids) for question, _, ids, _ in asked if len(ids) <= limit]
        longest = max(follows, default=0)
        room = limit - longest
        if room < 1:
            raise ConfigError(
                f"{longest + 1} tokens follow the context, and a row has {limit}; no context fits before them"
            )
        needed = max((len(context) for _, context, _, _ in asked), default=0)
        if (needed > room or longer) and not self.cut:
            most = max((len(context) + self._new_tokens(one, ids) for one, context, ids, _ in asked), default=0)
            raise ConfigError(
                f"the prompt has {most} tokens without exemplars, and a row has {limit}; "
                "Task.on_overflow = 'truncate_left' cuts it"
            )
        encoded = []
        for question, context, continuation, _ in told:
            if isinstance(question, Read):
                encoded.append(Encoded(question, tuple(self.encoder.windows(question.text))))
            elif isinstance(question, Write):
                encoded.append(Encoded(question, prompt=tuple(self.encoder.cut(context, room))))
            elif len(continuation) > limit:
                encoded.append(Encoded(question, tuple(rolling(continuation, context[-1], limit))))
            else:
                request = Request(tuple(self.encoder.cut(context, room)), tuple(continuation))
                encoded.append(Encoded(question, (request,)))
        counts = {
            "truncated": int(needed > room),
            "boundary_merges": sum(merged for *_, merged in told),
            "longer_than_a_row": longer,
        }
        return encoded, counts
