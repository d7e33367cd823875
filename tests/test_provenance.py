"""The digest of the code that ran: every package that decides a run's numbers is in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from palmjax import provenance

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The packages' sources in a folder of their own."""
    for package in provenance.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_the_digest_is_of_the_files_wherever_they_are(copied: Path) -> None:
    assert provenance.code_version()["source"] == provenance.source_digest(copied)
    (copied / "palmjax" / "notes.txt").write_text("not code")
    (copied / "elsewhere.py").write_text("not ours")
    assert provenance.code_version()["source"] == provenance.source_digest(copied)


@pytest.mark.parametrize("file", ["palmjax/step.py", "pallas_kernels/attention/reference.py", "tasks/jsonl.py"])
def test_a_change_of_any_package_is_another_digest(copied: Path, file: str) -> None:
    before = provenance.source_digest(copied)
    text = (copied / file).read_text()
    (copied / file).write_text(text + "#")
    assert provenance.source_digest(copied) != before
    (copied / file).write_text(text)
    assert provenance.source_digest(copied) == before
    (copied / file).rename((copied / file).with_name("renamed.py"))
    assert provenance.source_digest(copied) != before


def test_every_package_of_the_distribution_counts() -> None:
    import tomllib

    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(built["packages"]) - {"launch", "gin"} == set(provenance.PACKAGES)
