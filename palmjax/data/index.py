"""Which stores a DatasetConfig means, found without seqio. Imports config and data.store.

Only seqio knows a task's vocabulary and a mixture's tasks and rates. Once it has been asked, the answer is kept in
`<store_dir>/index`, under the values of the config that decide it, so that a later start needs neither seqio nor
TensorFlow.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError, DatasetConfig, TaskPart
from palmjax.data.store import FORMAT, Folder, is_complete

_LATEST = "latest"


@dataclasses.dataclass(frozen=True)
class Source:
    """One task of a dataset: its store's path below store_dir, and its rate, the share of rows it is to give.

    files: patterns of the local files that a registered task reads, if its source tells; state: what `files_state` said
    of them when the store was built.
    """

    task: str
    path: str
    rate: float
    files: tuple[str, ...] = ()
    state: str = ""

    def has_changed(self) -> bool:
        """Whether its files are others now. A finished store does not need them: those that are gone say nothing."""
        return files_state(self.files) not in ("", self.state)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def files_state(patterns: Sequence[str]) -> str:
    """Digest of path and size of every file that the patterns match; "" if there is none.

    Not of the time of change: a copy has another one, and so it may have on another host, which would wait for a store.
    """
    files = sorted({path for pattern in patterns for path in glob.glob(pattern)})
    return digest([[path, os.path.getsize(path)] for path in files]) if files else ""


def values_of(part: TaskPart) -> list[Any]:
    """What decides a task made from values: its class and its fields."""
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}  # pyright: ignore[reportArgumentType]
    return [f"{type(part).__module__}.{type(part).__qualname__}", fields]


def content_of(part: TaskPart) -> str:
    """What else decides it: the identity of its files. Raises ConfigError if there are none, or not to be read."""
    content_key = getattr(part, "content_key", None)
    try:
        return content_key() if content_key else ""
    except (ValueError, OSError) as error:
        raise ConfigError(f"task {part.name!r}: {error}") from error


def sources_of(modules: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each module's source file, "" for one that isn't found: what decides tasks that modules register.

    Nothing is imported, neither the module (a task module loads TensorFlow) nor the packages it is in. What a module
    itself imports doesn't count.
    """
    return {module: _source_digest(module) for module in sorted(set(modules))}


def _source_digest(module: str) -> str:
    name, folders, spec = "", None, None
    for part in module.split("."):  # importlib.util.find_spec would import the packages
        name = f"{name}.{part}".lstrip(".")
        finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((found for finder in finders if (found := finder.find_spec(name, folders))), None)
        if spec is None:
            return ""
        folders = spec.submodule_search_locations
    if spec is None or not spec.has_location or spec.origin is None:
        return ""
    try:
        return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    except OSError:  # inside a zip file, for one: then its name decides, as for a module that isn't found
        return ""


def _entry_name(config: DatasetConfig) -> str:
    made_from_values = any(part.name == config.mixture_or_task_name for part in config.tasks)
    identity = {
        "format": FORMAT,
        "name": config.mixture_or_task_name,
        "split": config.split,
        "use_cached": config.use_cached,
        "modules": sorted(config.modules) if made_from_values else sources_of(config.modules),
        "tasks": [values_of(part) for part in config.tasks],
    }
    return f"index/{digest(identity)}.json"


def _entries(config: DatasetConfig) -> dict[str, Any]:
    data = Folder(config.store_dir).read(_entry_name(config))
    try:
        return json.loads(data) if data else {}
    except ValueError:  # only a memory of what seqio said: it is asked again
        return {}


def lookup(config: DatasetConfig) -> list[Source] | None:
    """The finished stores of this config, or None if seqio has to be asked or a store has to be built.

    When a task's files have changed, its store has to be built. When they are gone, which a finished store does not
    need, the stores built last are meant. Raises ConfigError if the files are gone and there are no such stores.
    """
    entries = _entries(config)
    try:
        content = digest([content_of(part) for part in config.tasks])
    except ConfigError as error:
        if _LATEST not in entries:
            raise
        print(f"palmjax: {error}; using the token stores built from it before", file=sys.stderr)
        content = _LATEST
    sources = [Source(**source | {"files": tuple(source.get("files", ()))}) for source in entries.get(content, ())]
    folder = Folder(config.store_dir)
    if not sources or not all(is_complete(f"{folder.path}/{source.path}") for source in sources):
        return None
    return None if any(source.has_changed() for source in sources) else sources


def save(config: DatasetConfig, sources: Sequence[Source]) -> None:
    """Keeps the answer for the next `lookup`."""
    entries = _entries(config)
    answer = [dataclasses.asdict(source) for source in sources]
    entries[digest([content_of(part) for part in config.tasks])] = entries[_LATEST] = answer
    Folder(config.store_dir).write(_entry_name(config), json.dumps(entries, indent=1).encode())
