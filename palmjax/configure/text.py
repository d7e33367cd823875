"""gin files and command-line bindings to statements that know where they were written. The only `import gin`.

The grammar is gin-config's own (its parser reads the text): bindings, scopes, blocks, macros, `%gin.REQUIRED`,
references, `include`, `import`. Two rules are ours: a file is read once however often it is included, so that a second
include cannot silently undo overrides; and a key may be bound once in a file.
"""

from __future__ import annotations

import importlib.resources
import math
import os
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath
from gin import config_parser

import palmjax
from palmjax.config import ConfigError
from palmjax.configure.names import nearest

Scope = tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """`@scope/Class()`. Without a scope it takes the scope active where it is used; without `()` it is refused."""

    scope: Scope
    selector: str
    evaluate: bool

    def __str__(self) -> str:
        return "@" + "/".join((*self.scope, self.selector)) + ("()" if self.evaluate else "")


@dataclass(frozen=True)
class Macro:
    """`%NAME`; `%gin.REQUIRED` is `REQUIRED`."""

    name: str

    def __str__(self) -> str:
        return "%" + self.name


REQUIRED = Macro("gin.REQUIRED")


@dataclass(frozen=True, eq=False)
class Statement:
    """`scope/selector.field = value`, or a macro `field = value` (then `selector` is empty).

    where: "file:line" or "--gin.KEY". order: position among all statements; the later of two with one key wins.
    unit: the file (or the command line) it stands in.
    """

    scope: Scope
    selector: str
    field: str
    value: Any
    where: str
    order: int
    unit: str

    def __str__(self) -> str:
        return "/".join((*self.scope, f"{self.selector}.{self.field}" if self.selector else self.field))


