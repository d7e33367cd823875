"""Checksums of files: each process sums up its own, and a storage that fails is told from a file that is damaged."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from palmjax import checkpoint, cli, model_dir
from palmjax.checkpoint import seal
from palmjax.config import ConfigError
from palmjax.data.vocabulary import Bytes
from tests.checkpoint.states import abstract, assert_same_bits, make_state, mesh

FILES = {
    "commit_success.txt": b"",
    "state/manifest.ocdbt": b"m" * 100,
    "state/ocdbt.process_0/d/aa": b"a" * 5000,
    "state/ocdbt.process_1/d/bb": b"b" * 7000,
    "state/ocdbt.process_1/manifest.ocdbt": b"n" * 90,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_each_process_sums_up_the_files_that_it_wrote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, list[str]] = {"0": [], "1": []}
    crc = seal._crc

    def reading(path: Any) -> int:
        read[now].append(path.relative_to(folder).as_posix())
        return crc(path)

    monkeypatch.setattr(seal, "_crc", reading)
    now = "1"
    assert seal.write(folder, 1, 2) == 0 and seal.read(folder) is None, "process 0 has the last word"
    now = "0"
    assert seal.write(folder, 0, 2) == sum(map(len, FILES.values()))
    assert sorted(read["1"]) == [name for name in sorted(FILES) if "process_1" in name]
    assert sorted(read["0"]) == [name for name in sorted(FILES) if "process_1" not in name]
    joined = (folder / seal.FILE).read_bytes()
    assert not list(folder.glob("checksums.*.json*"))
    now = "0"
    seal.write(folder)
    assert (folder / seal.FILE).read_bytes() == joined and seal.check(folder, whole=True) == []


def test_process_0_waits_for_the_others_but_not_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threading.Timer(0.2, seal.write, (folder, 1, 2)).start()
    assert seal.write(folder, 0, 2) == sum(map(len, FILES.values()))
    monkeypatch.setattr(seal, "WAIT_SECONDS", 0.05)
    with pytest.raises(OSError, match=r"checksums\.1\.json has not come"):
        seal.write(folder, 0, 2)


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[Path]:
    """The first `times` reads of an array's file fail as a disk or a network file system does."""
    crc, failed = seal._crc, []

    def reading(path: Path) -> int:
        if "/d/" in str(path) and len(failed) < times:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error", str(path))
        return crc(path)

    monkeypatch.setattr(seal, "_crc", reading)
    monkeypatch.setattr(model_dir, "PAUSES", (0.01, 0.01))
    return failed


def test_a_read_that_fails_once_is_tried_again(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, state = failing(monkeypatch, 1), make_state(mesh(1, 1))
    assert_same_bits(state, checkpoint.restore_state(saved, abstract(state)))
    assert len(failed) == 1


def test_a_storage_that_fails_is_no_damage(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends and says so; the checkpoint keeps its name, and no older one is taken in its place."""
    for step in (1, 3):
        shutil.copytree(saved / "checkpoint_3", tmp_path / f"checkpoint_{step}")
    failing(monkeypatch, 1000)
    like = abstract(make_state(mesh(1, 1)))
    with pytest.raises(checkpoint.Unreadable, match=r"can't be read now: Input/output error") as error:
        checkpoint.start(str(tmp_path), None, like, lambda: make_state(mesh(1, 1)), Bytes())
    assert "checkpoint_3" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert error.value.exit_code == 74 and isinstance(error.value, ConfigError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1", "checkpoint_3"]
    assert cli.main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("NOT READ") == 2
