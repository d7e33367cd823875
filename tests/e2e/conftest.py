"""One text, one token store and one undisturbed run for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import Job, write_text


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    return Job(text=write_text(folder / "text"), stores=str(folder / "stores"))


@pytest.fixture(scope="session")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL_DIR of 40 steps in one go."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    job.run(folder)
    return folder