@dataclass
class Source:
    """All statements in reading order, the modules of `import` lines, and the include chain as (depth, file)."""

    statements: list[Statement] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    files: list[tuple[int, str]] = field(default_factory=list)


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        *scope, selector = scoped_configurable_name.split("/")
        return Reference(tuple(scope), selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return REQUIRED if macro_name == REQUIRED.name else Macro(macro_name)


def _parse(text: str, where: str) -> Iterator[Any]:
    """gin-config's statements of `text`; a ConfigError with `where` and the line for text that is not gin."""
    try:
        yield from config_parser.ConfigParser(text, _Delegate())
    except SyntaxError as error:
        raise ConfigError(
            f"{where}:{error.lineno}: {error.msg.strip().rstrip('.')}: {(error.text or '').strip()!r}"
        ) from error
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise ConfigError(f"{where}:{line}: {message}") from error


def as_gin(binding: str) -> str:
    """A command line's binding as a line of gin: a bare word or path after `=` is a string (`MODEL_DIR=/tmp/run`).

    Raises ConfigError for what is neither.
    """
    where = f"--gin.{binding.partition('=')[0].strip()}"
    try:
        list(_parse(binding, where))
    except ConfigError:
        bare = re.fullmatch(r"\s*([\w./]+)\s*=\s*([\w./~][^\s'\"]*)\s*", binding)
        if not bare:
            raise ConfigError(
                f"{where}: cannot read {binding!r} as gin; quote a string, as in {where}=\"'text'\""
            ) from None
        return f"{bare[1]} = {bare[2]!r}"
    return binding


def gin_text(value: Any) -> str:
    """`value` as gin text. Raises TypeError for what gin cannot write."""
    if value is None or isinstance(value, (bool, int, str, Reference, Macro)):
        return repr(value) if not isinstance(value, (Reference, Macro)) else str(value)
    if isinstance(value, float) and not math.isnan(value):
        return repr(value) if math.isfinite(value) else ("1e999" if value > 0 else "-1e999")
    if isinstance(value, tuple):
        return "(" + ", ".join(map(gin_text, value)) + (",)" if len(value) == 1 else ")")
    if isinstance(value, list):
        return "[" + ", ".join(map(gin_text, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{gin_text(key)}: {gin_text(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"gin cannot write {value!r}")


def shipped_folders() -> list[str]:
    """Where the shipped configs are: beside palmjax in a checkout, inside the package when installed.

    The folder that holds `gin/` and `gin/` itself, so `gin/exp/X.gin` and `exp/X.gin` name one file from anywhere.
    """
    checkout = Path(palmjax.__file__).parent.parent
    installed = Path(str(importlib.resources.files(palmjax))) / "_data"
    root = checkout if (checkout / "pyproject.toml").exists() else installed
    return [str(root), str(root / "gin")]


def _shown(path: epath.Path) -> str:
    """A path as error messages name it: relative to the working directory when it lies below it."""
    text = os.fspath(path)
    below = "://" not in text and Path(text).is_relative_to(Path.cwd())
    return os.path.relpath(text) if below else text


class Reader:
    """Reads files and command-line bindings into one `Source`.

    search_paths: folders searched after the working directory and before the shipped configs.
    """

    def __init__(self, search_paths: Sequence[str] = ()) -> None:
        self.source = Source()
        self._folders = [os.getcwd(), *search_paths, *shipped_folders()]
        self._read: set[str] = set()

    def _find(self, name: str, where: str) -> epath.Path:
        if "://" in name or os.path.isabs(name):
            places = [epath.Path(name)]
        else:
            places = [epath.Path(folder) / name for folder in dict.fromkeys(self._folders)]
        for place in places:
            if place.is_file():
                return place
        gin_files = [file for place in places[:-2] if place.parent.is_dir() for file in place.parent.glob("*.gin")]
        shipped = {
            os.fspath(file.relative_to(shipped_folders()[1])) for file in Path(shipped_folders()[1]).rglob("*.gin")
        }
        hint = nearest(os.path.basename(name), {file.name for file in gin_files}, prefix="; did you mean ")
        hint = hint or nearest(name.removeprefix("gin/"), shipped, prefix="; did you mean ")
        if name.startswith("t5x/"):
            hint = '; T5X configures its own code there: include "run/train.gin", a model and an optimizer instead'
        searched = ", ".join(_shown(place.parent) for place in places)
        raise ConfigError(f"{where}no gin file {name!r}{hint}\n  searched in {searched}")

    def file(self, name: str, *, where: str = "", chain: tuple[str, ...] = ()) -> None:
        """Reads a file and what it includes. A file that was read before is not read again."""
        path = self._find(name, where)
        key = os.path.realpath(path) if "://" not in os.fspath(path) else os.fspath(path)
        shown = _shown(path)
        if key in chain:
            links = " -> ".join(_shown(epath.Path(link)) for link in (*chain[chain.index(key) :], key))
            raise ConfigError(f"{where}circular include: {links}")
        if key in self._read:
            return
        self._read.add(key)
        self.source.files.append((len(chain), shown))
        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}{shown} is not a text file: {error}") from error
        self._statements(text, shown, shown, (*chain, key))

    def binding(self, text: str) -> None:
        """Reads one command-line binding."""
        where = "--gin." + text.partition("=")[0].strip()
        self._statements(as_gin(text), where, "the command line", ())

    def _statements(self, text: str, origin: str, unit: str, chain: tuple[str, ...]) -> None:
        for statement in list(_parse(text, origin)):
            where = f"{origin}:{statement.location.line_num}" if chain else origin
            match statement:
                case config_parser.IncludeStatement(filename=name):
                    self.file(name, where=where + ": ", chain=chain)
                case config_parser.ImportStatement(module=module):
                    # dynamic_registration and a T5X script's own module have nothing to add here.
                    if module.split(".")[0] not in ("__gin__", "__main__", "gin") and module not in self.source.imports:
                        self.source.imports.append(module)
                case config_parser.BindingStatement(scope=scope, selector=selector, arg_name=name, value=value):
                    keys = (selector, name) if name else ("", selector)
                    scopes = tuple(scope.split("/")) if scope else ()
                    self.source.statements.append(
                        Statement(scopes, *keys, value, where, len(self.source.statements), unit)
                    )
