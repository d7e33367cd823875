"""A dataset of the TensorFlow Datasets catalogue as a task. Imports seqio lazily."""

from __future__ import annotations

import dataclasses
import functools

from tasks import documents
from tasks.objectives import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """Text of a TensorFlow Datasets dataset, an example each document.

    tfds_name: name, config and version, such as "c4/en:3.0.1"; the version is what identifies the content.
    key: the feature that holds the text. inputs_key: as in `tasks.jsonl.JsonLines`. data_dir: where the datasets are.
    sentencepiece_model: path of a model; None: bytes. Splits are the dataset's own.
    """

    name: str
    tfds_name: str
    key: str = "text"
    inputs_key: str | None = None
    data_dir: str | None = None
    sentencepiece_model: str | None = None
    objective: Objective | None = None

    def content_key(self) -> str:
        return documents.digest(documents.model_state(self.sentencepiece_model))

    def build(self) -> str:
        """Registers the task and returns its name. Raises ValueError if tfds_name has no version."""
        import seqio

        if ":" not in self.tfds_name:
            raise ValueError(f"tfds_name {self.tfds_name!r} has no version; write it as in 'c4/en:3.0.1'")
        keys = {"targets": self.key} | ({"inputs": self.inputs_key} if self.inputs_key else {})
        source = seqio.TfdsDataSource(tfds_name=self.tfds_name, tfds_data_dir=self.data_dir)
        rekey = functools.partial(seqio.preprocessors.rekey, key_map=keys)
        return documents.register_source(
            self.name, source, bool(self.inputs_key), self.sentencepiece_model, (rekey,), self.objective
        )
