"""MODEL_DIR, the folder of one run: its checkpoints' names, which are whole, the lock, and reading with patience."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from palmjax.config import ConfigError
from palmjax.files import EXIT_STORAGE

PREFIX = "checkpoint_"
PARTS = ("commit_success.txt", "_CHECKPOINT_METADATA", "info/metadata", "state/_METADATA", "state/manifest.ocdbt")
"""Files without which a checkpoint is not whole."""

DAMAGED = "DAMAGED.txt"
"""Marks, with the reason, a checkpoint on an object store that turned out to be damaged: it can't be renamed there."""

PAUSES = (0.2, 1.0, 4.0)
"""Seconds to wait before a file that the storage did not give is asked for again."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


def as_path(path: str | os.PathLike[str]) -> Any:
    """A pathlib path, or etils' equal of it for gs:// and other remote folders.

    Raises ConfigError for a scheme that etils does not know, and for gs:// without its client library.
    """
    if "://" not in str(path):
        return Path(path).expanduser().absolute()
    if str(path).startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"{path} needs the client of Google Cloud Storage: pip install 'palmjax[gcs]'")
    # etils would take TensorFlow for gs:// wherever it is installed, and import it for ten seconds.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config
    from etils import epath

    # gcsfs remembers listings of folders and does not see what TensorStore or another process has written since.
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)

    try:
        return epath.Path(path)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} can't be opened: {error} is not a scheme that etils knows") from error


class Unreadable(ConfigError):
    """The storage does not let a file be read now. Nothing is known to be wrong with what lies there."""

    exit_code = EXIT_STORAGE


def patiently(path: Any, read: Callable[[Any], T]) -> T:
    """`read(path)`, tried again where the storage fails. Raises FileNotFoundError and its like at once, Unreadable if
    it fails to the last.
    """
    for pause in (*PAUSES, None):
        try:
            return read(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise  # it says what is there
        except Exception as error:
            # On an object store a failure comes as whatever its client raises.
            if isinstance(path, Path) and not isinstance(error, OSError):
                raise
            if pause is None:
                reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0][:200]
                raise Unreadable(f"{path} can't be read now: {reason}; run the same command again") from error
            time.sleep(pause)
    raise AssertionError


def _missing(path: Any) -> str | None:
    """The first file that a whole checkpoint would have and `path` has not."""
    if not isinstance(path, Path) and (path / DAMAGED).exists():
        return f"{DAMAGED} says that part of it"
    return next((part for part in PARTS if not (path / part).exists()), None)


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint has every part and is not marked as damaged; what is in the parts is another question."""
    return _missing(as_path(path)) is None


def steps(model_dir: str | os.PathLike[str]) -> list[int]:
    """Steps of the whole checkpoints in the folder, rising."""
    folder = as_path(model_dir)
    found = [m for p in patiently(folder, _children) if (m := re.fullmatch(rf"{PREFIX}(\d+)", p.name))]
    return sorted(int(m[1]) for m in found if _missing(folder / m[0]) is None)


def set_aside(path: Any, why: str, reason: str) -> str:
    """Takes the name from a checkpoint that can't be used, so that its step can be saved again; deletes nothing.

    `checkpoint_N` becomes `<why>_checkpoint_N.<time>`. On an object store, which can't rename, it is marked, and stays
    until its step is saved again. Returns where it lies.
    """
    if not isinstance(path, Path):
        (path / DAMAGED).write_text(reason)
        logger.warning("%s: %s; marked as damaged", path, reason)
        return str(path)
    there = path.with_name(f"{why}_{path.name}.{time.time_ns()}")
    logger.warning("%s: %s; set aside as %s", path, reason, there.name)
    path.rename(there)
    return str(there)


def set_broken_aside(model_dir: Any) -> None:
    """Renames checkpoints that lost a part to `broken_checkpoint_N.<time>`, so that step N can be saved again.

    Local folders only: an object store cannot rename, and a save there is whole or absent.
    """
    if not isinstance(model_dir, Path):
        return
    for path in _children(model_dir):
        if re.fullmatch(rf"{PREFIX}\d+", path.name) and (part := _missing(path)) is not None:
            set_aside(path, "broken", f"it is not whole ({part} is missing)")


def newest(model_dir: str | os.PathLike[str]) -> int | None:
    """The last step of which MODEL_DIR has a whole checkpoint, or None."""
    return max(steps(model_dir), default=None)


def inventory(model_dir: Any) -> str:
    """What a user can take instead, in words."""
    found = steps(model_dir)
    if not found:
        return f"{model_dir} holds no whole checkpoint"
    shown = ", ".join(f"{PREFIX}{s}" for s in found[-5:])
    return f"{model_dir} holds {'..., ' if len(found) > 5 else ''}{shown}"


def absence(path: Any) -> str:
    """Why there is no folder of this checkpoint's name, in words, and what can be taken instead."""
    if any(p.name.startswith(f"{path.name}.") for p in _children(path.parent)):
        return f"{path} is half written: it is being saved, or its save was cut off; {inventory(path.parent)}"
    return f"there is no checkpoint {path}; {inventory(path.parent)}"


def resolve(path: str | os.PathLike[str]) -> str:
    """The checkpoint folder that `path` means: itself, or the newest whole one if it is a MODEL_DIR.

    Raises ConfigError if there is none, or if it is half written; the text lists what is there.
    """
    given = as_path(path)
    if re.fullmatch(rf"{PREFIX}\d+", given.name):
        missing = _missing(given)
        if missing is None:
            return str(given)
        if given.is_dir() and (given / "state").is_dir() and not (given / "info").exists():
            raise ConfigError(f"{given} has no info/: it was not written by palmjax, or lost a part")
        if given.is_dir():
            raise ConfigError(f"{given} is half written: {missing} is missing; {inventory(given.parent)}")
        raise ConfigError(absence(given))
    if not given.is_dir():
        raise ConfigError(f"there is no folder {given}: expected a {PREFIX}N folder or a MODEL_DIR that holds some")
    step = newest(given)
    if step is None:
        names = sorted(p.name for p in _children(given))
        raise ConfigError(f"{given} holds no whole checkpoint; it holds {', '.join(names[:8]) or 'nothing'}")
    return str(given / f"{PREFIX}{step}")


def _children(folder: Any) -> list[Any]:
    return list(folder.iterdir()) if folder.is_dir() else []


_locked: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _let_go() -> None:
    for descriptor in _locked:
        os.close(descriptor)


# A forked child that outlives this process must not keep the lock alive through its copy of the descriptor.
os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def lock(model_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Makes MODEL_DIR and holds it for this run, of which only process 0 takes the lock.

    An flock on MODEL_DIR/.lock: the kernel releases it however the process ends. Remote folders (gs://) have none:
    there a second run is not noticed, and a line in the log says so.
    Raises ConfigError naming the holder's pid and host.
    """
    import jax

    folder = as_path(model_dir)
    if jax.process_index() != 0 or not isinstance(folder, Path):
        if jax.process_index() == 0:
            logger.warning("%s can't be locked: make sure that no other run writes there", folder)
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"MODEL_DIR {folder} can't be used: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(f"MODEL_DIR {folder} can't be locked: {error.strerror}") from error
            file.seek(0)
            holder = file.read().strip() or "a process that has not said its name yet"
            raise ConfigError(
                f"another run is using {folder}: {holder}; stop it first, or choose another MODEL_DIR"
            ) from None
        _locked.add(file.fileno())
        try:
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            yield
        finally:
            _locked.discard(file.fileno())
