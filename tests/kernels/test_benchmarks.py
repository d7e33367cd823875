"""The GPU benchmark without a GPU: all of it but the kernels, which have their own tests."""

from __future__ import annotations

import importlib.util
import json

import pytest

from benchmarks import attention_gpu


def test_a_dry_run_goes_through_every_path_and_writes_its_report(tmp_path, capsys):
    attention_gpu.main(["--dry_run", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "cudnn         RuntimeError" in printed  # a peer that cannot is told, and the others go on
    [path] = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert set(report["rates"]) == {"matmul", "copy"}
    peers = ["torch math"] if importlib.util.find_spec("torch") else []
    [rows], [decode] = report["rows"], report["decode"]
    timed = {name for name, entry in rows["found"].items() if {"forward", "backward"} <= set(entry)}
    assert timed == {"ours", "ours, packed", "ours, ranged", *peers}
    assert "failed" in rows["found"]["cudnn"]
    timed = {name for name, entry in decode["found"].items() if "forward" in entry}
    assert timed == {"ours", "xla", "ours, ragged", *peers}
    for entry in (*rows["found"].values(), *decode["found"].values()):
        for which in {"forward", "backward"} & set(entry):
            assert 0.0 < entry[which]["low"] <= entry[which]["rate"] <= entry[which]["high"]


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(attention_gpu, "errors", lambda *_: [float("nan")] * 4)
    monkeypatch.setattr(attention_gpu, "of_torch", lambda *_: {})
    with pytest.raises(SystemExit, match=r"failed: ours, ours, packed, ours, ranged"):
        attention_gpu.main(["--dry_run", "--out", str(tmp_path)])


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        attention_gpu.main([])
    assert "the device at hand is 'cpu': this needs an H100 or H200; --dry_run goes without" in capsys.readouterr().err
