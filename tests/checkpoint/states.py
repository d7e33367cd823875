"""States, configurations and checkpoints for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palmjax.checkpoint import Checkpointer
from palmjax.config import SaveCheckpointConfig
from palmjax.data.vocabulary import Bytes, Vocabulary
from palmjax.provenance import DataPosition, RunInfo, code_version, library_versions
from palmjax.state import TrainState, init_state

ROOT = Path(__file__).parents[2]


def info(vocabulary: Vocabulary | None = None) -> RunInfo:
    return RunInfo(
        seed=7,
        data=DataPosition(first_row=96, skips=((10, 20), (40, 44)), fingerprint="abc"),
        config="# gin\nSEED = 7\n",
        flat_config={"Experiment.train.seed": "7"},
        vocabulary=vocabulary or Bytes(),
        mesh={"data": 2, "fsdp": 2, "tensor": 1},
        code=code_version(),
        libraries=library_versions(),
    )


def mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)


SPECS = {"embedding": P(None, "fsdp"), "kernel": P("fsdp", "data"), "scale": P(None)}


def make_params(width: int = 16) -> dict:
    """Values with NaN payloads, denormals and negative zeros: equality below is of bits."""
    bits = np.random.default_rng(0).integers(0, 2**32, (24, width), np.uint32)
    return {
        "token_embedder": {"embedding": bits.view(np.float32)},
        "decoder": {
            "layers": {"kernel": bits[:16].view(np.float32)},
            "scale": np.array([-0.0, 1e-44, 1, 2], np.float32),
        },
    }


def on_mesh(where: Mesh, params: dict) -> dict:
    def put(path: tuple, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, NamedSharding(where, SPECS[path[-1].key]))

    return jax.tree_util.tree_map_with_path(put, params)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.trace(0.9))


def make_state(where: Mesh, width: int = 16, optimizer: optax.GradientTransformation = OPTIMIZER) -> TrainState:
    with jax.set_mesh(where):
        state = jax.jit(lambda p: init_state(p, optimizer, jax.random.key(5)))(on_mesh(where, make_params(width)))
        return state.replace(step=state.step + 3)


def abstract(state: TrainState, where: Mesh | None = None) -> TrainState:
    def leaf(x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if where is None else NamedSharding(where, x.sharding.spec)  # pyright: ignore
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)


def assert_same_bits(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def save_one(folder: Path, step: int = 3, state: TrainState | None = None, **options: Any) -> TrainState:
    state = make_state(mesh(2, 2)) if state is None else state
    saver = Checkpointer(str(folder), SaveCheckpointConfig(**options))
    saver.save(step, state, info())
    saver.close()
    return state
