"""A trained model, opened from its checkpoint on the devices of this job: where `eval` and `generate` begin."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from palmjax import checkpoint, mesh, sharding
from palmjax.config import ConfigError, Experiment, section
from palmjax.models.api import LanguageModel
from palmjax.provenance import RunInfo


@contextlib.contextmanager
def config_file(path: str, info: RunInfo) -> Iterator[str]:
    """A gin file, gone after the block, with the configuration that the checkpoint at `path` carries.

    Raises ConfigError if it carries none: the run was started from Python.
    """
    if not info.config.strip():
        raise ConfigError(f"{path} carries no gin configuration: its run was started from Python, so restore it there")
    with tempfile.TemporaryDirectory(prefix="palmjax-") as folder:
        file = Path(folder) / f"{Path(path).name}.gin"
        file.write_text(info.config)
        yield str(file)


@section
class Trained:
    """A checkpoint's model, laid out for `mesh`; `params()` reads the parameters. path: of the checkpoint folder."""

    path: str
    info: RunInfo
    experiment: Experiment
    model: LanguageModel
    mesh: Mesh

    def params(self) -> Any:
        """The parameters, read onto the mesh; no optimizer state is read.

        Raises ConfigError if a mesh axis does not divide a dimension, or the checkpoint is damaged or of another model.
        """
        rules = self.experiment.sharding
        abstract = sharding.abstract_state(lambda: self.model.init(jax.random.key(0)), self.mesh, rules)
        return checkpoint.restore_params(self.path, abstract)


def open_checkpoint(path: str, info: RunInfo, experiment: Experiment) -> Trained:
    """The model of `experiment`, the checkpoint's own one or that with changes, on this job's devices.

    Raises ConfigError, with the flags that help, if the experiment's mesh does not fit the devices.
    """
    try:
        placed = mesh.build(experiment.mesh)
    except ConfigError as error:
        trained_on = ", ".join(f"{axis}={size}" for axis, size in info.mesh.items())
        flags = " ".join(f"--gin.MeshConfig.{axis}={-1 if axis == 'data' else 1}" for axis in mesh.AXES)
        raise ConfigError(f"{error}\nThe run's mesh was {trained_on}; choose one that fits, such as {flags}") from error
    return Trained(path=path, info=info, experiment=experiment, model=experiment.model.build(), mesh=placed)


def enable_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, unless the environment names another (JAX_COMPILATION_CACHE_DIR)."""
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
