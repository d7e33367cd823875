"""The shipped suites over five-document fixtures, and a backend that answers by rules a person can follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from palmjax import configure
from palmjax.data.vocabulary import Bytes
from palmjax.evaluation import evaluate
from palmjax.evaluation.forms import Text, Write
from palmjax.evaluation.prompts import Encoder
from palmjax.evaluation.schedule import Request
from palmjax.evaluation.store import Answer
from palmjax.evaluation.tasks import Suite

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY = Bytes()
SHOTS = (
    "arc_challenge/Drawn.count=2",
    "gsm8k/Drawn.count=2",
    "hellaswag/Drawn.count=2",
    "mmlu/Shared.count=2",
    "triviaqa/Drawn.count=2",
    "winogrande/Drawn.count=2",
)
"""As many exemplars as the fixtures' train splits allow."""


def suite(*bindings: str, file: str = "gin/eval/open_llm.gin") -> Suite:
    folder = [f"TASKS_DIR='{FIXTURES}'", *SHOTS] if file.endswith("open_llm.gin") else []
    return configure.load_section(Suite, [file], [*folder, *bindings]).value


def one_task(name: str, folder: Path = FIXTURES) -> Suite:
    """A suite of one shipped task, without exemplars."""
    bindings = [f"Records.folder='{folder}'", f"Suite.tasks=(@{name}/Task(),)"]
    return configure.load_section(Suite, [f"gin/eval/tasks/{name}.gin"], bindings).value


class Rule:
    """A model by rule: `score(context, continuation)` nats over texts, and `write(prompt)` a text.

    A continuation is greedy if its nats are above -1.
    """

    def __init__(
        self,
        score: Callable[[str, str], float] = lambda context, continuation: -float(len(continuation.encode())),
        write: Callable[[str], str] = lambda prompt: "",
    ):
        self._score, self._write = score, write
        self.requests: list[Request] = []
        self.prompts: list[str] = []

    def likelihoods(self, requests: Sequence[Request]) -> list[Answer]:
        self.requests += requests
        found = []
        for request in requests:
            nats = self._score(VOCABULARY.decode(request.context), VOCABULARY.decode(request.continuation))
            found.append(Answer(nats, nats > -1, len(request.continuation)))
        return found

    def texts(self, prompts: Sequence[tuple[int, ...]], write: Write, keys: Sequence[int]) -> list[Text]:
        shown = [VOCABULARY.decode(prompt) for prompt in prompts]
        self.prompts += shown
        return [Text(self._write(prompt), True) for prompt in shown]


def run(which: Suite, backend: Rule, max_length: int = 4096) -> dict[str, evaluate.Outcome]:
    """The outcomes of a suite by task."""
    asked = evaluate.ask(which.build(), Encoder(VOCABULARY, max_length), which.formats)
    return {one.name: one for one in evaluate.outcomes(asked, evaluate.answer(asked, backend))}
