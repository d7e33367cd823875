"""Mosaic GPU's interpreter as the tests need it: one compilation a kernel, and what its race detectors found. And a
table's rows as if they came from elsewhere: what is asserted of both holds whichever a table has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import pytest
from jax._src import core as jax_core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

ENDS: Any = pytest.mark.timeout(method="thread")
"""Of modules that interpret: with a barrier too few, or where a warpgroup has failed, the others wait for ever, inside
the compiled program, where no signal reaches them. A thread ends the process when the time is up.
"""


@contextlib.contextmanager
def one_compilation_a_kernel() -> Iterator[None]:
    """jax 0.10.2's interpreter compiles a kernel again for every warpgroup of every block: nine tenths of its time."""
    programs: dict[int, Any] = {}
    lock = threading.Lock()

    def run(jaxpr: Any, consts: Any, *args: Any) -> None:
        with lock:
            if id(jaxpr) not in programs:
                program = jax.jit(lambda consts, *args: jax_core.eval_jaxpr(jaxpr, consts, *args) and None)
                # The jaxpr is kept too: its id must not become another's.
                programs[id(jaxpr)] = program.lower(consts, *args).compile(), jaxpr
        programs[id(jaxpr)][0](consts, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thread_map, "_run_jaxpr", run)
        yield


def detectors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which each kernel that is interpreted from now on adds its race detector."""
    found: list[Any] = []
    # Its name in jax 0.11, and in 0.10.
    name = next(x for x in ("GPURaceDetectionState", "RaceDetectionState") if hasattr(gpu_callbacks, x))
    make: Any = getattr(gpu_callbacks, name)

    def recorded(**given: Any) -> Any:
        found.append(make(**given))
        return found[-1]

    monkeypatch.setattr(gpu_callbacks, name, recorded)
    return found


def rows_of(rows: Iterable[Any], source: str) -> Callable[[], tuple[Any, ...]]:
    """In place of a table's `rows`: the same ones, all from `source`."""
    found = tuple(dataclasses.replace(row, source=source) for row in rows)
    return lambda: found
