"""Which store a config means when its task comes from a user's module: found by the module's text, without seqio."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from palmjax.config import DatasetConfig
from palmjax.data import build, index
from palmjax.data.batch import ConcatenateAndCut
from palmjax.data.vocabulary import Bytes

TASKS = "raise AssertionError('imported')\nUPPER = False\n"


def config(**changes: Any) -> DatasetConfig:
    values = {
        "mixture_or_task_name": "books",
        "task_feature_lengths": {"targets": 64},
        "batch_size": 4,
        "packing": ConcatenateAndCut(),
        "store_dir": "stores",
        "modules": ("shelf.my_tasks",),
    }
    return DatasetConfig(**(values | changes))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in a package, on the path; importing either raises."""
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "shelf" / "my_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "shelf" / "my_tasks.py"


def names(**changes: Any) -> tuple[str, str]:
    """The index entry and the store's fingerprint."""
    wanted = config(**changes)
    job = build.StoreJob("books", "train", False, wanted.modules, wanted.tasks, "", 5)
    return index._entry_name(wanted), build._store_fingerprint(job, Bytes(), "")


def test_a_changed_module_is_another_entry_and_another_store(module: Path) -> None:
    entry, store = names()
    assert names() == (entry, store), "unchanged"
    module.write_text(TASKS.replace("False", "True"))
    assert names()[0] != entry and names()[1] != store
    module.write_text(TASKS)
    assert names() == (entry, store), "as it was before"


def test_the_digest_is_of_the_file_and_a_module_that_is_not_found_counts_by_its_name(module: Path) -> None:
    sources = index.sources_of(["shelf.my_tasks", "shelf", "no.such", "sys", "shelf.none"])
    assert sources["shelf.my_tasks"] == hashlib.sha256(TASKS.encode()).hexdigest()
    assert sources["shelf"] == hashlib.sha256((module.parent / "__init__.py").read_bytes()).hexdigest()
    assert sources["no.such"] == sources["sys"] == sources["shelf.none"] == ""
    other = [names(modules=("no.such",)), names(modules=("no.other",)), names(modules=())]
    assert len({entry for entry, _ in other}) == 3
    assert len({store for _, store in other}) == 1


def test_a_task_made_from_values_does_not_depend_on_modules(module: Path) -> None:
    from tasks.text_files import TextFiles

    (module.parent / "a.txt").write_text("text")
    tasks = (TextFiles(name="books", paths=str(module.parent / "a.txt")),)
    before = names(tasks=tasks)
    module.write_text(TASKS.replace("False", "True"))
    assert names(tasks=tasks) == before


RUN = """
    import sys
    from palmjax.config import DatasetConfig
    from palmjax.data.batch import ConcatenateAndCut
    from palmjax.data.feed import open_dataset

    dataset = open_dataset(DatasetConfig(mixture_or_task_name="books", task_feature_lengths={"targets": 16},
        batch_size=1, packing=ConcatenateAndCut(), shuffle=False, store_dir="stores", modules=("my_tasks",)))
    tokens = dataset.read(0).targets[0].tolist()
    print("seqio" in sys.modules, dataset.vocabulary.decode(tokens).strip("\\0")[:5])
"""
MODULE = """
    import seqio, tensorflow as tf

    def change(dataset):
        return dataset.map(lambda text: {"targets": tf.strings.lower(text)})

    seqio.TaskRegistry.add(
        "books",
        source=seqio.TextLineDataSource({"train": "text.txt"}),
        preprocessors=[change, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
    )
"""


def test_a_changed_preprocessor_never_trains_from_the_old_store(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Hello, a line that is long enough for a row\n")
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN))
    (tmp_path / "my_tasks.py").write_text(textwrap.dedent(MODULE))
    root = str(Path(__file__).parents[2])

    def run() -> str:
        command = [sys.executable, "run.py"]
        done = subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run() == "True hello"
    assert run() == "False hello", "unchanged: the store is found without seqio"
    (tmp_path / "my_tasks.py").write_text(textwrap.dedent(MODULE.replace("lower", "upper")))
    assert run() == "True HELLO"
