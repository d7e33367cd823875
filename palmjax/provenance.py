"""What a checkpoint records of its run beside the arrays: enough to go on from it, and to know what made it."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import palmjax
from palmjax.config import ConfigError, section
from palmjax.data import vocabulary as vocabularies
from palmjax.data.vocabulary import Vocabulary

FORMAT = 2
"""Of `info`. Since 2 a checkpoint lists its files' checksums and its arrays' digests."""
PACKAGES = ("palmjax", "pallas_kernels", "tasks")
"""The distribution's packages, installed side by side."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")


@section
class DataPosition:
    """Where the data stands: the next step's first row, the row ranges skipped so far, and which data it is."""

    first_row: int
    skips: tuple[tuple[int, int], ...] = ()
    fingerprint: str = ""


@section
class RunInfo:
    """A checkpoint's `info`.

    config: the operative gin text. flat_config: the same as `path -> value` lines. mesh: axis -> devices.
    guard: what the run's guard goes on from, a JSON object (`palmjax.guard`).
    code, libraries: versions, as `code_version` and `library_versions` give them.
    metrics: of the held-out evaluation at this step, if there was one.
    step, arrays (name -> dtype and shape) and digests (name -> 16 hexadecimal digits, `checkpoint.digest`) are those of
    the saved state; `Checkpointer.save` fills them in. sealed: whether the folder must list its files' checksums.
    """

    seed: int
    data: DataPosition
    config: str
    flat_config: Mapping[str, str]
    vocabulary: Vocabulary
    mesh: Mapping[str, int]
    code: Mapping[str, str]
    libraries: Mapping[str, str]
    guard: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    step: int = 0
    arrays: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sealed: bool = True

    def __post_init__(self) -> None:
        texts = (self.flat_config, self.code, self.libraries, self.arrays, self.digests)
        if not all(_is_map(value, str) for value in texts):
            raise TypeError("configuration, versions, arrays and digests are maps of names to text")
        if not (_is_map(self.mesh, int) and _is_map(self.metrics, int, float) and isinstance(self.config, str)):
            raise TypeError("mesh, metrics or config is of another type")
        if not all(type(value) is int for value in (self.seed, self.step, self.data.first_row)):
            raise TypeError("seed, step and first_row are integers")

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal RunInfo; the vocabulary's files go in as base64."""
        beside = ("data", "vocabulary", "sealed")
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in beside}
        files = {name: base64.b64encode(content).decode() for name, content in self.vocabulary.files().items()}
        return {
            "format": FORMAT if self.sealed else 1,
            **{name: dict(value) if isinstance(value, Mapping) else value for name, value in out.items()},
            "data": dataclasses.asdict(self.data),
            "vocabulary": {
                "kind": self.vocabulary.to_json(),
                "files": files,
                "fingerprint": self.vocabulary.fingerprint,
            },
        }

    @classmethod
    def from_json(cls, text: str) -> RunInfo:
        """Raises ConfigError if the format is newer than this palmjax; ValueError, KeyError or TypeError if damaged."""
        value = json.loads(text)
        if (written := int(value.pop("format"))) > FORMAT:
            raise ConfigError("written by a newer palmjax; update this one")
        data = value.pop("data")
        data["skips"] = tuple((int(first), int(last)) for first, last in data["skips"])
        described = value.pop("vocabulary")
        files = {name: base64.b64decode(content) for name, content in described["files"].items()}
        return cls(
            data=DataPosition(**data),
            vocabulary=vocabularies.from_json(described["kind"], files),
            sealed=written >= 2,
            **value,
        )


def _is_map(value: Any, *kinds: type) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and type(v) in kinds for k, v in value.items())


def source_digest(root: Path) -> str:
    """Digest of the names and bytes of every Python file in the `PACKAGES` below `root`, 16 hexadecimal digits.

    Each file's name and content go in with their lengths, so that no two different trees are the same bytes.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            for item in (file.relative_to(root).as_posix().encode(), file.read_bytes()):
                digest.update(len(item).to_bytes(8, "little") + item)
    return digest.hexdigest()[:16]


@functools.cache
def code_version() -> dict[str, str]:
    """palmjax's version, a digest of the source files of `PACKAGES` and, in a git checkout, the commit."""
    root = Path(palmjax.__file__).parent.parent
    version = {"palmjax": palmjax.__version__, "source": source_digest(root)}
    if (root / ".git").exists():
        head = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
        try:
            commit = subprocess.run(head, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):  # no git here: the digest alone says what ran
            commit = ""
        if commit:
            version["commit"] = commit
    return version


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a run's numbers."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
