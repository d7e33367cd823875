"""A function over part numbers, here or in spawned processes, with reports of progress. Imports config only."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from palmjax.config import ConfigError

Report = Callable[[int, int], None]

_reports: Any = None  # in a worker process: the queue to its parent


def each_part(
    run: Callable[[int, Report], Any], parts: Sequence[int], num_workers: int, report: Report
) -> Iterator[Any]:
    """Yields run(part, report) for every part, in the order in which they finish.

    num_workers 0 runs them in this process. Otherwise `run` must be picklable; the processes are spawned, because
    TensorFlow and JAX do not survive a fork, and they end when this process does, even if it is killed. Raises what
    `run` raises, and ConfigError if a worker process dies.
    """
    if num_workers == 0:
        for part in parts:
            yield run(part, report)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    pool = futures.ProcessPoolExecutor(
        min(num_workers, max(len(parts), 1)), mp_context=context, initializer=_start_worker, initargs=(queue,)
    )
    try:
        running = {pool.submit(_run_in_worker, run, part) for part in parts}
        while running:
            done, running = futures.wait(running, timeout=0.5, return_when=futures.FIRST_COMPLETED)
            while not queue.empty():
                report(*queue.get())
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise ConfigError(
            "a tokenizing process died, perhaps for want of memory: use fewer `workers`. "
            "The next start goes on from the parts that are finished"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(queue: Any) -> None:
    global _reports
    _reports = queue
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_in_worker(run: Callable[[int, Report], Any], part: int) -> Any:
    return run(part, lambda documents, tokens: _reports.put((documents, tokens)))
