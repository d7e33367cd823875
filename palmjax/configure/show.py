"""A built configuration as text: the flat dump, the operative gin file, and the tree with the origin of each value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from palmjax.configure.build import Config, Filled, Node, map_content
from palmjax.configure.names import is_configurable
from palmjax.configure.text import REQUIRED, Macro, Reference, Scope, gin_text


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf below a dataclass; a dataclass in a field gives its class name too."""
    if is_configurable(type(value)):
        if path:
            yield path, type(value).__name__
        for field in dataclasses.fields(value):
            yield from flatten(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple) and any(is_configurable(type(item)) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{path}[{index}]")
    else:
        yield path, dict(value) if isinstance(value, Mapping) else value


def describe(experiment: Any) -> str:
    """One `path = value` a line, whatever the experiment was built from; equal experiments give equal text."""
    return "".join(f"{path} = {value!r}\n" for path, value in flatten(experiment))


class Operative:
    """Writes a built tree as one gin file that gives an equal experiment when loaded alone, by any later version.

    Every field of every dataclass is written, defaults too. Macros that stand for plain values stay macros, so that
    `--gin.TRAIN_STEPS=` works on the written file as it did on the original.
    """

    def __init__(self, root: Node, config: Config) -> None:
        self._config = config
        self._macros: dict[str, str] = {}
        self._groups: dict[str, dict[str, str]] = {}
        self._add(root, "")

    def _add(self, node: Node, path: str) -> Scope:
        """Writes a node's bindings; the scope they are under, which a reference to the node must name."""
        lines = {name: self._field(filled, f"{path}_{name}".lstrip("_")) for name, filled in node.filled.items()}
        name, scope = self._config.names.name(node.cls), node.scope
        # Two defaults of one class may differ by place; then the bindings of the second need a scope of their own.
        if self._groups.setdefault("/".join((*scope, name)), lines) != lines:
            scope = (path,)
            self._groups["/".join((*scope, name))] = lines
        return scope

    def _field(self, filled: Filled, path: str) -> str:
        if filled.statements and (kept := self._as_written(filled.statements[0].value)):
            return kept

        def leaf(item: Any) -> Any:
            return (
                Reference(self._add(item, path), self._config.names.name(item.cls), True)
                if isinstance(item, Node)
                else item
            )

        return gin_text(map_content(filled.content, leaf))

    def _as_written(self, value: Any) -> str | None:
        """A macro as `%NAME`, noting its definition; None when it stands for something built."""
        if not isinstance(value, Macro):
            return None
        definition = self._config.macro(value.name, "").value
        plain: list[bool] = []
        map_content(definition, lambda item: plain.append(not isinstance(item, (Reference, Macro))))
        kept = self._as_written(definition) or (gin_text(definition) if all(plain) else None)
        if kept:
            self._macros[value.name] = kept
        return str(value) if kept else None

    def __str__(self) -> str:
        lines = [f"import {module}" for module in sorted(self._config.source.imports)]
        lines += ["", *(f"{name} = {text}" for name, text in sorted(self._macros.items()))]
        for group, fields in sorted(self._groups.items()):
            lines += ["", *(f"{group}.{name} = {text}" for name, text in sorted(fields.items()))]
        return "\n".join(lines).lstrip("\n") + "\n"


class Tree:
    """The include chain, then every field: value, where it was set, and what it overrode."""

    def __init__(self, root: Node, config: Config) -> None:
        self._config = config
        self._rows: list[tuple[str, str, str]] = []
        self._add(root.cls.__name__, root, "", 0)

    def _add(self, name: str, content: Any, origin: str, depth: int) -> None:
        indent = "  " * depth
        if isinstance(content, Node):
            scope = "".join(f"{part}/" for part in content.scope)
            self._rows.append((indent + name, f"@{scope}{content.cls.__name__}()" if depth else "", origin))
            for field, filled in content.filled.items():
                self._add(field, filled.content, self._origin(filled), depth + 1)
        elif isinstance(content, (tuple, list)) and any(isinstance(item, Node) for item in content):
            self._rows.append((indent + name, "", origin))
            for index, item in enumerate(content):
                self._add(f"[{index}]", item, "", depth + 1)
        else:
            self._rows.append((indent + name, gin_text(content), origin))

    def _origin(self, filled: Filled) -> str:
        if not filled.statements:
            return "" if isinstance(filled.content, Node) else filled.origin
        first, *shadowed = filled.statements
        steps, overridden = [first], [*self._config.history.get(first, []), *shadowed]
        while isinstance(steps[-1].value, Macro):
            steps.append(self._config.macro(steps[-1].value.name, steps[-1].where))
            overridden += self._config.history.get(steps[-1], [])
        text = " <- ".join(f"{step} {step.where}" if not step.selector else step.where for step in steps)
        was = ", ".join(
            f"{gin_text(old.value)} at {old.where}" for old in reversed(overridden) if old.value != REQUIRED
        )
        return text + (f"  (overrides {was})" if was else "")

    def __str__(self) -> str:
        files = [f"{'  ' * depth}{file}" for depth, file in self._config.source.files]
        names = max(len(name) for name, _, _ in self._rows)
        values = min(40, max(len(value) for _, value, _ in self._rows))
        rows = [f"{name:{names}}  {value:{values}}  {origin}".rstrip() for name, value, origin in self._rows]
        return "\n".join([*files, "", *rows]) + "\n"
