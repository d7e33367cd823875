"""What the tests of this room share: a reader of TensorBoard's files that needs no TensorFlow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  # made at run time


@pytest.fixture
def read_events() -> Callable[[Path], list[Any]]:
    """Every event of a folder's files, in order. A TFRecord is length, checksum, bytes, checksum."""

    def read(folder: Path) -> list[Any]:
        events = []
        for file in sorted(folder.glob("events*")):
            data = file.read_bytes()
            while data:
                length = int.from_bytes(data[:8], "little")
                events.append(Event.FromString(data[12 : 12 + length]))
                data = data[16 + length :]
        return events

    return read
