"""Paths of MODEL_DIR: local ones, remote ones, and those that can't be opened."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import fsspec.config
import pytest

from palmjax.config import ConfigError
from palmjax.model_dir import as_path


def test_local_paths_are_absolute_and_know_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert as_path("~/run") == tmp_path / "run" == as_path("run")
    assert as_path(Path("run")) == tmp_path / "run"


def test_a_bucket_needs_its_client_and_never_tensorflow(monkeypatch):
    monkeypatch.delenv("EPATH_USE_TF", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gs://bucket/run .*palmjax\[gcs\]"):
        as_path("gs://bucket/run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    before = "tensorflow" in sys.modules
    assert str(as_path("gs://bucket/run") / "checkpoint_3") == "gs://bucket/run/checkpoint_3"
    assert ("tensorflow" in sys.modules) == before
    # gcsfs is given what is here as keyword arguments: else it does not see what TensorStore writes.
    assert fsspec.config.conf["gs"]["use_listings_cache"] is False


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"hdfs://host/run"):
        as_path("hdfs://host/run")
