"""Files written whole or not at all; what a failure to read or write means for a process, and its last words."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Any

EXIT_STORAGE = 74
"""Exit code where a file or a storage could not be read or written (EX_IOERR): run the same command again."""


_FOR_PEOPLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_FOR_PEOPLE |= {errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTEMPTY}


def exit_code_of(error: BaseException) -> int:
    """`EXIT_STORAGE`, or 2 for what running again does not change: a person must make room or give leave."""
    return 2 if getattr(error, "errno", None) in _FOR_PEOPLE else EXIT_STORAGE


TRACEBACK = "PALMJAX_TRACEBACK"
"""Set to 1 in the environment, an error that is one line brings its traceback along."""


def in_words(error: BaseException) -> str:
    """An error that ends a process, for people. Of an OSError that nobody expected, one line: which file, what the
    operating system says, and where it came from, for it may be a mistake of ours.
    """
    if not isinstance(error, OSError):
        return str(error)
    said = error.strerror or (str(error) or type(error).__name__).splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    home = Path(__file__).parent
    ours = [f for f in frames if Path(f.filename).is_relative_to(home) and f.filename != str(home / "cli.py")]
    where = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in (ours or frames)[-1:])
    said = f"{error.filename}: {said}" if error.filename else said
    return f"{said} ({type(error).__name__}{where}; {TRACEBACK}=1 shows more)"


def say_error(error: BaseException, prefix: str = "") -> None:
    """Prints `in_words` on stderr, behind the traceback if `TRACEBACK` asks for it."""
    before = "".join(traceback.format_exception(error)) if os.environ.get(TRACEBACK) == "1" else ""
    say(f"{before}error: {prefix}{in_words(error)}")


def say(text: str) -> None:
    """Prints on stderr. Where that is a file on a full disk the words are lost; the exit code must not be."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def write_whole(path: Any, content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) under `path`: a reader, or a kill at any moment, sees the old file or the new.

    path: a local one, or etils' of an object store, which shows an object whole or not at all.
    What was there is replaced. Raises OSError.
    """
    data = content.encode() if isinstance(content, str) else content
    if not isinstance(path, str | Path):
        path.write_bytes(data)
        return
    partial = f"{os.fspath(path)}.part"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(partial)  # on a full disk it is in the way
        raise
