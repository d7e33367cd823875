"""Local files written whole or not at all, and what a failure to read or write means for a process."""

from __future__ import annotations

import errno
import os

EXIT_STORAGE = 74
"""Exit code where a file or a storage could not be read or written (EX_IOERR): run the same command again."""


_FOR_PEOPLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_FOR_PEOPLE |= {errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTEMPTY}


def exit_code_of(error: BaseException) -> int:
    """`EXIT_STORAGE`, or 2 for what running again does not change: a person must make room or give leave."""
    return 2 if getattr(error, "errno", None) in _FOR_PEOPLE else EXIT_STORAGE


def describe_os_error(error: OSError) -> str:
    """In one line: which file, and what the operating system says."""
    said = error.strerror or (str(error) or type(error).__name__).splitlines()[0]
    return f"{error.filename}: {said}" if error.filename else said


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) under `path`: a reader, or a kill at any moment, sees the old file or the new.

    What was there is replaced. Raises OSError.
    """
    partial = f"{os.fspath(path)}.part"
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
