"""T5X checkpoints to palmjax's and back, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from palmjax.checkpoint.arrays import Reader
from palmjax.config import ConfigError
from palmjax.interop import layout, mapping
from palmjax.interop.huggingface.family import architecture, parameter_shapes
from palmjax.interop.mapping import Tensor
from palmjax.interop.staging import Staging
from palmjax.interop.t5x import names, reading
from palmjax.interop.t5x.writing import Writer
from palmjax.interop.transfer import Count
from palmjax.models.decoder import Decoder
from palmjax.models.layers import DenseFeedForward

MOMENTS = ("m", "v")
"""What palmjax's Adafactor keeps of each parameter, under T5X's names; unfactored, as PaLM trained."""


def plan(model: Decoder, form: names.Form, where: str) -> dict[str, Tensor]:
    """T5X's arrays of a model by name, "decoder/layers_0/mlp/wo/kernel"."""
    shapes = parameter_shapes(model)
    return mapping.plan(form.rules(shapes), shapes, {}, where)


def form_of(model: Decoder) -> names.Form:
    """The names under which a model goes to T5X: its own network's where that has this model, else palmjax's."""
    with contextlib.suppress(ConfigError):  # another network's
        shapes = {tuple(name.split("/")): tensor.shape for name, tensor in plan(model, names.T5X, "T5X").items()}
        mlp = model.block.layers[0].mlp
        if isinstance(mlp, DenseFeedForward):
            theirs = names.Tree(shapes, "T5X").model(mlp.activation)
            if architecture(theirs) == architecture(model):
                return names.T5X
    return names.PALMJAX


def check(checkpoint: reading.Checkpoint, planned: Mapping[str, Tensor]) -> None:
    """Raises ConfigError, naming the array, unless the checkpoint's parameters are those that were planned."""
    found = {"/".join(name): array for name, array in checkpoint.target.items()}
    mapping.check_tensors(planned, found, reading.FLOATS, (), f"the model of {checkpoint.path}")


class Arrays:
    """A checkpoint's parameters as `transfer.Source`; one is in memory at a time."""

    def __init__(self, arrays: Mapping[tuple[str, ...], reading.LazyArray]):
        self._arrays = {"/".join(name): array for name, array in arrays.items()}
        self._held: tuple[str, np.ndarray] | None = None

    def array(self, name: str) -> np.ndarray:
        if self._held is None or self._held[0] != name:
            self._held = None
            self._held = name, np.ascontiguousarray(self._arrays[name].read())
        return self._held[1]

    def forget(self, name: str) -> None:
        """Kept until another one is asked for: it would have to be read again."""


def has_moments(reader: Reader) -> bool:
    """Whether a palmjax checkpoint holds the moments of its Adafactor."""
    return all(any(name.startswith(f"opt_state.{moment}.") for name in reader.names) for moment in MOMENTS)


def send(
    planned: Mapping[str, Tensor], reader: Reader, staging: Staging, count: Count, *, dtype: str, step: int
) -> None:
    """Writes palmjax's arrays as a legacy T5X checkpoint; `dtype` is that of the parameters.

    With the moments of palmjax's Adafactor, if the checkpoint has them: then T5X's Adafactor goes on from it.
    """
    writer, moments = Writer(staging.folder), has_moments(reader)
    target: dict[tuple[str, ...], Any] = {}
    states: dict[tuple[str, ...], Any] = {}
    for tensor in planned.values():
        path = tuple(tensor.name.split("/"))
        name = ("target", *path)
        target[path] = writer.spec(name, tensor.shape, dtype)
        _send_one(writer, tensor, reader, "params", name, dtype, staging, count)
        if not moments:
            continue
        for moment in MOMENTS:
            name = ("state", "param_states", *path, moment)
            states[(*path, moment)] = writer.spec(name, tensor.shape, "float32")
            _send_one(writer, tensor, reader, f"opt_state.{moment}", name, "float32", staging, count)
        for empty in ("v_row", "v_col"):  # of factored moments, which these are not
            states[(*path, empty)] = np.zeros((1,), np.float32)
    writer.finish(step, target, states)


def _send_one(
    writer: Writer,
    tensor: Tensor,
    reader: Reader,
    root: str,
    name: tuple[str, ...],
    dtype: str,
    staging: Staging,
    count: Count,
) -> None:
    key = ".".join(name)
    if key not in staging.done:
        array = np.empty(tensor.shape, _numpy(dtype))
        for part in tensor.parts:
            view = layout.View.of(array, part.pattern, part.sizes, part.take)
            store: Any = reader.open(".".join((root, *part.parameter)))
            block = tuple(slice(0, size) for size in view.shape)
            try:
                values = store[(*part.index, *block)].read().result()
            except ValueError as error:
                raise ConfigError(f"the checkpoint is damaged: {str(error).splitlines()[0][:200]}") from error
            view.write(block, values)
        writer.write(name, array)
        staging.finished([key])
    count(4 * int(np.prod(tensor.shape)))


def _numpy(dtype: str) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def source_files(checkpoint: reading.Checkpoint) -> list[Path]:
    """Files that tell whether a checkpoint is still the one it was."""
    legacy = checkpoint.path / reading.LEGACY
    return [legacy] if legacy.exists() else [checkpoint.path / "state" / "_METADATA"]
