"""Local files written whole or not at all."""

from __future__ import annotations

import os


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
