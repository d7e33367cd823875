"""A checkpoint that tests read, or copy and damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.states import save_one


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MODEL_DIR with checkpoint_3; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("saved")
    save_one(folder)
    return folder
