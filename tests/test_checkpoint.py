"""Checkpoints: what is saved comes back bit for bit, on any mesh; what does not fit is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from palmjax import checkpoint, model_dir
from palmjax.checkpoint import Checkpointer, SaveError
from palmjax.config import ConfigError, SaveCheckpointConfig
from palmjax.data.vocabulary import Bytes, SentencePiece, Vocabulary
from palmjax.provenance import DataPosition, RunInfo, code_version, library_versions
from palmjax.state import TrainState, init_state

ROOT = Path(__file__).parent.parent


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


def save_one(folder: Path, step: int = 3, state: TrainState | None = None, **options: int) -> TrainState:
    state = make_state(mesh(2, 2)) if state is None else state
    saver = Checkpointer(str(folder), SaveCheckpointConfig(**options))
    saver.save(step, state, info())
    saver.close()
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MODEL_DIR with checkpoint_3; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("saved")
    save_one(folder)
    return folder


@pytest.mark.multidevice
@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (1, 8)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(saved: Path, shape: tuple[int, int]) -> None:
    state = make_state(mesh(2, 2))
    back = checkpoint.restore_state(saved, abstract(state, mesh(*shape)))
    assert_same_bits(state, back)
    assert back.step.dtype == jnp.int32 and back.rng.dtype == jnp.uint32
    assert back.params["token_embedder"]["embedding"].sharding == NamedSharding(mesh(*shape), P(None, "fsdp"))


def test_bfloat16_and_empty_trees_come_back(tmp_path: Path) -> None:
    params = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "none": {}}
    state = save_one(tmp_path, state=init_state(params, optax.sgd(0.1), jax.random.key(5)))
    assert_same_bits(state, checkpoint.restore_state(tmp_path, abstract(state)))


def test_the_step_may_donate_the_state_while_it_is_written(tmp_path: Path) -> None:
    """The copy to the host is done when `save` returns: later steps in the same buffers never reach the disk."""
    where = mesh(2, 2)
    state = {"w": jax.device_put(jnp.zeros((1024, 1024)), NamedSharding(where, P("data", "fsdp")))}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig(keep=None))
    live = TrainState(step=jnp.zeros((), jnp.int32), params=state, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    like = abstract(live)
    for i in range(1, 5):
        live = step(live)
        saver.save(i, live, info())
        for _ in range(5):
            live = step(live)
    saver.close()
    for i in range(1, 5):
        back = checkpoint.restore_state(tmp_path / f"checkpoint_{i}", like)
        assert set(np.unique(back.params["w"])) == {(i - 1) * 6 + 1.0}


def test_info_comes_back_equal(tmp_path: Path) -> None:
    state = make_state(mesh(1, 1))
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig())
    saver.save(12, state, info(SentencePiece(model=b"\x00\xffmodel")))
    saver.close()
    back = checkpoint.read_info(tmp_path)
    assert back == dataclasses.replace(
        info(SentencePiece(model=b"\x00\xffmodel")), step=12, arrays=checkpoint.describe(state)
    )
    assert back.arrays["params/token_embedder/embedding"] == "float32[24,16]"
    assert back.arrays["rng"] == "uint32[2]" and back.arrays["step"] == "int32[]"
    assert len(back.code["source"]) == 16 and back.libraries["jax"] == jax.__version__


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax abandons
def test_parameters_are_read_without_the_optimizer(saved: Path, tmp_path: Path) -> None:
    """Evaluation needs no optimizer: its arrays may even be gone from the disk."""
    state = make_state(mesh(2, 2))
    folder = tmp_path / "checkpoint_3"
    shutil.copytree(saved / "checkpoint_3", folder)
    forget_arrays(folder, "opt_state")
    params = checkpoint.restore_params(folder, abstract(state, mesh(1, 2)).params)
    assert_same_bits(state.replace(opt_state=()), state.replace(opt_state=(), params=params))
    with pytest.raises(ConfigError, match="is damaged"):
        checkpoint.restore_state(folder, abstract(state))


def forget_arrays(folder: Path, prefix: str) -> None:
    """Deletes every stored key that begins with `prefix` from the checkpoint's key-value store."""
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/state/"}).result()
    keys = [k for k in store.list().result() if k.decode().startswith(prefix)]
    assert keys
    for key in keys:
        store.write(key, None).result()


def test_keep_and_keep_period(tmp_path: Path) -> None:
    state = make_state(mesh(1, 1))
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig(period=10, keep=2, keep_period=30))
    for step in range(10, 80, 10):
        assert saver.should_save(step) and not saver.should_save(step + 1)
        saver.save(step, state, info())
    saver.close()
    left = sorted(int(p.name.removeprefix("checkpoint_")) for p in tmp_path.glob("checkpoint_*"))
    assert left == [30, 60, 70]
    assert saver.latest() == 70


