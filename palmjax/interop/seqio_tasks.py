"""seqio tasks with T5X's metric-function convention, through palmjax's scorer. Imports seqio when a task is read.

A metric function's argument names decide what is asked: `(targets, predictions)` gets generated and postprocessed
texts, `(targets, scores)` the targets' log-likelihoods. seqio gives the data and the metrics; prompts, exact requests,
error bars and manifests are the same as every task's.

    translate/Task.source = @SeqioTask()
    translate/Task.form = @SeqioMetrics()
    SeqioTask.task = "my_translation"
    SeqioTask.modules = ("my_tasks",)
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from palmjax.config import ConfigError, Part, TaskPart, section
from palmjax.evaluation import stats
from palmjax.evaluation.documents import Document, SourcePart, digest
from palmjax.evaluation.forms import Answered, Ask, FormPart, Question, Reply, Text, Write, fill
from palmjax.evaluation.score import AnyMetric
from palmjax.evaluation.store import Answer

RESAMPLES = 200
"""Of a metric function's bootstrap: each one calls it once."""


@section
class SeqioTask(SourcePart):
    """A registered seqio task. modules: imported first, to register it; tasks: values that register themselves.

    split: what is evaluated; train_split: what exemplars are drawn from, None for none. A document's texts are
    `inputs` and `targets`, as they are before they are tokenized.
    """

    task: str
    split: str = "validation"
    train_split: str | None = None
    modules: tuple[str, ...] = ()
    tasks: tuple[TaskPart, ...] = ()

    def registered(self) -> Any:
        """The seqio.Task. Raises ConfigError if there is none of that name."""
        import seqio

        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(f"SeqioTask.modules: `import {module}` failed: {error}") from error
        for made in self.tasks:
            made.build()
        if self.task not in seqio.TaskRegistry.names():
            raise ConfigError(f"SeqioTask.task = {self.task!r}: no seqio task of that name; see SeqioTask.modules")
        return seqio.TaskRegistry.get(self.task)

    def build(self, exemplars: bool) -> tuple[list[Document], list[Document]]:
        task = self.registered()
        train = () if self.train_split is None or not exemplars else self._documents(task, self.train_split)
        return list(self._documents(task, self.split)), list(train)

    def _documents(self, task: Any, split: str) -> Iterator[Document]:
        if split not in task.splits:
            raise ConfigError(f"seqio task {self.task!r} has no split {split!r}; it has {', '.join(task.splits)}")
        examples = task.get_dataset(sequence_length=None, split=split, shuffle=False).as_numpy_iterator()
        for number, example in enumerate(examples, 1):
            where = f"seqio:{self.task}:{split}:{number}"
            texts = {name: _text(task, example, name) for name in ("inputs", "targets") if name in example}
            if "targets" not in texts:
                raise ConfigError(f"{where}: it has no targets")
            content = digest({name: _plain(value) for name, value in example.items()})
            yield Document(
                id=content,
                where=where,
                texts={"inputs": "", **texts},
                answers=(texts["targets"],),
                cluster=content,
                record=example,
            )


def _plain(value: Any) -> Any:
    """A feature as JSON, for the document's id: texts by their bytes, one a character."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    value = np.asarray(value)
    return [_plain(item) for item in value.ravel()] if value.dtype == object else value.tolist()


def _text(task: Any, example: Any, name: str) -> str:
    """A feature before it was tokenized; of a task that does not keep that, its tokens decoded."""
    kept = example.get(f"{name}_pretokenized")
    if kept is not None:
        return kept.decode() if isinstance(kept, bytes) else str(kept)
    return task.output_features[name].vocabulary.decode([int(i) for i in example[name]])


@section
class SeqioMetrics(FormPart):
    """The metric functions of a seqio task. source: that task, the same as the Task's.

    context, continuation: templates over `inputs` and `targets`; a score is of the targets with EOS behind them, as
    T5X's. stop, max_new_tokens, sampling: as in `Generate`. A metric whose value is no number is left out.
    """

    source: SeqioTask
    context: str = "{inputs}"
    continuation: str = " {targets}"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    sampling: Part | None = None

    @property
    def metrics(self) -> tuple[AnyMetric, ...]:
        return ()  # known when the functions have been called: see `estimates`

    def questions(self, document: Document) -> tuple[Question, ...]:
        task, context = self.source.registered(), fill(self.context, document)
        asked: list[Question] = []
        if task.predict_metric_fns:
            asked.append(Write(context, self.max_new_tokens, self.stop, self.sampling))
        if task.score_metric_fns:
            asked.append(Ask(context, fill(self.continuation, document), ends=True))
        if not asked:
            raise ConfigError(f"seqio task {self.source.task!r} has no metric_fns")
        return tuple(asked)

    def example(self, document: Document) -> str:
        return fill(self.context, document) + fill(self.continuation, document)

    def values(self, document: Document, replies: Sequence[Reply]) -> dict[str, float]:
        values: dict[str, float] = {}
        for reply in replies:
            if isinstance(reply, Answer):
                values["log_likelihood"] = reply.log_likelihood
            else:
                values["length_stops"] = float(not reply.finished)
        return values

    def estimates(self, answered: Sequence[Answered]) -> dict[str, stats.Estimate]:
        """Every number of every metric function; intervals by a bootstrap over documents."""
        task = self.source.registered()
        targets = [_postprocessed(task, one.document.texts["targets"], one.document, True) for one in answered]
        columns = {
            "predictions": [
                _postprocessed(task, reply.text, one.document, False)
                for one in answered
                for reply in one.replies
                if isinstance(reply, Text)
            ],
            "scores": [one.values.get("log_likelihood") for one in answered],
        }
        clusters = [one.document.cluster for one in answered]
        found: dict[str, stats.Estimate] = {}
        functions = [(f, "predictions") for f in task.predict_metric_fns] + [
            (f, "scores") for f in task.score_metric_fns
        ]
        for function, column in functions:
            given = columns[column]

            def call(pick: Any, function: Any = function, given: Any = given) -> dict[str, float]:
                returned = function([targets[i] for i in pick], [given[i] for i in pick])
                return {name: number for name, value in returned.items() if (number := _number(value)) is not None}

            for name in call(range(len(answered))):
                found[name] = stats.bootstrap(
                    lambda pick, name=name, call=call: call(pick)[name], clusters, resamples=RESAMPLES
                )
        if not found:
            raise ConfigError(f"the metric_fns of seqio task {self.source.task!r} give no number")
        return found


def _postprocessed(task: Any, text: str, document: Document, is_target: bool) -> Any:
    return task.postprocess_fn(text, example=document.record, is_target=is_target)


def _number(value: Any) -> float | None:
    value = getattr(value, "value", value)  # seqio.metrics.Scalar
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
