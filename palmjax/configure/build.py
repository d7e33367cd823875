"""Statements to one tree of frozen dataclasses, with every key accounted for.

A field's value is its binding in the active scope (gin's rule: bindings of every prefix of the scope apply and the
longest prefix wins), else the dataclass default. A field typed by one concrete dataclass, or whose default is one, is
built from the bindings of that class without an explicit reference, so `SaveCheckpointConfig.period = 100` works alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from palmjax.config import ConfigError, DatasetConfig, Experiment
from palmjax.configure.check import Mismatch, check, expected
from palmjax.configure.names import Names, fields, hints, is_configurable, nearest
from palmjax.configure.text import REQUIRED, Macro, Reference, Scope, Source, Statement, gin_text

Key = tuple[Scope, type, str]

IMPORTS_FIELD = (DatasetConfig, "modules")
"""The field that gin's `import` lines are added to: building a store needs the modules that register its task."""


class Config:
    """The statements in force, by resolved key; and what each of them overrode."""

    def __init__(self, source: Source, names: Names, placeholders: bool = False) -> None:
        self.source = source
        self.names = names
        self.placeholders = placeholders
        self.bindings: dict[Key, Statement] = {}
        self.macros: dict[str, Statement] = {}
        self.history: dict[Statement, list[Statement]] = {}  # what a statement overrode, oldest first
        for statement in source.statements:
            self._add(statement)

    def _add(self, statement: Statement) -> None:
        table: dict[Any, Statement]
        if statement.selector:
            cls = self.names.resolve(statement.selector, statement.where)
            if statement.field not in fields(cls):
                hint = nearest(statement.field, fields(cls))
                raise ConfigError(f"{statement.where}: {cls.__name__} has no field {statement.field!r}{hint}")
            table, key = self.bindings, (statement.scope, cls, statement.field)
        else:
            table, key = self.macros, "/".join((*statement.scope, statement.field))
        before = table.get(key)
        if before and before.unit == statement.unit != "the command line":
            raise ConfigError(f"{statement.where}: {statement} is bound twice in this file, first at {before.where}")
        if before:
            self.history[statement] = [*self.history.get(before, []), before]
        table[key] = statement

    def applying(self, cls: type, name: str, scope: Scope) -> list[Statement]:
        """Bindings that apply to a field in a scope, the one in force first."""
        prefixes = [scope[:length] for length in range(len(scope), -1, -1)]
        return [self.bindings[key] for prefix in prefixes if (key := (prefix, cls, name)) in self.bindings]

    def macro(self, name: str, where: str) -> Statement:
        """The definition of a macro. Raises ConfigError when there is none."""
        if name not in self.macros:
            raise ConfigError(f"{where}: macro %{name} is not defined{nearest(name, self.macros)}")
        return self.macros[name]

    def reach(self, value: Any, scope: Scope, where: str, chain: tuple[Any, ...] = ()) -> Iterator[Statement]:
        """Every statement that decides `value`. Raises ConfigError on a cycle or an undefined macro."""
        if isinstance(value, Macro) and value != REQUIRED:
            definition = self.macro(value.name, where)
            if definition in chain:
                names = [str(link) for link in (*chain[chain.index(definition) :], definition)]
                raise ConfigError(f"{definition.where}: circular: {' -> '.join(names)}")
            yield definition
            yield from self.reach(definition.value, scope, definition.where, (*chain, definition))
        elif isinstance(value, Reference):
            cls = self.names.resolve(value.selector, where)
            yield from self.reach_class(cls, value.scope or scope, where, chain)
        elif isinstance(value, Mapping):
            yield from self.reach([*value.keys(), *value.values()], scope, where, chain)
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from self.reach(item, scope, where, chain)
        elif is_configurable(type(value)):
            yield from self.reach_class(type(value), scope, where, chain, value)

    def reach_class(
        self, cls: type, scope: Scope, where: str, chain: tuple[Any, ...] = (), base: Any = None
    ) -> Iterator[Statement]:
        """Every statement that decides an instance of `cls`."""
        link = "/".join((*scope, cls.__name__))
        if link in chain:
            raise ConfigError(f"{where}: circular: {' -> '.join(map(str, (*chain[chain.index(link) :], link)))}")
        for name in fields(cls):
            applying = self.applying(cls, name, scope)
            if applying:
                yield applying[0]
                yield from self.reach(applying[0].value, scope, applying[0].where, (*chain, link))
            elif (default := default_of(cls, name, base)) is not dataclasses.MISSING:
                yield from self.reach(default, scope, where, (*chain, link))
            elif is_configurable(hints(cls)[name]):
                yield from self.reach_class(hints(cls)[name], scope, where, (*chain, link))


