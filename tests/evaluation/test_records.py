"""What is no document is refused in a line that names file, line and field; what a suite may not hold; seqio tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from palmjax import configure
from palmjax.config import ConfigError
from palmjax.data.vocabulary import Bytes
from palmjax.evaluation import evaluate
from palmjax.evaluation.documents import read_records
from palmjax.evaluation.forms import Choices, Extract, Generate, Predict, Rolling
from palmjax.evaluation.prompts import Encoder
from palmjax.evaluation.records import Records
from palmjax.evaluation.tasks import Suite, Task
from palmjax.evaluation.templates import Template
from palmjax.interop.bigbench import BigBench
from tests.evaluation.benchmarks import FIXTURES, Rule, run, suite

GOOD = {"q": "which?", "c": ["one", "two"], "a": 1}
MCQ = {"texts": {"q": "{q}"}, "choices": "c", "answer": "a"}


def documents(folder: Path, *rows: Any, **fields: Any) -> list[Any]:
    file = folder / "questions.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Records(files=str(file), **{**MCQ, **fields}).build(False)[0]


@pytest.mark.parametrize(
    ("row", "fields", "words"),
    [
        ({"q": "x", "c": ["one", "two"]}, {}, "no field 'a'; the record has q, c"),
        (GOOD | {"a": 2}, {}, "field 'a' is 2, and there are 2 choices"),
        (GOOD | {"a": -1}, {}, "answers are not published"),
        (GOOD | {"a": "B"}, {}, "Records.labels says what it means"),
        (GOOD | {"a": "E"}, {"labels": ("A", "B")}, "none of the labels ['A', 'B']"),
        (GOOD, {"labels": ("A", "B", "C")}, "3 labels for 2 choices"),
        (GOOD | {"c": ["one", " "]}, {}, "choices[1] (field 'c') is empty"),
        (GOOD | {"c": []}, {}, "field 'c' is an empty list"),
        (GOOD | {"c": ["one"]}, {}, "has one choice only"),
        (GOOD | {"c": 5}, {}, "has one choice only"),
        (GOOD | {"c": {"text": ["a"]}}, {}, "must be a list of texts"),
        (GOOD | {"c": ["one", None]}, {}, "field 'c.1' must be text, got nothing"),
        (GOOD | {"q": ["x"]}, {}, "field 'q' must be text, got list"),
        (GOOD, {"parse": {"q": r"(?P<n>\d+)"}}, "field 'q' does not match"),
        (GOOD | {"s": [1, 1]}, {"answer": None, "scores": "s"}, "gives every choice the same worth, 1"),
        (GOOD | {"s": [1]}, {"answer": None, "scores": "s"}, "must be a list of 2 numbers"),
        (GOOD | {"s": [1, "x"]}, {"answer": None, "scores": "s"}, "has 'x' among its numbers"),
        ("{not json", {}, "not JSON"),
        ("[1, 2]", {}, "expected a JSON object, got [1, 2]"),
    ],
)
def test_a_line_that_is_no_document_is_refused_by_name(tmp_path: Path, row: Any, fields: Any, words: str) -> None:
    rows = [row] if fields else [GOOD, row]
    with pytest.raises(ConfigError) as error:
        documents(tmp_path, *rows, **fields)
    text = str(error.value)
    assert text.startswith(f"{tmp_path}/questions.jsonl:{len(rows)}: ") and words in text and "\n" not in text


def test_files_that_hold_nothing_or_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it holds no records"):
        documents(tmp_path)
    with pytest.raises(ConfigError, match=r"Records\.files: no file matches .*nowhere"):
        Records(files="nowhere*", **MCQ).build(False)
    (tmp_path / "table.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(ConfigError, match=r"table\.csv:3: not as many fields as the 2"):
        list(read_records(str(tmp_path / "table.csv")))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=r"broken\.parquet is not parquet"):
        list(read_records(str(tmp_path / "broken.parquet")))
    (tmp_path / "binary.jsonl").write_bytes(b'{"q": "\xff"}\n')
    with pytest.raises(ConfigError, match="not UTF-8"):
        list(read_records(str(tmp_path / "binary.jsonl")))
    (tmp_path / "what.xlsx").write_bytes(b"")
    with pytest.raises(ConfigError, match="can't tell what it holds"):
        list(read_records(str(tmp_path / "what.xlsx")))


def test_a_document_is_known_by_its_content(tmp_path: Path) -> None:
    first, same, other = documents(tmp_path, GOOD, dict(reversed(GOOD.items())), GOOD | {"a": 0})
    assert first.id == same.id != other.id
    assert first.scores == (0.0, 1.0) and first.cluster == first.id


def test_forms_refuse_documents_that_they_cannot_ask(tmp_path: Path) -> None:
    (document,) = documents(tmp_path, GOOD)
    (bare,) = documents(tmp_path, {"q": "x"}, choices=(), answer=None)
    with pytest.raises(ConfigError, match="wants question; there is q, choice"):
        Choices(context="{question}").questions(document)
    with pytest.raises(ConfigError, match=r"Choices needs documents with choices"):
        Choices(context="{q}").questions(bare)
    with pytest.raises(ConfigError, match=r"Generate needs documents with answers"):
        Generate(context="{q}", target="").questions(bare)
    with pytest.raises(ConfigError, match="the continuation is empty"):
        Predict(context="{q}", continuation=" ").questions(bare)
    for text in ("{", "{}", "{a:3}", "{a!r}"):
        with pytest.raises(ConfigError, match="template"):
            Template(text)
    for wrong in (
        lambda: Extract(pattern="("),
        lambda: Rolling(words="("),
        lambda: Generate(context="{q}", target="", ignore=("(",)),
    ):
        with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
            wrong()


def test_a_suite_names_the_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two tasks are named 'piqa'"):
        suite("Suite.tasks=(@piqa/Task(), @piqa/Task())")
    with pytest.raises(ConfigError, match=r"headline.*one of acc, acc_per_char"):
        suite("piqa/Task.headline='accuracy'")
    with pytest.raises(ConfigError, match="not set: TASKS_DIR"):
        configure.load_section(Suite, ["gin/eval/open_llm.gin"])
    with pytest.raises(ConfigError, match="Suite has no field 'limits'; nearest: limit"):
        suite("Suite.limits=3")
    with pytest.raises(ConfigError, match="only BIG-bench's JSON tasks"):
        (tmp_path / "task.json").write_text("{}")
        BigBench(file=str(tmp_path / "task.json")).build(False)


def test_a_written_suite_gives_an_equal_one(tmp_path: Path) -> None:
    loaded = configure.load_section(Suite, ["gin/eval/open_llm.gin"], [f"TASKS_DIR='{FIXTURES}'", "Suite.limit=3"])
    (tmp_path / "suite.gin").write_text(loaded.operative)
    assert configure.load_section(Suite, [str(tmp_path / "suite.gin")]).value == loaded.value


def test_bindings_find_their_tree_and_those_of_neither_are_refused() -> None:
    files = ["gin/exp/palm_nano_stdlib.gin"]
    given = ["MODEL_DIR='/tmp/x'", f"TASKS_DIR='{FIXTURES}'", "MeshConfig.fsdp=2", "arc_challenge/Drawn.count=3"]
    which, experiment = configure.load_with(Suite, ["gin/eval/open_llm.gin"], files, given)
    assert experiment.experiment.mesh.fsdp == 2
    shots = {task.name: task.shots for task in which.value.tasks}["arc_challenge"]
    assert shots is not None and shots.count == 3
    for wrong in ("MeshConfig.fspd=2", "nobody/Drawn.count=3", "TASK_DIR='/x'"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0].rpartition(".")[2]):
            configure.load_with(Suite, ["gin/eval/open_llm.gin"], files, [*given, wrong])


# --- seqio -----------------------------------------------------------------------------------------------------------


def copied(targets: list[str], predictions: list[str]) -> dict[str, float]:
    return {"copied": sum(t == p for t, p in zip(targets, predictions, strict=True)) / len(targets)}


def mean_score(targets: list[str], scores: list[float]) -> dict[str, float]:
    return {"mean_score": sum(scores) / len(targets)}


def shouted(text: str, example: Any = None, is_target: bool = False) -> str:
    assert example is not None and "targets" in example
    return text.strip().upper()


@pytest.fixture(scope="module")
def seqio_task() -> str:
    import seqio
    import tensorflow as tf

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        pairs = {"validation": ["ab", "cd", "ef"], "train": ["xy", "zw", "uv"]}[split]
        rows: Any = {"inputs": [f"copy {p}:" for p in pairs], "targets": pairs}
        return tf.data.Dataset.from_tensor_slices(rows)

    name = "palmjax_test_copy"
    source: Any = seqio.FunctionDataSource(dataset, splits=("train", "validation"))
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={
            n: seqio.Feature(seqio.ByteVocabulary(), add_eos=n == "targets") for n in ("inputs", "targets")
        },
        postprocess_fn=shouted,
        metric_fns=[copied, mean_score],
    )
    return name


@pytest.mark.slow
def test_seqio_metrics_get_what_their_arguments_name(seqio_task: str) -> None:
    from palmjax.evaluation.prompts import Drawn
    from palmjax.interop.seqio_tasks import SeqioMetrics, SeqioTask

    source = SeqioTask(task=seqio_task, train_split="train")
    task = Task(
        name="copy",
        source=source,
        form=SeqioMetrics(source=source, max_new_tokens=16),
        shots=Drawn(count=2),
        separator="\n",
    )
    replies = {"ab": " AB", "cd": " cd ", "ef": " fe"}
    backend = Rule(write=lambda prompt: replies[prompt.rpartition("copy ")[2].rstrip(":")])
    asked = evaluate.ask(Suite(tasks=(task,)).build(), Encoder(Bytes(), 256))
    (outcome,) = evaluate.outcomes(asked, evaluate.answer(asked, backend))
    # Postprocessed: AB and CD are copied, FE is not. A target is a space and two letters, and EOS, which gives no text.
    assert outcome.estimates["copied"].value == pytest.approx(2 / 3)
    assert outcome.estimates["mean_score"].value == pytest.approx(-3.0)
    assert outcome.headline == "copied" and math.isfinite(outcome.score.low)
    assert all(request.continuation[-1] == Bytes().eos_id for request in backend.requests)
    assert all(prompt.count("copy ") == 3 for prompt in backend.prompts)
    with pytest.raises(ConfigError, match="no seqio task of that name"):
        SeqioTask(task="nowhere").build(False)
    with pytest.raises(ConfigError, match="has no split 'test'; it has train, validation"):
        SeqioTask(task=seqio_task, split="test").build(False)


def test_one_run_of_the_whole_suite_reports_every_task() -> None:
    assert list(run(suite("Suite.limit=2"), Rule())) == [task.name for task in suite().tasks]