def test_saving_the_same_step_again_leaves_it(tmp_path: Path) -> None:
    state = make_state(mesh(1, 1))
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig())
    saver.save(3, state, info())
    saver.save(3, state.replace(step=state.step + 1), info())
    saver.close()
    assert int(checkpoint.restore_state(tmp_path, abstract(state)).step) == 3


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_another_model_is_refused_by_name_and_shapes(saved: Path) -> None:
    with pytest.raises(ConfigError, match="another model") as error:
        checkpoint.restore_state(saved, abstract(make_state(mesh(1, 1), width=8)))
    text = str(error.value)
    assert "params/decoder/layers/kernel is float32[16,16] in the checkpoint and float32[16,8]" in text
    assert len(text.splitlines()) == 1
    with pytest.raises(ConfigError, match="another model"):
        checkpoint.restore_params(saved, abstract(make_state(mesh(1, 1), width=8)).params)


def test_another_optimizer_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"another optimizer: opt_state/.* no such array"):
        checkpoint.restore_state(saved, abstract(make_state(mesh(1, 1), optimizer=optax.sgd(0.1))))


def test_another_dtype_is_refused_rather_than_converted(saved: Path) -> None:
    wanted = abstract(make_state(mesh(1, 1)))
    wanted = wanted.replace(step=jax.ShapeDtypeStruct((), jnp.float32, sharding=wanted.step.sharding))
    with pytest.raises(ConfigError, match=r"step is int32\[\] in the checkpoint and float32\[\]"):
        checkpoint.restore_state(saved, wanted)


def test_another_vocabulary_is_refused_naming_both(saved: Path) -> None:
    with pytest.raises(ConfigError, match="another vocabulary") as error:
        checkpoint.check_vocabulary(str(saved), checkpoint.read_info(saved), Bytes(extra_ids=100))
    assert Bytes().fingerprint in str(error.value) and Bytes(extra_ids=100).fingerprint in str(error.value)
    assert "259 ids" in str(error.value) and "359 ids" in str(error.value)


def test_resolve_takes_the_newest_whole_one(saved: Path, tmp_path: Path) -> None:
    for step in (3, 20, 100):
        shutil.copytree(saved / "checkpoint_3", tmp_path / f"checkpoint_{step}")
    (tmp_path / "checkpoint_100" / "state" / "manifest.ocdbt").unlink()
    (tmp_path / "checkpoint_200.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoint_old").mkdir()
    assert checkpoint.resolve(tmp_path) == str(tmp_path / "checkpoint_20")
    assert checkpoint.resolve(tmp_path / "checkpoint_3") == str(tmp_path / "checkpoint_3")
    with pytest.raises(
        ConfigError, match=r"checkpoint_100 is half written: state/manifest.ocdbt is missing.*checkpoint_20"
    ):
        checkpoint.resolve(tmp_path / "checkpoint_100")
    with pytest.raises(ConfigError, match=r"checkpoint_200 is half written: its save was cut off.*checkpoint_20"):
        checkpoint.resolve(tmp_path / "checkpoint_200")
    with pytest.raises(ConfigError, match=r"no checkpoint .*checkpoint_4; .* holds checkpoint_3, checkpoint_20"):
        checkpoint.resolve(tmp_path / "checkpoint_4")


def test_resolve_of_folders_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        checkpoint.resolve(tmp_path / "nowhere")
    (tmp_path / "config.gin").touch()
    with pytest.raises(ConfigError, match=r"holds no whole checkpoint; it holds config\.gin"):
        checkpoint.resolve(tmp_path)


