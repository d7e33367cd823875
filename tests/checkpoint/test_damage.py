"""Damage: a changed byte, a cut file or a wrong value is noticed, and nothing damaged is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import checkpoint
from palmjax.checkpoint import Damaged, digest, seal
from tests.checkpoint.states import (
    abstract,
    assert_same_bits,
    make_state,
    mesh,
)


def test_every_file_truncated_is_refused(saved: Path, tmp_path: Path) -> None:
    """Whether a read needs the file or not: what is not what was saved is not restored from."""
    like = abstract(make_state(mesh(1, 1)))
    names = seal.files(saved / "checkpoint_3")
    assert len(names) > 10 and "commit_success.txt" in names
    for number, name in enumerate([*names, seal.FILE]):
        folder = tmp_path / str(number) / "checkpoint_3"
        shutil.copytree(saved / "checkpoint_3", folder)
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
        with pytest.raises(Damaged) as error:
            checkpoint.restore_state(folder, like)
        assert len(str(error.value).splitlines()) == 1 and name.rsplit("/", 1)[-1] in str(error.value)


def test_a_corrupted_byte_in_any_file_is_refused(saved: Path, tmp_path: Path) -> None:
    """One byte, one file after the other, at a place drawn anew for each; nothing is loaded, nothing deleted."""
    rng, like = np.random.default_rng(3), abstract(make_state(mesh(1, 1)))
    for number, name in enumerate([*seal.files(saved / "checkpoint_3"), seal.FILE]):
        folder = tmp_path / str(number) / "checkpoint_3"
        shutil.copytree(saved / "checkpoint_3", folder)
        data = bytearray((folder / name).read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (folder / name).write_bytes(data)
        with pytest.raises(Damaged) as error:
            checkpoint.restore_state(folder, like)
        assert str(folder) in str(error.value), name


def test_values_that_changed_before_the_files_were_summed_up_are_noticed(saved: Path, tmp_path: Path) -> None:
    """As by a faulty host memory: every file is as it was written, but an array is not what the devices held."""
    import tensorstore as ts

    folder = tmp_path / "checkpoint_3"
    shutil.copytree(saved / "checkpoint_3", folder)
    base = {"driver": "ocdbt", "base": f"file://{folder}/state/", "path": "params.decoder.scale/"}
    array = ts.open({"driver": "zarr", "kvstore": base}, open=True).result()
    array[2].write(np.float32(1.0000001)).result()
    seal.write(folder)
    like = abstract(make_state(mesh(1, 1)))
    for restore in (
        lambda: checkpoint.restore_state(folder, like),
        lambda: checkpoint.restore_params(folder, like.params),
    ):
        with pytest.raises(Damaged, match="params/decoder/scale has not the values that were saved"):
            restore()


def test_a_checkpoint_of_an_older_version_has_no_checksums_and_is_read(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint_3"
    shutil.copytree(saved / "checkpoint_3", folder)
    (folder / seal.FILE).unlink()
    like = abstract(make_state(mesh(1, 1)))
    with pytest.raises(Damaged, match=r"checksums.json is missing"):
        checkpoint.restore_state(folder, like)
    value = json.loads((folder / "info" / "metadata").read_text())
    old = {name: v for name, v in value.items() if name not in ("digests", "metrics")} | {"format": 1}
    (folder / "info" / "metadata").write_text(json.dumps(old))
    assert_same_bits(make_state(mesh(1, 1)), checkpoint.restore_state(folder, like))


@pytest.mark.multidevice
def test_digests_are_of_bits_and_places_whatever_the_layout() -> None:
    where = digest.digests(make_state(mesh(2, 2)))
    assert where == digest.digests(make_state(mesh(1, 1))) == digest.digests(make_state(mesh(4, 2)))
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    swapped, negative = x.copy(), x.copy()
    swapped[0, 0], swapped[3, 5] = x[3, 5], x[0, 0]
    negative[0, 0] = -0.0
    kinds = [x, swapped, negative, x.T, x.reshape(6, 4), x[:2], x.astype(np.int32), x.astype(jnp.bfloat16), x > 3]
    found = [digest.digests({"x": jnp.asarray(kind)})["x"] for kind in kinds]
    assert len(set(found)) == len(found)
    parts = [np.asarray(digest.sums(jnp.asarray(x[i : i + 1]), i)) for i in range(4)]
    assert digest.text(np.sum(parts, axis=0, dtype=np.uint32)) == found[0]
