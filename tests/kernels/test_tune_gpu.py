"""Tuning for Hopper without a GPU: kernels interpreted, times made up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pallas_kernels import tune, tune_gpu
from pallas_kernels.attention import gpu_table
from pallas_kernels.attention.gpu_plan import Ring, Stream, Tuning
from pallas_kernels.attention.table import FOLDER
from pallas_kernels.decode_attention import gpu_plan as decode_plan
from pallas_kernels.decode_attention import gpu_table as decode_table
from tests.kernels.interpreted_gpu import ENDS, one_compilation_a_kernel

TINY = tune_gpu.Setting(rows=1, length=20, heads=2, caches=2, entries=128, samples=1, calls=1, interpret=True)


pytestmark = ENDS


@pytest.fixture(scope="module", autouse=True)
def _one_compilation_a_kernel() -> Iterator[None]:
    with one_compilation_a_kernel():
        yield


def test_rows_are_of_the_fastest_that_runs_and_is_right(monkeypatch):
    times = {}

    def seconds(call: Any, setting: tune_gpu.Setting) -> float:
        return times.pop(next(iter(times)))

    start = Tuning(forward=Ring(keys=64, slots=2), dq=Ring(keys=64, slots=2), dkv=Stream(queries=32, stages=2))
    monkeypatch.setattr(tune_gpu, "seconds", seconds)
    times |= {"forward": 3e-6, "forward, other": 2e-6, "dq": 1e-6, "dq, other": 5e-6, "dkv": 4e-6}
    row = tune_gpu.attention_row("NVIDIA H200", 64, start, TINY, rings=[Ring(keys=64, slots=3)], streams=[])
    assert not times
    assert gpu_table.as_tuning(row["tuning"]) == Tuning(
        forward=Ring(keys=64, slots=3), dq=Ring(keys=64, slots=2), dkv=Stream(queries=32, stages=2)
    )
    assert row["source"] == "measured"
    assert row["provenance"]["forward_us"] == "2.0" and row["provenance"]["backward_us"] == "4.0"
    times |= {"first": 2e-6, "other": 1e-6}
    small = decode_plan.Tuning(keys=64, stages=1, rounds=2, blocks=2)
    other = decode_plan.Tuning(keys=64, stages=1, rounds=1, blocks=2)
    row = tune_gpu.decode_row("NVIDIA H200", 64, small, TINY, tries=[small, other])
    assert not times and decode_plan.Tuning(**row["tuning"]) == other


def test_what_does_not_run_is_no_candidate():
    def call_of(candidate: int) -> Any:
        if candidate == 1:
            raise RuntimeError("too much shared memory")
        return lambda: 0.0

    assert tune_gpu.best("x", [1, 2, 2], call_of, TINY)[0] == 2
    with pytest.raises(ValueError, match="no candidate of x runs here"):
        tune_gpu.best("x", [1], call_of, TINY)


def test_what_is_wrong_is_not_written(monkeypatch):
    monkeypatch.setattr(tune_gpu, "TOLERANCE", 0.0)
    small = decode_plan.Tuning(keys=64, stages=1, rounds=1, blocks=1)
    with pytest.raises(ValueError, match=r"decode of 64 differs from float32 by .*: nothing is written"):
        tune_gpu.decode_row("NVIDIA H200", 64, small, TINY, tries=[])


def test_the_files_are_those_of_the_card(monkeypatch):
    for name in ("attention_row", "decode_row"):
        monkeypatch.setattr(tune_gpu, name, lambda chip, width, *_: (chip, width))
    found = tune_gpu.tables("NVIDIA H100 80GB HBM3", TINY)
    assert found == {
        folder / "nvidia_h100.json": [("NVIDIA H100", width) for width in (64, 128, 256)]
        for folder in (FOLDER, decode_table.FOLDER)
    }
    assert all(path.is_file() for path in found)
    with pytest.raises(ValueError, match="'NVIDIA A100': the table has NVIDIA H100, NVIDIA H200"):
        tune_gpu.tables("NVIDIA A100", TINY)


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "the device at hand is 'cpu', no TPU and no H100 or H200" in capsys.readouterr().err
