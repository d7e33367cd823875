"""Where metrics are looked at: TensorBoard and the console. rich and tensorboardX load where they are first needed."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import IO, Protocol

# ----------------------------------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """Writes scalars under <folder>/<run> from a thread of its own, which imports tensorboardX at the first of them.

    One event costs some 50 us of Python, too much for the loop. What fails in the thread is raised by the next call.
    """

    def __init__(self, folder: str, start_step: int):
        self._folder = folder
        # TensorBoard hides what an earlier, killed process logged from this step on.
        self._purge_step = start_step + 1 if start_step else None
        self._queue: queue.SimpleQueue[tuple[str, int, float, dict[str, float]] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
        self._thread.start()

    def scalars(self, run: str, step: int, values: Mapping[str, float | None]) -> None:
        self._raise()
        self._queue.put((run, step, time.time(), {tag: value for tag, value in values.items() if value is not None}))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        writers = {}
        try:
            while (item := self._queue.get()) is not None:
                run, step, when, values = item
                if run not in writers:
                    from tensorboardX import SummaryWriter

                    folder = os.path.join(self._folder, run)
                    writers[run] = SummaryWriter(folder, purge_step=self._purge_step, flush_secs=10)
                for tag, value in values.items():
                    writers[run].add_scalar(tag, value, step, walltime=when)
        except BaseException as error:
            self._error = error
        finally:
            for writer in writers.values():
                writer.close()


# --------------------------------------------------------------------------------------------------- console


class Console(Protocol):
    def step(self, step: int, parts: list[str]) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class Lines:
    """`step 40/200  loss 3.214  12.3k tok/s  MFU 41.2%  eta 1:23`, for logs and pipes."""

    def __init__(self, stream: IO[str], total_steps: int):
        self._stream, self._total = stream, total_steps

    def step(self, step: int, parts: list[str]) -> None:
        self.message("  ".join([f"step {step}/{self._total}", *parts]))

    def message(self, text: str) -> None:
        self._stream.write(text + "\n")  # in one piece: more than one thread may have something to say
        self._stream.flush()

    def close(self) -> None:
        pass


class Bar:
    """The same on a terminal, as a progress bar; messages go above it."""

    def __init__(self, stream: IO[str], total_steps: int, start_step: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        status = TextColumn("{task.fields[status]}", markup=False)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), status)
        self._progress = Progress(*columns, console=Console(file=stream), refresh_per_second=4)
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, status="compiling")
        self._progress.start()

    def step(self, step: int, parts: list[str]) -> None:
        self._progress.update(self._task, completed=step, status="  ".join(parts))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()
