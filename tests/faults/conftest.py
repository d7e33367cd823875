"""One text, one token store and one set of finished runs for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import Job, write_text
from tests.faults import poison, runs


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    return Job(text=write_text(folder / "text"), stores=str(folder / "stores"))


@pytest.fixture(scope="session")
def finished(job: Job, tmp_path_factory: pytest.TempPathFactory) -> runs.Runs:
    root: Path = tmp_path_factory.mktemp("runs")
    done = runs.Runs(clean=root / "clean", undefended=root / "undefended", defended=root / "defended")
    assert runs.run(job, done.clean, *runs.SPIKE) == 0
    with poison.scrambled(*runs.POISON):
        assert runs.run(job, done.undefended) == 0
        assert runs.run(job, done.defended, *runs.SPIKE) == 0
    return done
