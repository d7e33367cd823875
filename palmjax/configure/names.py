"""Which classes gin text may name: the frozen dataclasses of palmjax, of `tasks`, and of imported modules.

A name means the same in every file and on the command line: the class name, alone (`Adafactor`) or behind any tail of
its module's path (`optim.Adafactor`). There are no aliases. Modules that gin text imports are loaded only when a name
is not palmjax's own, because importing a seqio task module loads TensorFlow.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Iterable
from typing import Any

from palmjax.config import ConfigError
from palmjax.quiet import quiet_libraries

MODULES = (
    "palmjax.config",
    "palmjax.models.decoder",
    "palmjax.models.attention",
    "palmjax.models.embeddings",
    "palmjax.models.layers",
    "palmjax.models.moe",
    "palmjax.models.parameters",
    "palmjax.models.positions",
    "palmjax.loss",
    "palmjax.loss_scale",
    "palmjax.optim",
    "palmjax.sampling",
    "palmjax.decode.beam",
    "palmjax.decode.contrastive",
    "palmjax.data.batch",
    "palmjax.data.order",
    "palmjax.evaluation.detokenize",
    "palmjax.evaluation.forms",
    "palmjax.evaluation.prompts",
    "palmjax.evaluation.records",
    "palmjax.evaluation.tasks",
    "palmjax.interop.bigbench",
    "palmjax.interop.seqio_tasks",
    "palmjax.sampling",
    "tasks.jsonl",
    "tasks.objectives",
    "tasks.python_stdlib",
    "tasks.text_files",
    "tasks.tfds",
)


def _is_frozen_dataclass(cls: Any) -> bool:
    return inspect.isclass(cls) and dataclasses.is_dataclass(cls) and vars(cls)["__dataclass_params__"].frozen


def is_configurable(cls: Any) -> bool:
    """Whether gin may build this class: a frozen dataclass with no abstract methods left."""
    return _is_frozen_dataclass(cls) and not inspect.isabstract(cls)


def nearest(word: str, candidates: Iterable[str], *, prefix: str = "; nearest: ") -> str:
    """`prefix` and the candidate most like `word`, ignoring case, or an empty string when none is alike."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return prefix + by_lower[found[0]] if found else ""


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Annotations of a dataclass, resolved in its own module."""
    return typing.get_type_hints(cls)


def fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Fields that the constructor takes, by name."""
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


class Names:
    """The classes that gin text may name.

    imports: modules named by `import` lines. All of them are loaded at the first name that palmjax does not have, so
    a name never depends on what was loaded before it: palmjax's own class comes first, then the imported ones.
    """

    def __init__(self, imports: Iterable[str] = (), modules: Iterable[str] = MODULES) -> None:
        self._own = [cls for module in modules for cls in _defined_in(module)]
        self._imported: list[type] = []
        self._pending = list(imports)

    def _load_imports(self, sought: str) -> None:
        while self._pending:
            module = self._pending[0]
            try:
                with quiet_libraries():
                    self._imported += _defined_in(module)
            except ImportError as error:
                raise ConfigError(f"{sought}, but `import {module}` failed: {error}") from error
            del self._pending[0]

    def resolve(self, selector: str, where: str) -> type:
        """The class that `selector` names. Raises ConfigError when there is none, more than one, or it is abstract."""
        found = _matches(selector, self._own)
        if not found:
            self._load_imports(f"{where}: {selector!r} is no class of palmjax")
            found = _matches(selector, self._imported)
        if len(found) > 1:
            paths = " or ".join(f"{cls.__module__}.{cls.__name__}" for cls in found)
            raise ConfigError(f"{where}: {selector!r} is ambiguous: write {paths}")
        if not found:
            short, known = selector.rpartition(".")[2], {cls.__name__ for cls in self.classes()}
            hint = f"; write {short}" if short in known else nearest(short, known)
            raise ConfigError(f"{where}: no configurable class is named {selector!r}{hint}")
        if lacking := sorted(getattr(found[0], "__abstractmethods__", ())):
            raise ConfigError(f"{where}: {selector} cannot be built: it does not define {', '.join(lacking)}")
        return found[0]

    def name(self, cls: type) -> str:
        """The shortest text that resolves to `cls`."""
        parts = [*cls.__module__.split("."), cls.__name__]
        tails = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        return next(tail for tail in tails if (_matches(tail, self._own) or _matches(tail, self._imported)) == [cls])

    def classes(self) -> list[type]:
        """Every class known so far."""
        return [*self._own, *self._imported]


def _defined_in(module: str) -> list[type]:
    """Frozen dataclasses of a module. A package may re-export from its files, but not what is defined elsewhere."""
    found = vars(importlib.import_module(module)).values()
    below = (cls for cls in found if _is_frozen_dataclass(cls) and f"{cls.__module__}.".startswith(f"{module}."))
    return list(dict.fromkeys(below))


def _matches(selector: str, classes: Iterable[type]) -> list[type]:
    return [cls for cls in classes if f".{cls.__module__}.{cls.__name__}".endswith("." + selector)]
