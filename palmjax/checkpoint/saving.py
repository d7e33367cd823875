"""Writing checkpoints in the background, each visible by its name only when it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from palmjax import distributed
from palmjax.checkpoint import digest, keep, seal
from palmjax.checkpoint import tree as trees
from palmjax.config import ConfigError, SaveCheckpointConfig, section
from palmjax.files import EXIT_STORAGE, exit_code_of
from palmjax.model_dir import PREFIX, as_path, is_whole, newest, set_broken_aside
from palmjax.provenance import RunInfo
from palmjax.state import TrainState


class SaveError(ConfigError):
    """A checkpoint could not be written. Its text names the folder and the checkpoint that stays usable.

    exit_code: 2 if a person must free space or give leave, else `EXIT_STORAGE`: running again may help.
    """

    def __init__(self, text: str, exit_code: int = EXIT_STORAGE):
        super().__init__(text)
        self.exit_code = exit_code


@section
class Saved:
    """A checkpoint that has become whole. blocked: seconds that the loop stood still for it. seconds: from the call of
    `save` to its name. bytes: of all files (of process 0's knowledge; 0 on the others). deleted: steps no longer kept.
    """

    step: int
    blocked: float
    seconds: float
    bytes: int
    deleted: tuple[int, ...] = ()


class Checkpointer:
    """Saves states of one run into MODEL_DIR, in the background. All processes of the job use it together.

    A save goes through three names: Orbax writes `checkpoint_N.written.orbax-checkpoint-tmp` and renames it to
    `checkpoint_N.written` when all processes' parts are there; then each process sums up the files that it wrote, and
    process 0 joins the sums and renames the folder to `checkpoint_N`. On an object store, where nothing can be renamed,
    `checksums.json` is the last file to appear.
    """

    def __init__(self, model_dir: str, save: SaveCheckpointConfig):
        """Makes MODEL_DIR if needed, clears what an earlier run left half written, sets aside what lost a part."""
        ocp = _orbax()
        self._background = _BackgroundLog()
        logging.getLogger("absl").addFilter(self._background)
        self._dir, self._save = as_path(model_dir), save
        self._is_local = isinstance(self._dir, Path)
        self._writing: _Writing | None = None
        self._untold: Saved | None = None
        # Trained float32 hardly compresses (8 % with zstd) and compressing takes cores from the step on CPU hosts.
        arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        if save.host_bytes is not None:
            from palmjax.checkpoint import bounded

            arrays = bounded.arrays(save.host_bytes)
        handler = ocp.CompositeCheckpointHandler(state=arrays, info=ocp.JsonCheckpointHandler())
        with self._explained("MODEL_DIR can't be used"):
            if jax.process_index() == 0:
                self._dir.mkdir(parents=True, exist_ok=True)
                keep.clear(self._dir)
                set_broken_aside(self._dir)
            self._orbax = ocp.AsyncCheckpointer(handler)

    def should_save(self, step: int) -> bool:
        """Whether the configured period falls on `step`."""
        return step % self._save.period == 0

    def save(self, step: int, state: TrainState, info: RunInfo) -> None:
        """Starts saving; returns when the state has been copied to the host, so that the step may donate it. With a
        bound on the host's memory that is when the checkpoint is whole.

        Waits first if the previous save is still being written. A step that is already saved is left as it is.
        info: `step`, `arrays` and `digests` are filled in here. Raises SaveError if it can't begin or if the previous
        one failed.
        """
        ocp = _orbax()
        began = time.monotonic()
        self._untold = self.wait()
        final = self._dir / f"{PREFIX}{step}"
        if is_whole(final):
            return
        arrays, digests = trees.describe(state), digest.digests(state)
        info = dataclasses.replace(info, step=step, arrays=arrays, digests=digests)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(trees.nested(state)), info=ocp.args.JsonSave(info.to_json())
        )
        written = final.with_name(final.name + keep.WRITTEN) if self._is_local else final
        self._background.failure = None
        self._writing = _Writing(step, began)
        with self._explained(f"{PREFIX}{step} could not be written"):
            self._orbax.save(written, args=args, force=True)
        self._writing.blocked = time.monotonic() - began
        self._writing.begin(functools.partial(self._finish, self._writing, written, final))
        if self._save.host_bytes is not None:
            saved = self.wait()
            assert saved is not None
            self._untold = dataclasses.replace(saved, blocked=saved.seconds)

    def _finish(self, writing: _Writing, written: Any, final: Any) -> None:
        """In a thread: waits for Orbax, whose processes end together, gives the checkpoint its name, and deletes those
        that it takes the place of.
        """
        self._orbax.wait_until_finished()
        writing.bytes = seal.write(written, jax.process_index(), jax.process_count())
        if jax.process_index() != 0:
            return
        if self._is_local:
            written.rename(final)
            folder = os.open(final.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        writing.deleted = keep.delete(self._dir, keep.doomed(self._dir, self._save))

    def check(self) -> Saved | None:
        """What has become whole since the last call. Costs microseconds: call it at every step.

        Raises SaveError if the save in the background has failed.
        """
        writing, untold, self._untold = self._writing, self._untold, None
        if writing is None or untold is not None:
            return untold
        with self._explained(f"{PREFIX}{writing.step} could not be written"):
            if self._background.failure is not None:
                raise self._background.failure
            if not writing.is_over():
                return None
        distributed.remember(f"{PREFIX}{writing.step}")
        self._writing = None
        return writing.saved()

    def wait(self) -> Saved | None:
        """Returns when the last save is whole. Raises SaveError if it failed."""
        saved = self.check()
        while self._writing is not None:
            saved = self.check() or saved
            time.sleep(0.001 if self._writing is not None else 0)
        return saved

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception the save on its way is still waited for, but its own failure must not hide the first one.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(SaveError):
            self.close()

    def close(self) -> None:
        """Waits for the last save. Raises SaveError if it failed."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            logging.getLogger("absl").removeFilter(self._background)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns a failure to write into one line that says what stays usable, and frees the space that it took."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            writing, self._writing = self._writing, None
            if writing is not None and self._is_local and jax.process_index() == 0:
                for leftover in self._dir.glob(f"{PREFIX}{writing.step}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            usable = newest(self._dir)
            reason = "the disk is full" if full else (str(error) or type(error).__name__).splitlines()[0][:200]
            stays = (
                "no checkpoint is whole" if usable is None else f"{PREFIX}{usable} is whole; a new run goes on from it"
            )
            code = 2 if full else exit_code_of(error)
            raise SaveError(f"{self._dir}: {what}: {reason}; {stays}", code) from error


class _Writing:
    """A save on its way: the thread that ends it, and how that went."""

    def __init__(self, step: int, began: float):
        self.step, self._began = step, began
        self.blocked, self.bytes = 0.0, 0
        self.deleted: tuple[int, ...] = ()
        self._seconds = 0.0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def begin(self, finish: Any) -> None:
        def run() -> None:
            try:
                finish()
            except BaseException as error:
                self._failure = error
            self._seconds = time.monotonic() - self._began

        self._thread = threading.Thread(target=run, name="palmjax-checkpoint")
        self._thread.start()

    def is_over(self) -> bool:
        """Whether the thread has ended; raises what it raised."""
        assert self._thread is not None
        if self._thread.is_alive():
            return False
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return True

    def saved(self) -> Saved:
        return Saved(
            step=self.step, blocked=self.blocked, seconds=self._seconds, bytes=self.bytes, deleted=self.deleted
        )


class _BackgroundLog(logging.Filter):
    """Catches the failure of a background save as Orbax logs it, in place of its traceback on the console.

    Orbax 0.12.8 raises it again only after all processes have met at a barrier, where those whose part went well arrive
    20 minutes later; the log is where a process learns of it at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if "orbax" not in record.pathname:
            return True
        if "No prioritized params found" in str(record.msg):  # that is what a bound on the host's memory means
            return False
        if not record.exc_info:
            return True
        if "background save" in record.getMessage():
            self.failure = record.exc_info[1]
        return False


@functools.cache
def _orbax() -> Any:
    """Orbax, imported when first used."""
    import orbax.checkpoint as ocp

    # When one array fails, Orbax 0.12.8 abandons those beside it, which then report to a closed event loop or nobody.
    hook = sys.unraisablehook

    def without_late_reports(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def is_ours_to_report(record: logging.LogRecord) -> bool:
        return not ("never retrieved" in (text := record.getMessage()) and "/orbax/" in text)

    sys.unraisablehook = without_late_reports
    logging.getLogger("asyncio").addFilter(is_ours_to_report)
    return ocp
