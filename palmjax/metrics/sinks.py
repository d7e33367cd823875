"""Where metrics are looked at: TensorBoard and the console. rich and tensorboardX load where they are first needed."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, Protocol

# ----------------------------------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """Writes scalars under <folder>/<run> from a thread of its own, which imports tensorboardX at the first of them.

    One event costs some 50 us of Python, too much for the loop. Files that can't be written (a full disk) are reported
    once, and there are no more of them; whatever else fails in the thread is raised by the next call.
    """

    def __init__(self, folder: str, start_step: int, report: Callable[[str], None]):
        self._folder, self._report = folder, report
        # TensorBoard hides what an earlier, killed process logged from this step on.
        self._purge_step = start_step + 1 if start_step else None
        self._queue: queue.SimpleQueue[tuple[str, int, float, dict[str, float]] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._writable = True
        self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
        self._thread.start()

    def scalars(self, run: str, step: int, values: Mapping[str, float | None]) -> None:
        self._raise()
        if not self._writable:
            return
        self._queue.put((run, step, time.time(), {tag: value for tag, value in values.items() if value is not None}))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        writers: dict[str, Any] = {}
        try:
            while (item := self._queue.get()) is not None:
                run, step, when, values = item
                if run not in writers:
                    writers[run] = self._open(run)
                _write_scalars(writers[run], step, when, values)
            for writer in writers.values():
                writer.close()
        except OSError as error:
            self._writable = False
            reason = error.strerror or error
            with contextlib.suppress(OSError, ValueError):  # a console that is gone as well
                self._report(
                    f"TensorBoard's files in {self._folder} can't be written: {reason}; the run goes on without them"
                )
            for writer in writers.values():
                with contextlib.suppress(OSError):  # what is in its buffer fails once more
                    writer.close()
        except BaseException as error:
            self._error = error

    def _open(self, run: str) -> Any:
        # Not SummaryWriter: it writes from a thread of its own, and when that dies of a full disk, the next calls and
        # the process's end wait for it forever (tensorboardX 2.6).
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        folder = os.path.join(self._folder, run)
        os.makedirs(folder, exist_ok=True)
        writer = EventsWriter(os.path.join(folder, "events"))
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            writer.write_event(Event(step=self._purge_step, wall_time=time.time(), session_log=start))
        return writer


def _write_scalars(writer: Any, step: int, when: float, values: Mapping[str, float]) -> None:
    """One event for each value, with the operating system when this returns."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.summary import scalar

    for tag, value in values.items():
        writer.write_event(Event(step=step, wall_time=when, summary=scalar(tag, value)))
    writer.flush()


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
