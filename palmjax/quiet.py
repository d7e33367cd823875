"""Libraries loaded without what their C++ parts write to stderr, which tells a user nothing. Standard library only."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO


@functools.cache
def _terminal() -> TextIO:
    """What stderr was. Never closed: a library's log handler, made while it was imported, may keep it."""
    return open(os.dup(2), "w", buffering=1)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Around an import: keeps what is written past Python to stderr, and shows it if the import fails.

    TensorFlow 2.21 ignores TF_CPP_MIN_LOG_LEVEL until it is initialised. What Python code writes is shown.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.stderr.flush()
    before = sys.stderr
    if before is sys.__stderr__:  # else it does not write to the descriptor
        sys.stderr = _terminal()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(kept, hidden.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            sys.stderr = before
