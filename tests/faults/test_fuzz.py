"""Mutated gin files, token stores and checkpoint metadata: `python -m benchmarks.fuzz` does a thousand of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz


@pytest.mark.parametrize(("kind", "count"), [("gin files", 250), ("store files", 400), ("checkpoint metadata", 300)])
def test_a_clear_error_or_the_right_result(tmp_path: Path, kind: str, count: int) -> None:
    tally = fuzz.CAMPAIGNS[kind](tmp_path, count, seed=1)
    assert not tally.faults, "\n".join(tally.faults[:10])
    assert tally.errors > count / 2 and tally.errors + tally.right == count
