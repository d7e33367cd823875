"""A palmjax checkpoint made from another stack's tensors: the folder that `generate`, `eval` and `train` open."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from palmjax import provenance
from palmjax.checkpoint import seal
from palmjax.checkpoint.arrays import Writer
from palmjax.config import ConfigError, Experiment
from palmjax.data.vocabulary import Vocabulary
from palmjax.interop.mapping import Path as ParameterPath
from palmjax.interop.mapping import leaves
from palmjax.interop.staging import Staging
from palmjax.model_dir import PREFIX, lock, newest
from palmjax.models.decoder import Decoder

_HANDLER = "orbax.checkpoint._src.handlers"


def full_shapes(model: Decoder) -> dict[ParameterPath, tuple[int, ...]]:
    """Shape of every parameter by path, the padding of the vocabulary included."""
    return {path: tuple(leaf.shape) for path, leaf in leaves(model.build().abstract_params()).items()}


class Converted:
    """One checkpoint being written. `writer` takes the arrays; `arrays` gets the shape and dtype of each."""

    def __init__(self, staging: Staging):
        self.staging, self.writer = staging, Writer(staging.folder / "state")
        self.arrays: dict[ParameterPath, tuple[str, tuple[int, ...]]] = {}

    def commit(self, info: provenance.RunInfo) -> None:
        """Writes what is beside the arrays and gives the checkpoint its name."""
        folder = self.staging.folder
        self.writer.finish(self.arrays)
        (folder / "info").mkdir(exist_ok=True)
        (folder / "info" / "metadata").write_text(json.dumps(info.to_json()))
        now = time.time_ns()
        metadata = {
            "item_handlers": {
                "state": f"{_HANDLER}.pytree_checkpoint_handler.PyTreeCheckpointHandler",
                "info": f"{_HANDLER}.json_checkpoint_handler.JsonCheckpointHandler",
            },
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }
        (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
        (folder / "commit_success.txt").write_text(f"Checkpoint commit was successful to {self.staging.final}")
        seal.write(folder)
        self.staging.commit()

    def described(self) -> dict[str, str]:
        """Name and type of every array, as `checkpoint.describe` gives them."""
        return {"/".join(name): f"{dtype}[{','.join(map(str, shape))}]" for name, (dtype, shape) in self.arrays.items()}


@contextlib.contextmanager
def into(folder: Path, step: int, identity: Mapping[str, Any]) -> Iterator[Converted]:
    """A checkpoint of `step` in the MODEL_DIR `folder`, new or begun by an earlier attempt.

    Raises ConfigError if the folder has checkpoints, or another process works in it.
    """
    if (there := newest(folder)) is not None:
        raise ConfigError(f"{folder} already holds {PREFIX}{there}; choose another folder")
    with lock(folder):
        yield Converted(Staging(folder / f"{PREFIX}{step}", identity))


def run_info(
    experiment: Experiment,
    operative: str,
    flat: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    step: int,
    arrays: Mapping[str, str],
) -> provenance.RunInfo:
    """The checkpoint's `info`: no data were read yet, and one device made it."""
    return provenance.RunInfo(
        seed=experiment.train.seed,
        data=provenance.DataPosition(first_row=0),
        config=operative,
        flat_config={name: repr(value) for name, value in flat.items()},
        vocabulary=vocabulary,
        mesh={"data": 1, "fsdp": 1, "tensor": 1},
        code=provenance.code_version(),
        libraries=provenance.library_versions(),
        step=step,
        arrays=arrays,
    )
