"""Eight virtual CPU devices for this process only; a compilation cache that child processes share; how programs
are compiled, and in which order files come.

The number of devices is set through jax's configuration, not the environment, so that a process started by a test has
the devices that its own flags give it. JAX_PLATFORMS in the environment is kept: the suite also runs on an accelerator.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Before jax is imported. Entries are keyed by program, compiler options and machine, so a stale one is never used.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Examples take as long as they take on a shared machine; in CI a failure must come back on the next run.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "default")


QUICKLY_COMPILED = ("decode/test_beam.py", "interop", "models", "multidevice")
"""Rooms and files that compare models with a reference (numpy, torch, one device) and compile hundreds of programs to
run each once: in this process LLVM does no optimization there (XLA does): half the time of compiling. All others,
and every child process, compile as users do: what is said of whole runs, of kernels and of scores that do not depend
on the batch is said of such programs.
"""


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """How a module's programs are compiled; frees them at its end: by the hundred they fill gigabytes of a process."""
    quickly = any(request.path.is_relative_to(ROOT / "tests" / name) for name in QUICKLY_COMPILED)
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that no process is left alone with one of them at the end."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
