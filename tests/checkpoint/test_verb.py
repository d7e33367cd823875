"""`palmjax checkpoint`: what it says of whole and damaged checkpoints, and what it leaves of them."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import checkpoint
from palmjax.checkpoint import inspect, seal
from palmjax.checkpoint.main import main
from palmjax.config import ConfigError
from palmjax.model_dir import lock
from tests.checkpoint.states import make_state, mesh, save_one


def copies(saved: Path, folder: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(saved / "checkpoint_3", folder / f"checkpoint_{step}")
    return folder


def test_verify_says_what_is_as_it_was_saved(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(saved)]) == 0
    said = capsys.readouterr().out
    # How many files its arrays lie in is TensorStore's affair.
    assert re.search(r"checkpoint_3: as it was saved \(\d+ files, 15 arrays, ", said) and "note" not in said


def test_verify_names_a_corrupted_byte_in_any_file(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rng = copies(saved, tmp_path, 3) / "checkpoint_3", np.random.default_rng(5)
    for name in [*seal.files(folder), seal.FILE]:
        whole = (folder / name).read_bytes()
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (folder / name).write_bytes(data)
        assert main(["verify", str(folder)]) == 1, name
        said = capsys.readouterr().out
        assert "DAMAGED" in said and name in said
        (folder / name).write_bytes(whole)
    assert main(["verify", str(tmp_path)]) == 0


def test_verify_names_an_array_whose_values_changed(saved: Path, tmp_path: Path) -> None:
    import tensorstore as ts

    folder = copies(saved, tmp_path, 3) / "checkpoint_3"
    base = {"driver": "ocdbt", "base": f"file://{folder}/state/", "path": "params.token_embedder.embedding/"}
    array = ts.open({"driver": "zarr", "kvstore": base}, open=True).result()
    array[23, 15].write(np.float32(1.5)).result()
    seal.write(folder)
    verdict = inspect.verify(str(folder))
    assert verdict.problems == ("params/token_embedder/embedding has not the values that were saved",)


def test_list(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copies(saved, tmp_path, 3, 20, 100)
    (folder / "checkpoint_20" / "PINNED").touch()
    (folder / "checkpoint_100" / "info" / "metadata").write_text("{}")
    assert main(["list", str(folder)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "step" and len(rows) == 3
    assert "PINNED" in rows[1] and "PINNED" not in rows[0] and "info/metadata is not what was written" in rows[2]


def test_diff_of_arrays_and_of_what_is_beside_them(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(saved), str(saved / "checkpoint_3")]) == 0
    assert "15 of 15 arrays are equal, bit for bit" in capsys.readouterr().out
    state = make_state(mesh(1, 1))
    params = dict(state.params)
    scale = np.asarray(params["decoder"]["scale"]).copy()
    scale[0], scale[3] = 0.0, scale[3] + 0.25  # -0.0 before: equal, but other bits
    params["decoder"] = {**params["decoder"], "scale": jnp.asarray(scale)}
    save_one(tmp_path, step=7, state=state.replace(params=params))
    assert main(["diff", str(saved), str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "params/decoder/scale float32[4]: largest difference 0.25" in said and "step: 3 -> 7" in said
    assert "14 of 15 arrays are equal" in said


def test_differences_of_nan_and_of_signs_of_zero() -> None:
    x = np.array([1.0, np.nan, -0.0], np.float32)
    assert inspect._distance(x, x) == 0 and inspect._distance(x, np.array([1.0, np.nan, 0.0], np.float32)) == 0
    assert inspect._distance(x, np.array([1.0, 2.0, 0.0], np.float32)) == math.inf
    assert inspect._distance(np.array([2**31], np.uint32), np.array([1], np.uint32)) == 2**31 - 1


def test_prune(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copies(saved, tmp_path, 10, 20, 30, 40, 50)
    assert main(["prune", str(folder), "--keep=1", "--keep_every=20", "--dry-run"]) == 0
    assert "would delete 2: checkpoint_10, checkpoint_30" in capsys.readouterr().out
    assert checkpoint.steps(folder) == [10, 20, 30, 40, 50]
    with lock(folder), pytest.raises(ConfigError, match="another run is using"):
        main(["prune", str(folder), "--keep=1"])
    assert main(["prune", str(folder), "--keep=1", "--keep-every", "20"]) == 0
    assert checkpoint.steps(folder) == [20, 40, 50]
    for wrong in (["--keep=0"], ["--keep=1", "--keep_every=0"]):
        with pytest.raises(ConfigError, match=r"--keep and --keep_every are 1 or more"):
            main(["prune", str(folder), *wrong])
    with pytest.raises(ConfigError, match="holds no checkpoint; prune takes a MODEL_DIR"):
        main(["prune", str(folder / "checkpoint_50"), "--keep=1"])
    assert not (folder / "checkpoint_50" / ".lock").exists(), "and nothing is written there"


def test_a_prune_that_is_killed_leaves_nothing_half_deleted_by_its_name(saved: Path, tmp_path: Path) -> None:
    """By SIGKILL behind the first file that it has deleted; the next one finishes it."""
    folder = copies(saved, tmp_path, 10, 20, 30)
    program = f"""
import os, shutil, signal
def rmtree(path, **_):
    os.remove(next(p for p in path.rglob("*") if p.is_file()))
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = rmtree
from palmjax.checkpoint.main import main
main(["prune", {str(folder)!r}, "--keep=1"])
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == -signal.SIGKILL
    assert checkpoint.steps(folder) == [20, 30] and (folder / "checkpoint_10.deleting").is_dir()
    assert main(["verify", str(folder)]) == 0
    assert main(["prune", str(folder), "--keep=1"]) == 0
    assert sorted(path.name for path in folder.glob("checkpoint_*")) == ["checkpoint_30"]


def test_a_checkpoint_that_is_being_saved_is_called_so(saved: Path, tmp_path: Path) -> None:
    copies(saved, tmp_path, 10)
    (tmp_path / "checkpoint_20.written.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(
        ConfigError, match=r"checkpoint_20 is half written: it is being saved, or .*holds checkpoint_10"
    ):
        main(["verify", str(tmp_path / "checkpoint_20")])


def test_folders_that_hold_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("verify", "list"):
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            main([given, str(tmp_path)])
        with pytest.raises(ConfigError, match="there is no"):
            main([given, str(tmp_path / "checkpoint_5")])
    assert not capsys.readouterr().out, "no heading of an empty table"


def test_a_changed_configuration_is_a_difference(saved: Path) -> None:
    info = checkpoint.read_info(saved)
    other = dataclasses.replace(info, flat_config={"train.seed": "8"}, mesh={"data": 4})
    assert "mesh.data: 2 -> 4" in list(inspect._other_differences(info, other))