def test_a_damaged_info_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint_3" / "info" / "metadata"
    text = file.read_text()
    for broken in (text[: len(text) // 2], "{}", text.replace('"format": 1', '"format": 99')):
        file.write_text(broken)
        with pytest.raises(ConfigError, match="info can't be read"):
            checkpoint.read_info(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax abandons
def test_a_truncated_array_file_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    largest = max((tmp_path / "checkpoint_3").rglob("d/*"), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(ConfigError, match="is damaged") as error:
        checkpoint.restore_state(tmp_path, abstract(make_state(mesh(1, 1))))
    assert len(str(error.value).splitlines()) == 1


# --- the start order ----------------------------------------------------------------------------------------------


def begin(folder: Path, initial: Path | None = None, vocabulary: Vocabulary | None = None) -> checkpoint.Start:
    def init() -> TrainState:
        state = make_state(mesh(1, 1))
        return state.replace(step=state.step * 0, params=jax.tree.map(jnp.zeros_like, state.params))

    like = abstract(make_state(mesh(1, 1)))
    return checkpoint.start(str(folder), initial and str(initial), like, init, vocabulary or Bytes())


def test_start_prefers_its_own_checkpoint_then_the_initial_one_then_scratch(saved: Path, tmp_path: Path) -> None:
    trained = make_state(mesh(1, 1))

    scratch = begin(tmp_path / "empty")
    assert scratch.info is None and scratch.origin == "scratch" and not scratch.resumed
    assert int(scratch.state.step) == 0 and not np.any(scratch.state.params["decoder"]["scale"])

    tuned = begin(tmp_path / "empty", initial=saved)
    assert tuned.origin == str(saved / "checkpoint_3") and not tuned.resumed
    fresh_moments = scratch.state.opt_state
    assert_same_bits(trained.replace(opt_state=fresh_moments), tuned.state)
    assert tuned.state.step.dtype == jnp.int32

    own = tmp_path / "own"
    later = save_one(own, step=9, state=trained.replace(step=trained.step + 6))
    resumed = begin(own, initial=saved)
    assert resumed.resumed and resumed.origin == str(own / "checkpoint_9")
    assert resumed.info is not None and resumed.info.data.skips == ((10, 20), (40, 44))
    assert_same_bits(later, resumed.state)


def test_start_refuses_another_vocabulary(saved: Path, tmp_path: Path) -> None:
    for folder, initial in ((saved, None), (tmp_path, saved)):
        with pytest.raises(ConfigError, match="another vocabulary"):
            begin(folder, initial, vocabulary=Bytes(extra_ids=1))


def test_start_clears_nothing_and_the_checkpointer_clears_what_was_cut_off(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    cut = tmp_path / "checkpoint_4.orbax-checkpoint-tmp"
    (cut / "state").mkdir(parents=True)
    assert begin(tmp_path).origin == str(tmp_path / "checkpoint_3")
    save_one(tmp_path, step=5)
    assert not cut.exists()


# --- what goes wrong while saving ---------------------------------------------------------------------------------

FILL = """
import os, sys
import jax.numpy as jnp
from palmjax.checkpoint import Checkpointer, newest
from palmjax.cli import run_main
from palmjax.config import SaveCheckpointConfig
from palmjax.state import TrainState
sys.path.insert(0, {tests!r})
from test_checkpoint import info

def main(argv):
    saver = Checkpointer({folder!r}, SaveCheckpointConfig(keep=1))
    for step in range(1, 100):
        size = 1000 if step == 1 else 3_000_000
        params, rng = {{"w": jnp.full(size, step, jnp.float32)}}, jnp.zeros(2, jnp.uint32)
        saver.save(step, TrainState(step=jnp.int32(step), params=params, opt_state=(), rng=rng), info())
        if step > 1:
            saver.wait()
    saver.close()
    return 0

sys.exit(run_main(main, []))
"""


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_the_previous_checkpoint_whole(small_disk: Path) -> None:
    script = FILL.format(tests=str(ROOT / "tests"), folder=str(small_disk))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 2, run.stderr
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert "checkpoint_2 could not be written: the disk is full" in lines[0]
    assert "checkpoint_1 is whole; a new run goes on from it" in lines[0]
    like = {"w": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    assert np.all(np.asarray(checkpoint.restore_params(small_disk, like)["w"]) == 1)
    assert [p.name for p in small_disk.glob("checkpoint_*")] == ["checkpoint_1"], "the cut-off save still takes space"


def test_a_failure_in_the_background_is_seen_by_check(tmp_path: Path) -> None:
    state = save_one(tmp_path, step=1)
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig())
    saver.check()
    saver.save(2, state, info())
    sabotage(tmp_path, 2)
    deadline = time.monotonic() + 60
    with pytest.raises(SaveError, match=r"checkpoint_2 could not be written: .*checkpoint_1 is whole"):
        while time.monotonic() < deadline:
            saver.check()
            time.sleep(0.01)
    assert model_dir.newest(tmp_path) == 1


def sabotage(folder: Path, step: int) -> None:
    """A file where the finished checkpoint's folder must go."""
    (folder / f"checkpoint_{step}").write_text("in the way")


def test_a_folder_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="MODEL_DIR can't be used"):
        Checkpointer(str(tmp_path / "file" / "run"), SaveCheckpointConfig())


def test_json_on_disk_is_readable_by_hand(saved: Path) -> None:
    value = json.loads((saved / "checkpoint_3" / "info" / "metadata").read_text())
    assert value["format"] == 1 and value["step"] == 3 and value["data"]["first_row"] == 96
