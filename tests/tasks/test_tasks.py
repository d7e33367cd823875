"""The tasks that ship: what they read, how they hold text out, and what they say about files that are broken."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from palmjax import tokenizer
from palmjax.config import ConfigError, DatasetConfig, TaskPart
from palmjax.data import index
from palmjax.data.batch import PackDocuments
from palmjax.data.build import import_seqio
from palmjax.data.feed import open_dataset
from palmjax.data.store import TokenStore
from tasks import documents
from tasks.jsonl import JsonLines
from tasks.python_stdlib import PythonStdlib
from tasks.text_files import TextFiles
from tasks.tfds import Tfds


def config(store_dir: Path, task: Any, split: str = "train") -> DatasetConfig:
    return DatasetConfig(
        mixture_or_task_name=task.name,
        task_feature_lengths={"targets": 64},
        batch_size=2,
        packing=PackDocuments(),
        store_dir=str(store_dir / "stores"),
        split=split,
        tasks=(task,),
    )


def texts(store_dir: Path, task: Any, split: str = "train") -> list[str]:
    """Every document of a split, by way of its store."""
    settings = config(store_dir, task, split)
    open_dataset(settings)
    (source,) = index.lookup(settings) or []
    store = TokenStore(f"{settings.store_dir}/{source.path}")
    tokens, _ = store.read(np.array([0]), np.array([store.num_tokens]), store.num_tokens)
    return [store.vocabulary.decode(piece) for piece in np.split(tokens[0], store.document_ends()[:-1])]


def test_every_task_is_a_task_part() -> None:
    paths = {"name": "a", "paths": ("b",)}
    for task in (PythonStdlib(), TextFiles(**paths), JsonLines(**paths), Tfds(name="a", tfds_name="b:1.0.0")):
        assert isinstance(task, TaskPart)


def test_the_standard_library_is_read_and_split_by_content(tmp_path: Path) -> None:
    task = PythonStdlib(max_megabytes=1.5, validation_share=0.1)
    train, validation = texts(tmp_path, task), texts(tmp_path, task, "validation")
    assert len(train) > 10 and not {*train} & {*validation}
    held = sum(map(len, validation)) / sum(map(len, train + validation))
    assert 0 < held < 0.5
    assert 1.2e6 < sum(len(text.encode()) for text in train + validation) <= 1.5e6
    assert all(documents.held_out(text, 0.1) for text in validation)
    assert any("def " in text for text in train)
    assert len(PythonStdlib()._files()) > 500
    assert not [path for path in PythonStdlib()._files() if "site-packages" in path]
    with pytest.raises(ConfigError, match=r"'python_stdlib': max_megabytes is 1e-06: too little"):
        texts(tmp_path, PythonStdlib(max_megabytes=1e-6))


def test_text_files_are_a_document_each_or_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second\r\nfile", newline="")
    (tmp_path / "sub" / "a.txt").write_text("one\n\ntwo\n")
    paths = (f"{tmp_path}/**/*.txt", f"{tmp_path}/b.txt")
    task = TextFiles(name="files", paths=paths, validation_share=0)
    assert texts(tmp_path, task) == ["second\r\nfile", "one\n\ntwo\n"]
    task = TextFiles(name="files", paths=paths, validation_share=0, lines=True)
    assert texts(tmp_path, task) == ["second", "file", "one", "two"]
    task = TextFiles(name="files", paths=paths[1:], validation_paths=(f"{tmp_path}/sub/*",))
    assert (texts(tmp_path, task), texts(tmp_path, task, "validation")) == (["second\r\nfile"], ["one\n\ntwo\n"])


def test_documents_are_held_out_by_content(tmp_path: Path) -> None:
    lines = [f"line {i // 2}" for i in range(2000)]  # every line twice
    (tmp_path / "a.txt").write_text("\n".join(lines))
    task = TextFiles(name="repeated", paths=(f"{tmp_path}/a.txt",), lines=True, validation_share=0.2)
    train, validation = texts(tmp_path, task), texts(tmp_path, task, "validation")
    assert sorted(train + validation) == sorted(lines)
    assert not {*train} & {*validation}
    assert 0.16 < len(validation) / 2000 < 0.24


def test_json_lines_plain_gzip_and_zstandard(tmp_path: Path) -> None:
    data = "\n".join(json.dumps({"text": f"é {i}", "n": i}) for i in range(3)).encode() + b"\n\n"
    (tmp_path / "1.jsonl").write_bytes(data)
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "3.jsonl.zst").write_bytes(zstandard.compress(data[:20]) + zstandard.compress(data[20:]))
    task = JsonLines(name="json", paths=(f"{tmp_path}/*.jsonl*",), validation_share=0)
    assert texts(tmp_path, task) == [f"é {i}" for i in range(3)] * 3


def test_json_inputs_are_conditioned_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "2+2=", "answer": "4"}) * 1)
    files = (f"{tmp_path}/a.jsonl",)
    task = JsonLines(name="qa", paths=files, key="answer", inputs_key="question", validation_share=0)
    batch = open_dataset(config(tmp_path, task)).evaluation().read(0)
    assert np.asarray(batch.targets)[0, :6].tolist() == [*(byte + 3 for byte in b"2+2=4"), 1]
    assert np.asarray(batch.weights)[0, :7].tolist() == [0, 0, 0, 0, 1, 1, 0]


def test_a_sentencepiece_model_can_be_named(tmp_path: Path) -> None:
    text = "some words, some more words, and some other words " * 3
    model = tokenizer.train([text * 3], 273)
    (tmp_path / "sp.model").write_bytes(model.model)
    (tmp_path / "a.txt").write_text(text)
    task = TextFiles(
        name="words",
        paths=(f"{tmp_path}/a.txt",),
        validation_share=0,
        sentencepiece_model=str(tmp_path / "sp.model"),
    )
    assert texts(tmp_path, task) == [text]
    assert open_dataset(config(tmp_path, task)).vocabulary == model
    (tmp_path / "sp.model").unlink()
    with pytest.raises(ConfigError, match=r"task 'words': no file matches '.*sp\.model'"):
        open_dataset(config(tmp_path / "elsewhere", task))


def test_tfds_examples_are_documents(tmp_path: Path) -> None:
    import_seqio()
    import tensorflow as tf
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "n": np.int64})
    examples = tf.data.Dataset.range(5).map(lambda n: {"body": tf.strings.format("example {}", n), "n": n})

    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny",
        version="1.0.0",
        features=features,
        split_datasets={"train": examples},
        data_dir=tmp_path / "data",
        disable_shuffling=True,
    )
    task = Tfds(name="tiny_task", tfds_name="tiny:1.0.0", key="body", data_dir=str(tmp_path / "data"))
    assert texts(tmp_path, task) == [f"example {i}" for i in range(5)]
    with pytest.raises(ConfigError, match="no split 'validation'; it has: train"):
        texts(tmp_path, task, "validation")
    with pytest.raises(ConfigError, match="tfds_name 'tiny' has no version"):
        texts(tmp_path, Tfds(name="tiny_task", tfds_name="tiny"))


def json_lines(*lines: bytes) -> dict[str, bytes]:
    return {"a.jsonl": b'{"text": "fine"}\n' + b"\n".join(lines)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"fine", "b.txt": b"ab\xffcd"}, r"b\.txt is not UTF-8 text: invalid start byte at byte 2"),
        ({"a.txt": b"a\0b"}, r"a\.txt is not text but binary: it has a NUL at byte 1"),
        ({"a.txt": b"", "b.txt": b""}, "has no text: all of its 2 documents are empty"),
        ({"a.txt": b"a canary GUID 0a1b2c3d-4e b"}, r"a\.txt has text of a benchmark that asks not to be trained on"),
        ({}, r"task 'broken': no file matches '.*\*\.txt'"),
        (json_lines(b"{oops"), r"a\.jsonl, line 2, is not JSON: Expecting property name"),
        (json_lines(b'{"body": "x"}'), r"a\.jsonl, line 2, has no key 'text'; its keys are: body"),
        (json_lines(b'{"text": 3}'), r"a\.jsonl, line 2, has int under 'text', not text"),
        (json_lines(b"", b"[1]"), r"a\.jsonl, line 3, holds no JSON object but list"),
        (json_lines(b'{"text": "\xff"}'), r"a\.jsonl, line 2, is not UTF-8 text"),
        ({"a.jsonl.gz": gzip.compress(b'{"text": "fine"}' * 99)[:-9]}, r"a\.jsonl\.gz cannot be decompressed"),
        ({"a.jsonl.gz": b'{"text": "plain"}'}, r"a\.jsonl\.gz cannot be decompressed: Not a gzipped file"),
        ({"a.jsonl.zst": b'{"text": "plain"}'}, r"a\.jsonl\.zst cannot be decompressed"),
        ({"a.jsonl.zst": zstandard.compress(b'{"text": "fine"}' * 99)[:-4]}, r"a\.jsonl\.zst cannot be decompressed"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    kind, pattern = (JsonLines, "*.jsonl*") if any("jsonl" in name for name in files) else (TextFiles, "*.txt")
    task = kind(name="broken", paths=(f"{tmp_path}/{pattern}",), validation_share=0)
    with pytest.raises(ConfigError, match=message) as caught:
        open_dataset(config(tmp_path, task))
    assert str(caught.value).count("\n") == 0
    assert not list(tmp_path.glob("**/store.json"))


def test_a_name_that_is_taken_or_a_share_that_is_none_is_refused(tmp_path: Path) -> None:
    seqio = import_seqio()
    (tmp_path / "a.txt").write_text("text")
    paths = (f"{tmp_path}/a.txt",)
    if "taken" not in seqio.TaskRegistry.names():
        feature = {"targets": seqio.Feature(seqio.ByteVocabulary())}
        seqio.TaskRegistry.add("taken", seqio.TextLineDataSource({"train": paths[0]}), output_features=feature)
    with pytest.raises(ConfigError, match="task 'taken': a task of this name is registered already"):
        open_dataset(config(tmp_path, TextFiles(name="taken", paths=paths)))
    with pytest.raises(ConfigError, match=r"validation_share is 1\.5; it must be in \[0, 1\)"):
        open_dataset(config(tmp_path, TextFiles(name="share", paths=paths, validation_share=1.5)))


def test_changed_files_are_another_store_and_lost_ones_are_not_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    task = TextFiles(name="changing", paths=(str(file),), validation_share=0)
    file.write_text("first version, long enough for a row")
    assert texts(tmp_path, task) == ["first version, long enough for a row"]
    file.write_text("second version, of another size")
    assert texts(tmp_path, task) == ["second version, of another size"]
    file.unlink()
    assert texts(tmp_path, task) == ["second version, of another size"]
    assert "using the token stores built from it before" in capsys.readouterr().err


def test_large_collections_are_cut_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SHARD_BYTES", 100)
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02} " + "x" * 30)
    task = TextFiles(name="sharded", paths=(f"{tmp_path}/*.txt",), validation_share=0)
    found = texts(tmp_path, task)
    assert found == [f"{i:02} " + "x" * 30 for i in range(20)]
    (manifest,) = tmp_path.glob("stores/sharded/*/store.json")
    assert len(json.loads(manifest.read_text())["parts"]) == 7  # three files of 33 bytes in each shard of 100


def test_tasks_import_nothing_heavy() -> None:
    import subprocess

    modules = ", ".join(f"tasks.{name}" for name in ("python_stdlib", "text_files", "jsonl", "tfds"))
    heavy = "{'tensorflow', 'seqio', 'jax', 'numpy', 'palmjax', 'zstandard'}"
    program = f"import sys, {modules}; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
