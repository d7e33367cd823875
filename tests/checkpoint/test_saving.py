"""Checkpoints: what is saved comes back bit for bit, on any mesh; what does not fit is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import re
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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from palmjax import checkpoint, model_dir
from palmjax.checkpoint import Checkpointer, Damaged, SaveError, digest, seal
from palmjax.config import ConfigError, SaveCheckpointConfig
from palmjax.data.vocabulary import Bytes, SentencePiece
from palmjax.state import TrainState, init_state
from tests.checkpoint.states import (
    ROOT,
    abstract,
    assert_same_bits,
    info,
    make_state,
    mesh,
    save_one,
)


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


def test_with_a_bound_on_the_hosts_memory_the_steps_wait_until_the_checkpoint_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bound below every array: one at a time, and what comes back is what was saved."""
    state = make_state(mesh(2, 2))
    back_as = abstract(state)
    with Checkpointer(str(tmp_path), SaveCheckpointConfig(host_bytes=1)) as saver, caplog.at_level("INFO", "absl"):
        for step in (1, 2):
            saver.save(step, state, info())
            assert checkpoint.newest(tmp_path) == step, "else a step could write over what is still to be copied"
            saved = saver.check()
            assert saved is not None and saved.step == step and saved.blocked == saved.seconds > 0
            assert saver.check() is None
    copied = re.findall(r"Scheduling (?:D2H|serialization) of (\d+) ", caplog.text)
    assert copied == ["1"] * 2 * len(jax.tree.leaves(state)), "each by itself, in Orbax's own words"
    assert_same_bits(state, checkpoint.restore_state(tmp_path, back_as))


def test_info_comes_back_equal(tmp_path: Path) -> None:
    state = make_state(mesh(1, 1))
    saver = Checkpointer(str(tmp_path), SaveCheckpointConfig())
    saver.save(12, state, info(SentencePiece(model=b"\x00\xffmodel")))
    saver.close()
    back = checkpoint.read_info(tmp_path)
    assert back == dataclasses.replace(
        info(SentencePiece(model=b"\x00\xffmodel")),
        step=12,
        arrays=checkpoint.describe(state),
        digests=digest.digests(state),
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
    seal.write(folder)
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
    with pytest.raises(ConfigError, match=r"checkpoint_200 is half written: it is being saved, or .*checkpoint_20"):
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
    for broken in (text[: len(text) // 2], "{}", text.replace('"format": 2', '"format": 99')):
        file.write_text(broken)
        with pytest.raises(Damaged, match="info/metadata is not what was written"):
            checkpoint.read_info(tmp_path)
        seal.write(tmp_path / "checkpoint_3")
        with pytest.raises(ConfigError, match="info can't be read"):
            checkpoint.read_info(tmp_path)


# --- what goes wrong while saving ---------------------------------------------------------------------------------

FILL = """
import os, sys
import jax.numpy as jnp
from palmjax.checkpoint import Checkpointer, newest
from palmjax.cli import run_main
from palmjax.config import SaveCheckpointConfig
from palmjax.state import TrainState
sys.path.insert(0, {root!r})
from tests.checkpoint.states import info

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
    script = FILL.format(root=str(ROOT), folder=str(small_disk))
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
    assert value["format"] == 2 and value["step"] == 3 and value["data"]["first_row"] == 96
