"""What is shown of an import and what is not, seen from the descriptor."""

from __future__ import annotations

import logging
import os
import sys

import pytest

from palmjax.quiet import quiet_libraries


def test_what_libraries_write_past_python_is_kept_and_shown_only_if_they_fail(capfd, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    with quiet_libraries():
        os.write(2, b"from C++\n")
        handler = logging.StreamHandler()  # as libraries make them when they are imported
        print("from Python", file=sys.stderr)
    assert sys.stderr is sys.__stderr__
    os.write(2, b"behind\n")
    handler.stream.write("logged\n")
    assert capfd.readouterr().err.splitlines() == ["from Python", "behind", "logged"]
    with pytest.raises(ImportError), quiet_libraries():
        os.write(2, b"why it fails\n")
        raise ImportError
    assert capfd.readouterr().err == "why it fails\n"
