"""What the tests of this room share: a reader of TensorBoard's files that needs no TensorFlow, and an object store."""

import io
import pathlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from etils import epath
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Bucket:
    """An object store in memory: objects are written whole, never appended to, and folders exist through them.

    objects: by their name. requests: every access as (verb, name), those that failed too. down: requests raise.
    seconds: how long a write takes.
    """

    url = "bucket://runs/a"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.down = False
        self.seconds = 0.0
        self._lock = threading.Lock()

    def request(self, verb: str, name: str) -> dict[str, bytes]:
        with self._lock:
            self.requests.append((verb, name))
            if self.down:
                raise ConnectionError("the bucket is out of reach")
            return dict(self.objects)

    def put(self, name: str, data: bytes) -> None:
        time.sleep(self.seconds)
        self.request("write", name)
        with self._lock:
            self.objects[name] = data

    def count(self, verb: str) -> int:
        return sum(verb == done for done, _ in self.requests)

    def save(self, folder: Path) -> None:
        """Copies every object of the run into a local folder."""
        for name, data in self.objects.items():
            path = folder / name.removeprefix("runs/a/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


@epath.register_path_cls("bucket://")
class BucketPath(pathlib.PurePosixPath):
    """bucket://NAME, as etils' paths are for gs://; there is no mkdir, which an object store can do without."""

    bucket: ClassVar[Bucket]

    @property
    def _object(self) -> str:
        return str(self).removeprefix("bucket:/")

    def exists(self) -> bool:
        return self._object in self.bucket.request("exists", self._object) or self.is_dir()

    def is_dir(self) -> bool:
        return any(name.startswith(f"{self._object}/") for name in self.bucket.request("is_dir", self._object))

    def iterdir(self) -> Iterator["BucketPath"]:
        names = [n for n in self.bucket.request("list", self._object) if n.startswith(f"{self._object}/")]
        if not names:
            raise FileNotFoundError(self._object)
        children = {name.removeprefix(f"{self._object}/").split("/")[0] for name in names}
        return (self / child for child in sorted(children, reverse=True))

    def read_bytes(self) -> bytes:
        objects = self.bucket.request("read", self._object)
        if self._object not in objects:
            raise FileNotFoundError(self._object)
        return objects[self._object]

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb", f"open({mode!r}): an object store has no such mode"
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, data: bytes) -> int:
        self.bucket.put(self._object, data)
        return len(data)

    def unlink(self) -> None:
        self.bucket.request("delete", self._object)
        del self.bucket.objects[self._object]


@pytest.fixture
def bucket(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """The bucket of one test; what waits for its upload lies among the test's own files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("spool")))
    BucketPath.bucket = Bucket()
    yield BucketPath.bucket
    BucketPath.bucket.down = True  # a thread that a test left behind can do nothing


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Waits for what another thread does; fails after 30 s."""

    def wait(done: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not done():
            assert time.monotonic() < end, "waited for 30 s"
            time.sleep(0.005)

    return wait
