"""Stores built from real seqio tasks: contents, mixtures, interruption, workers, and every mistake a task can have."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palmjax import tokenizer
from palmjax.config import ConfigError, DatasetConfig
from palmjax.data import build, index
from palmjax.data.batch import ConcatenateAndCut, PackDocuments
from palmjax.data.feed import open_dataset
from palmjax.data.store import Folder, TokenStore
from palmjax.data.vocabulary import PassThrough

ROOT = Path(__file__).parents[2]
LINES = [[f"file {file} line {line} " + "y" * (line % 40) for line in range(60)] for file in range(5)]

# Registers `lines`: five files, hence five parts. SECONDS slows every document down, in a process that will be killed.
TASKS = """
    import os, time
    import seqio, tensorflow as tf

    def slowly(dataset):
        def wait(text):
            time.sleep(float(os.environ.get("SECONDS", 0)))
            return text
        return dataset.map(lambda text: {"targets": tf.ensure_shape(tf.numpy_function(wait, [text], tf.string), [])})

    seqio.TaskRegistry.add(
        "lines",
        source=seqio.TextLineDataSource({"train": os.path.join(os.path.dirname(__file__), "lines-*.txt")}),
        preprocessors=[slowly, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
    )
"""
BUILD = """
    import sys
    from palmjax.config import DatasetConfig
    from palmjax.data.batch import ConcatenateAndCut
    from palmjax.data.feed import open_dataset

    if __name__ == "__main__":
        dataset = open_dataset(DatasetConfig(mixture_or_task_name="lines", task_feature_lengths={"targets": 64},
            batch_size=4, packing=ConcatenateAndCut(), store_dir=sys.argv[1], modules=("lines_tasks",)))
        print(dataset.fingerprint, *("tensorflow" in sys.modules, "seqio" in sys.modules))
"""


def config(store_dir: Path, name: str = "lines", **changes: Any) -> DatasetConfig:
    values = {
        "mixture_or_task_name": name,
        "task_feature_lengths": {"targets": 64},
        "batch_size": 4,
        "packing": ConcatenateAndCut(),
        "store_dir": str(store_dir),
        "modules": ("lines_tasks",),
    }
    return DatasetConfig(**(values | changes))


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a module that registers `lines`, a program that builds it, and the text; importable here."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "lines_tasks.py").write_text(textwrap.dedent(TASKS))
    (folder / "build_lines.py").write_text(textwrap.dedent(BUILD))
    for number, lines in enumerate(LINES):
        (folder / f"lines-{number}.txt").write_text("\n".join(lines))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def built(module: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lines`, built in this process without interruption."""
    store_dir = tmp_path_factory.mktemp("built")
    open_dataset(config(store_dir))
    return store_dir


@pytest.fixture(scope="module")
def seqio() -> Any:
    return build.import_seqio()


@pytest.fixture
def registered(seqio: Any) -> Iterator[Any]:
    """The seqio module; what a test registers is forgotten again."""
    before = {*seqio.TaskRegistry.names()}, {*seqio.MixtureRegistry.names()}
    yield seqio
    for registry, names in zip((seqio.TaskRegistry, seqio.MixtureRegistry), before, strict=True):
        for name in {*registry.names()} - names:
            registry.remove(name)


def add_task(seqio: Any, name: str, examples: list[dict[str, Any]], tokenized: bool = False, **features: Any) -> None:
    import tensorflow as tf

    def examples_of(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        signature = {
            key: tf.TensorSpec([None], tf.int32) if tokenized else tf.TensorSpec([], tf.string)
            for key in (examples[0] if examples else features or {"targets": 0})
        }
        return tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=signature)

    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(examples_of, splits=["train", "validation"]),
        preprocessors=[] if tokenized else [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features or {"targets": seqio.Feature(seqio.ByteVocabulary())},
    )


def contents(store_dir: Path) -> dict[str, bytes]:
    """Every file of the only store in store_dir."""
    (manifest,) = store_dir.glob("lines/*/store.json")
    folder = Folder(str(manifest.parent))
    return {name: folder.read(name) or b"" for name in folder.names()}


def stored(store_dir: Path) -> TokenStore:
    (manifest,) = store_dir.glob("*/*/store.json")
    return TokenStore(str(manifest.parent))


def documents(store: TokenStore) -> list[list[int]]:
    ends = store.document_ends()
    tokens, _ = store.read(np.array([0]), np.array([store.num_tokens]), store.num_tokens)
    return [piece.tolist() for piece in np.split(tokens[0], ends[:-1])]


def run(module: Path, store_dir: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(module / "build_lines.py"), str(store_dir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


def test_a_store_holds_the_documents_of_the_task(built: Path) -> None:
    store = stored(built)
    vocabulary = store.vocabulary
    expected = [[*vocabulary.encode(line), 1] for lines in LINES for line in lines]
    assert documents(store) == expected
    assert len(store.manifest["parts"]) == 5
    assert store.num_bytes == sum(len(line) for lines in LINES for line in lines)
    assert not list(built.glob("lines/*/part-*.json"))
    store.verify()


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on_and_ends_equal(module: Path, built: Path, tmp_path: Path) -> None:
    """SIGKILL after the first finished part; then two processes at once, one of which builds while the other waits."""
    process = run(module, tmp_path, SECONDS="0.02")
    deadline = time.monotonic() + 300
    while not (finished := list(tmp_path.glob("lines/*/part-*.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and 0 < len(finished) < 5
    assert not list(tmp_path.glob("lines/*/store.json"))
    kept = finished[0].with_suffix("") / "tokens" / "c" / "0"
    written = kept.stat().st_mtime_ns

    builders = [run(module, tmp_path) for _ in range(2)]
    outputs = [finish(builder) for builder in builders]
    assert len(set(outputs)) == 1
    assert kept.stat().st_mtime_ns == written  # it was not tokenized again
    assert contents(tmp_path) == contents(built)

    assert finish(run(module, tmp_path)) == f"{outputs[0].split()[0]} False False"  # no TensorFlow, no seqio


@pytest.mark.slow
def test_workers_write_the_same_bytes(module: Path, built: Path, tmp_path: Path) -> None:
    open_dataset(config(tmp_path, workers=2))
    assert contents(tmp_path) == contents(built)


def test_a_beam_pipeline_writes_the_same_bytes(
    module: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a stand-in of Beam's four names that runs the pipeline over pickled elements in this process."""
    with pytest.raises(ConfigError, match="extra `beam`"):
        monkeypatch.setitem(sys.modules, "apache_beam", None)
        build.run_beam(config(tmp_path))
    (tmp_path / "apache_beam.py").write_text(
        textwrap.dedent(
            """
            import contextlib, pickle

            @contextlib.contextmanager
            def Pipeline(options=None):
                yield Elements([])

            class Elements(list):
                def __or__(self, stage):
                    return Elements(stage(self))

            Create = lambda values: lambda _: list(values)
            Reshuffle = lambda: lambda elements: list(reversed(elements))
            Map = lambda function: lambda elements: [pickle.loads(pickle.dumps(function))(e) for e in elements]
            """
        )
    )
    monkeypatch.delitem(sys.modules, "apache_beam")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build.run_beam(config(tmp_path / "stores")) == index.lookup(config(tmp_path / "stores"))
    assert contents(tmp_path / "stores") == contents(built)
    monkeypatch.delitem(sys.modules, "apache_beam")


def test_inputs_come_first_and_have_no_weight(registered: Any, tmp_path: Path) -> None:
    feature = registered.Feature(registered.ByteVocabulary(), add_eos=True)
    silent = dataclasses.replace(feature, add_eos=False)
    pairs = [{"inputs": "ask", "targets": "tell"}, {"inputs": "", "targets": "more"}]
    add_task(registered, "pairs", pairs, inputs=silent, targets=feature)
    dataset = open_dataset(
        config(
            tmp_path, "pairs", modules=(), packing=PackDocuments(), task_feature_lengths={"targets": 16}, shuffle=False
        )
    )
    batch = dataset.evaluation().read(0)
    text = [byte + 3 for byte in b"asktell"]
    assert np.asarray(batch.targets)[0, :13].tolist() == [*text, 1, *(byte + 3 for byte in b"more"), 1]
    assert np.asarray(batch.weights)[0].tolist() == [0] * 3 + [1] * 10 + [0] * 3
    assert np.asarray(batch.segments)[0].tolist() == [1] * 8 + [2] * 5 + [0] * 3


def test_eos_is_appended_where_the_task_did_not(registered: Any, tmp_path: Path) -> None:
    feature = registered.Feature(registered.PassThroughVocabulary(100), add_eos=False)
    add_task(registered, "ids", [{"targets": ids} for ids in ([5, 6], [7, 1], [], [1], [99])], True, targets=feature)
    open_dataset(config(tmp_path, "ids", modules=(), task_feature_lengths={"targets": 2}))
    store = stored(tmp_path)
    assert documents(store) == [[5, 6, 1], [7, 1], [99, 1]]
    assert store.manifest["parts"][0]["empty"] == 2
    assert store.vocabulary == PassThrough(100)


def test_sentencepiece_ids_are_seqios_and_the_model_goes_into_the_store(registered: Any, tmp_path: Path) -> None:
    text = "Für ▁ 12 \t tabs\n" + " ".join(f"word{i}" for i in range(50))
    model = tokenizer.train([text * 5], 285)
    (tmp_path / "model").write_bytes(model.model)
    vocabulary = registered.SentencePieceVocabulary(str(tmp_path / "model"))
    add_task(registered, "pieces", [{"targets": text}], targets=registered.Feature(vocabulary))
    open_dataset(config(tmp_path, "pieces", modules=()))
    (tmp_path / "model").unlink()  # the store no longer needs it
    store = stored(tmp_path)
    assert store.vocabulary == model
    assert documents(store) == [[*model.encode(text), 1]] == [[*vocabulary.encode(text), 1]]
    assert store.vocabulary.decode(documents(store)[0]) == text


def test_mixtures_are_flattened_and_their_rates_respected(registered: Any, tmp_path: Path) -> None:
    for name in ("one", "two", "three", "never"):
        add_task(registered, name, [{"targets": f"{name} {i}"} for i in range(40)])
    registered.MixtureRegistry.add("inner", [("two", 1), ("three", lambda task: 3.0)])
    registered.MixtureRegistry.add("outer", [("one", 6), ("inner", 2), ("never", 0)])
    settings = config(tmp_path, "outer", modules=())
    dataset = open_dataset(settings)
    sources = index.lookup(settings)
    assert sources is not None
    assert {source.task: source.rate for source in sources} == {"one": 6.0, "two": 0.5, "three": 1.5}
    tasks = [task for step in range(200) for task, _, _ in dataset.locate(step)]
    assert {task: tasks.count(task) for task in set(tasks)} == {"one": 600, "two": 50, "three": 150}


def test_stores_are_shared_and_told_apart_by_what_they_hold(module: Path, built: Path, tmp_path: Path) -> None:
    sources = build.plan(config(built))[0]
    assert build.plan(config(built, task_feature_lengths={"targets": 9}, seed=4, batch_size=9))[0] == sources
    assert index.lookup(config(built, modules=("lines_tasks", "os"))) is None  # seqio would have to be asked
    assert build.build_stores(config(built, modules=("lines_tasks", "os"))) == sources  # but nothing is built
    assert build.plan(config(built, modules=("lines_tasks", "build_lines")))[0] != sources  # a source of its own
    assert build.plan(config(built, use_cached=True))[0] != sources


def test_files_that_changed_are_read_again_and_files_that_are_gone_are_not_missed(
    registered: Any, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one\ntwo\n")
    registered.TaskRegistry.add(
        "own_lines",
        registered.TextLineDataSource({"train": str(tmp_path / "*.txt")}),
        preprocessors=[lambda ds: ds.map(lambda line: {"targets": line}), registered.preprocessors.tokenize],
        output_features={"targets": registered.Feature(registered.ByteVocabulary())},
    )
    settings = config(tmp_path / "stores", "own_lines", modules=(), task_feature_lengths={"targets": 4})
    before = open_dataset(settings).tokens_total
    assert index.lookup(settings)
    os.utime(text)  # as of a copy
    assert index.lookup(settings)
    text.write_text("one\ntwo\nthree\n")
    assert index.lookup(settings) is None
    assert open_dataset(settings).tokens_total == before + len("three") + 1  # EOS
    (tmp_path / "more.txt").write_text("four\n")
    assert index.lookup(settings) is None
    found = build.build_stores(settings)
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    assert index.lookup(settings) == found


def mistakes(seqio: Any) -> dict[str, tuple[dict[str, Any], str]]:
    """Config changes and the message that each must give."""
    eos = seqio.Feature(seqio.ByteVocabulary())
    add_task(seqio, "good", [{"targets": "text"}])
    add_task(seqio, "empty", [{"targets": ""}] * 3)
    add_task(seqio, "none", [])
    add_task(seqio, "inputs_only", [{"inputs": "text"}], inputs=eos)
    add_task(seqio, "extra_ids", [{"targets": "a"}], targets=seqio.Feature(seqio.ByteVocabulary(extra_ids=9)))
    mixed = {"inputs": seqio.Feature(seqio.ByteVocabulary(extra_ids=9)), "targets": eos}
    add_task(seqio, "two_vocabularies", [{"inputs": "a", "targets": "b"}], **mixed)
    add_task(seqio, "codepoints", [{"targets": "a"}], targets=seqio.Feature(seqio.FullCodepointVocabulary()))
    missing_model = seqio.SentencePieceVocabulary("/nowhere/sp.model")
    add_task(seqio, "no_model", [{"targets": "a"}], targets=seqio.Feature(missing_model))
    too_large = seqio.Feature(seqio.PassThroughVocabulary(10))
    add_task(seqio, "too_large", [{"targets": [3, 10]}], True, targets=too_large)
    add_task(seqio, "absent", [{"targets": "a"}], targets=eos, inputs=eos)
    seqio.TaskRegistry.add(
        "no_files", seqio.TextLineDataSource({"train": "/nowhere/*.txt"}), output_features={"targets": eos}
    )
    seqio.TaskRegistry.add(
        "failing",
        seqio.TextLineDataSource({"train": __file__}),
        preprocessors=[lambda dataset: dataset.map(lambda example: example["target"])],
        output_features={"targets": eos},
    )
    seqio.MixtureRegistry.add("differing", [("good", 1), ("extra_ids", 1)])
    seqio.MixtureRegistry.add("uncounted", ["good"], default_rate=seqio.mixing_rate_num_examples)
    seqio.MixtureRegistry.add("negative", [("good", -1)])
    seqio.MixtureRegistry.add("zero", [("good", 0)])
    return {
        "god": ({}, "no seqio Task or Mixture named 'god'; nearest: good"),
        "good": ({"split": "test"}, "'good' has no split 'test'; it has: train, validation"),
        "empty": ({}, "task 'empty', split 'train' has no text: all of its 3 documents are empty"),
        "none": ({}, "task 'none', split 'train' has no text: its source gives no documents"),
        "inputs_only": ({}, "task 'inputs_only' has no feature 'targets'; its features are: inputs"),
        "two_vocabularies": ({}, "'inputs' and 'targets' differ in vocabulary"),
        "codepoints": ({}, "task 'codepoints' uses FullCodepointVocabulary"),
        "no_model": ({}, "task 'no_model': cannot load the SentencePiece model '/nowhere/sp.model'"),
        "too_large": ({}, "task 'too_large', split 'train': token id 10 is outside the vocabulary of 10 ids"),
        "absent": ({}, "task 'absent', split 'train': Task dataset is missing expected output feature .*: inputs"),
        "no_files": ({}, "task 'no_files', split 'train': its source has no files"),
        "failing": ({}, r"task 'failing', split 'train': \w+: .* \(.*test_build.py:\d+\)"),
        "differing": ({}, "tasks of mixture 'differing' differ in vocabulary: extra_ids, good"),
        "uncounted": ({}, "mixture 'uncounted': the rate of task 'good' cannot be computed"),
        "negative": ({}, "mixture 'negative': the rate of task 'good' is -1.0"),
        "zero": ({}, "all rates of mixture 'zero' are 0"),
        "any": ({"modules": ("no_such_module",)}, "module 'no_such_module', .* cannot be imported: No module named"),
    }


def test_every_mistake_has_its_message(registered: Any, tmp_path: Path) -> None:
    for name, (changes, message) in mistakes(registered).items():
        with pytest.raises(ConfigError, match=message) as caught:
            open_dataset(config(tmp_path, name, **({"modules": ()} | changes)))
        assert str(caught.value).count("\n") <= 1, caught.value
    assert not list(tmp_path.glob("**/store.json"))


def test_a_folder_that_cannot_be_written_is_told(module: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        ConfigError, match=r"cannot write the token store .*file/stores/lines/train-.*: .*Not a directory"
    ):
        open_dataset(config(tmp_path / "file" / "stores"))
    with pytest.raises(ConfigError, match="cannot open the folder nowhere://stores"):
        open_dataset(dataclasses.replace(config(tmp_path), store_dir="nowhere://stores"))


def test_a_random_preprocessor_is_seeded(registered: Any, tmp_path: Path) -> None:
    import tensorflow as tf

    @registered.map_over_dataset(num_seeds=1)
    def draw(example: Any, seed: Any) -> Any:
        return {"targets": tf.random.stateless_uniform([20], seed, 3, 99, tf.int32)}

    def numbers(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        return tf.data.Dataset.range(9).map(lambda i: {"targets": [i]})

    registered.TaskRegistry.add(
        "draws",
        source=registered.FunctionDataSource(numbers, splits=["train"]),
        preprocessors=[draw],
        output_features={"targets": registered.Feature(registered.PassThroughVocabulary(100))},
    )
    first, second = (open_dataset(config(tmp_path / part, "draws", modules=())).fingerprint for part in ("a", "b"))
    assert first == second