def default_of(cls: type, name: str, base: Any = None) -> Any:
    """A field's value when nothing is bound: that of the default instance it belongs to, else the class's default."""
    field = fields(cls)[name]
    if base is not None:
        return getattr(base, name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def refuse_unused(config: Config, used: set[Statement], elsewhere: Collection[str] = ()) -> None:
    """Raises ConfigError for a macro or binding that changes nothing. used: those that do. elsewhere: where statements
    were written (`Statement.where`) that have their effect in another tree.

    Excused is what something later set aside: `Adafactor.x` in a base file whose `@Adafactor()` a later file replaces,
    or a binding for all scopes that later lines refine in each. Not excused is what was written after that, since its
    author expects an effect.
    """
    set_aside: set[Statement] = set()
    for new, earlier in config.history.items():
        with contextlib.suppress(ConfigError):  # what was set aside need not be complete: it may use macros never set
            for statement in config.reach(earlier[-1].value, earlier[-1].scope, earlier[-1].where):
                if statement.order < new.order:
                    set_aside.add(statement)
    for name, statement in config.macros.items():
        if statement not in used | set_aside and statement.where not in elsewhere:
            raise ConfigError(f"{statement.where}: {_why_macro_unused(config, name, used)}")
    for (scope, cls, name), statement in config.bindings.items():
        if statement in used | set_aside or statement.where in elsewhere:
            continue
        refined = [other for other in used if _refines(other, scope, config.bindings, cls, name)]
        if not refined:
            raise ConfigError(f"{statement.where}: {statement} has no effect: {_why_unused(config, scope, cls, used)}")
        if not any(other.order > statement.order for other in refined):
            closer = ", ".join(sorted(f"{other} at {other.where}" for other in refined))
            raise ConfigError(f"{statement.where}: {statement} has no effect: a closer scope binds it ({closer})")


def _refines(other: Statement, scope: Scope, bindings: dict[Key, Statement], cls: type, name: str) -> bool:
    """Whether `other` binds the same field in a scope inside `scope`."""
    return other.scope[: len(scope)] == scope and bindings.get((other.scope, cls, name)) is other


def _why_macro_unused(config: Config, name: str, used: set[Statement]) -> str:
    for statement in config.source.statements:
        if Macro(name) in _items(statement.value):
            return f"macro {name} has no effect: {statement} at {statement.where}, which uses it, was overridden"
    return f"macro {name} is never used{nearest(name, {str(other) for other in used if not other.selector})}"


def _why_unused(config: Config, scope: Scope, cls: type, used: set[Statement]) -> str:
    references = {item for statement in used for item in _items(statement.value) if isinstance(item, Reference)}
    scopes = sorted({"/".join(reference.scope) for reference in references} - {""})
    if scope and scopes:
        return f"no {cls.__name__} is built in scope {'/'.join(scope)!r}; scopes in use: {', '.join(scopes)}"
    takers = [
        f"; to build it: {taker.__name__}.{name} = {Reference(scope, cls.__name__, True)}"
        for taker in config.names.classes()
        for name in fields(taker)
        if taker is not cls and _fits(cls, hints(taker)[name])
    ]
    return f"no {cls.__name__} is built{takers[0] if takers else ''}"


def _items(value: Any) -> list[Any]:
    """Everything in a written value that is not a container."""
    found: list[Any] = []
    map_content(value, found.append)
    return found


def _fits(cls: type, annotation: Any) -> bool:
    members = getattr(annotation, "__args__", ()) or (annotation,)
    return any(isinstance(member, type) and member is not object and issubclass(cls, member) for member in members)


@dataclasses.dataclass(frozen=True, eq=False)
class Filled:
    """A field of a node: `content` is the value with a `Node` for every dataclass in it, `statements` the bindings
    that applied, the one in force first; without any, `origin` says where the content is from."""

    content: Any
    statements: tuple[Statement, ...] = ()
    origin: str = "default"


@dataclasses.dataclass(eq=False)
class Node:
    """One dataclass of the tree: who asked for it, what filled its fields, and the instance (None: incomplete)."""

    cls: type
    scope: Scope
    where: str
    filled: dict[str, Filled] = dataclasses.field(default_factory=dict)
    instance: Any = None


def map_content(content: Any, leaf: Callable[[Any], Any]) -> Any:
    """`content` with `leaf` applied to everything that is not a container."""
    if isinstance(content, Mapping):
        return {map_content(key, leaf): map_content(item, leaf) for key, item in content.items()}
    if isinstance(content, (tuple, list)):
        return type(content)(map_content(item, leaf) for item in content)
    return leaf(content)


class Builder:
    """Evaluates statements into nodes. `missing` collects every value nobody set, so that all are reported at once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.missing: list[tuple[str, str, Any]] = []

    def node(self, cls: type, scope: Scope, where: str, base: Any = None) -> Node:
        """Builds `cls` in `scope`. base: the default instance that stands where nothing is bound."""
        node, values, missing_before = Node(cls, scope, where), {}, len(self.missing)
        for name in fields(cls):
            applying = self.config.applying(cls, name, scope)
            if applying:
                wanted = f"{cls.__name__}.{name}"
                content = self._evaluate(applying[0].value, scope, applying[0], wanted, hints(cls)[name])
            elif (default := default_of(cls, name, base)) is not dataclasses.MISSING:
                content = self._from_default(default, scope, where)
            elif is_configurable(hints(cls)[name]):
                content = self.node(hints(cls)[name], scope, where)
            else:
                content = None
                self.missing.append(("/".join((*scope, f"{cls.__name__}.{name}")), "", hints(cls)[name]))
            origin = "default"
            if (cls, name) == IMPORTS_FIELD and isinstance(content, (tuple, list)) and self.config.source.imports:
                content = tuple(dict.fromkeys((*content, *self.config.source.imports)))
                origin = "import lines"
            node.filled[name] = Filled(content, tuple(applying), origin)
            if len(self.missing) == missing_before:
                values[name] = self._checked(node, name)
        if len(self.missing) == missing_before:
            node.instance = self._construct(node, values)
        return node

    def _evaluate(self, value: Any, scope: Scope, source: Statement, wanted: str, annotation: Any) -> Any:
        """The content of a written value. `wanted` and `annotation` say for whom, should it turn out to be unset."""

        def leaf(item: Any) -> Any:
            if item == REQUIRED:
                key = str(source)
                if self.config.placeholders and str in (annotation, *getattr(annotation, "__args__", ())):
                    return f"<{key}>"
                self.missing.append((key, f"{wanted} at {source.where}, ", annotation))
                return None
            if isinstance(item, Macro):
                definition = self.config.macro(item.name, source.where)
                return self._evaluate(definition.value, scope, definition, wanted, annotation)
            if isinstance(item, Reference):
                if not item.evaluate:
                    raise ConfigError(f"{source.where}: {source} = {item}: to build it, write {item}()")
                cls = self.config.names.resolve(item.selector, source.where)
                return self.node(cls, item.scope or scope, source.where)
            return item

        return map_content(value, leaf)

    def macro(self, name: str, annotation: Any) -> Any:
        """The content of a macro that stands for one value of type `annotation`."""
        definition = self.config.macro(name, name)
        content = self._evaluate(definition.value, (), definition, name, annotation)
        value = content.instance if isinstance(content, Node) else content
        if value is not None and not isinstance(value, annotation):
            raise ConfigError(
                f"{definition.where}: {name} = {gin_text(definition.value)}: must be {expected(annotation)}"
            )
        return content

    def _from_default(self, default: Any, scope: Scope, where: str) -> Any:
        def leaf(item: Any) -> Any:
            return self.node(type(item), scope, where, item) if is_configurable(type(item)) else item

        return map_content(default, leaf)

    def _checked(self, node: Node, name: str) -> Any:
        filled = node.filled[name]
        value = map_content(filled.content, lambda item: item.instance if isinstance(item, Node) else item)
        try:
            return check(value, hints(node.cls)[name])
        except Mismatch as mismatch:
            if not filled.statements:
                raise TypeError(f"default of {node.cls.__qualname__}.{name}: {mismatch}") from None
            statement = filled.statements[0]
            written, last = f"{statement} = {gin_text(statement.value)}", self._last(statement)
            plain = "" if last is statement else f" = {gin_text(last.value)}"
            raise ConfigError(f"{last.where}: {written}{plain}: {mismatch}") from None

    def _last(self, statement: Statement) -> Statement:
        """Where a value is written: the binding itself, or the macro at the end of its chain."""
        while isinstance(statement.value, Macro):
            statement = self.config.macro(statement.value.name, statement.where)
        return statement

    def _construct(self, node: Node, values: dict[str, Any]) -> Any:
        try:
            return node.cls(**values)
        except ValueError as error:
            cls, text = node.cls.__name__, str(error)
            named = [
                self._last(filled.statements[0]).where
                for name, filled in node.filled.items()
                if filled.statements and re.search(rf"\b{name}\b", text)
            ]
            what = text if text.startswith(f"{cls}.") else f"{cls}: {text}"
            raise ConfigError(f"{(named or [node.where])[0]}: {what}") from error


def _example(key: str, annotation: Any) -> str:
    examples = {"str": "/tmp/run", "int": "100", "float": "0.1", "bool": "True", "dict": "\"{'targets': 512}\""}
    value = examples.get(expected(annotation).split()[0])
    return f" --gin.{key}={value}" if value else ""


def build(config: Config, cls: type = Experiment, elsewhere: Collection[str] = ()) -> Node:
    """The root node, a `cls`, complete and checked. Raises ConfigError on the first thing that is wrong.

    elsewhere: as in `refuse_unused`.
    """
    refuse_unused(config, set(config.reach_class(cls, (), cls.__name__)), elsewhere)
    builder = Builder(config)
    root = builder.node(cls, (), cls.__name__)
    _refuse_missing(builder)
    return root


def effective(config: Config, cls: type) -> set[str]:
    """Where the statements were written that decide the tree of root `cls`."""
    return {statement.where for statement in config.reach_class(cls, (), cls.__name__)}


def build_macro(config: Config, name: str, annotation: type) -> Any:
    """The value of a macro alone, such as MODEL of a file of gin/models, complete and checked like a whole tree."""
    refuse_unused(config, set(config.reach(Macro(name), (), name)))
    builder = Builder(config)
    content = builder.macro(name, annotation)
    _refuse_missing(builder)
    return content.instance if isinstance(content, Node) else content


def _refuse_missing(builder: Builder) -> None:
    if builder.missing:
        by_key = {key: (wanted, annotation) for key, wanted, annotation in reversed(builder.missing)}
        keys = list(reversed(by_key))
        listed = "; ".join(f"{key} ({by_key[key][0]}{expected(by_key[key][1])})" for key in keys)
        example = "".join(_example(key, by_key[key][1]) for key in keys)
        raise ConfigError(f"not set: {listed}" + (f"\n  for example:{example}" if example else ""))
