"""Templates of prompts: text with `{name}` in it, and the variants of one that mean the same.

Imports config and the standard library.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
import string
from collections.abc import Callable

from palmjax.config import ConfigError

CONVERSIONS: dict[str | None, Callable[[str], str]] = {
    None: str,
    "c": str.capitalize,
    "w": lambda text: text.replace("_", " "),
}


class Template:
    """`"Question: {question}\\nAnswer:"`: names, which may be dotted paths, in braces; `{{` is a brace.

    `{name!c}` capitalizes a text as `str.capitalize` does, `{name!w}` writes spaces for its underscores.
    Raises ConfigError for anything else.
    """

    def __init__(self, text: str):
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"template {text!r}: {error}") from error
        self.pieces: list[tuple[str, str | None, str | None]] = []
        for literal, name, form, conversion in parsed:
            if name is not None and (form or not name or conversion not in CONVERSIONS):
                raise ConfigError(f"template {text!r}: a field is written {{name}}, {{name!c}} or {{name!w}}")
            self.pieces.append((literal, name, conversion))

    @property
    def names(self) -> set[str]:
        return {name for _, name, _ in self.pieces if name is not None}

    def fill(self, value: Callable[[str], str]) -> str:
        return "".join(
            literal + (CONVERSIONS[conversion](value(name)) if name is not None else "")
            for literal, name, conversion in self.pieces
        )


@functools.cache
def template(text: str) -> Template:
    """The template of `text`, parsed once."""
    return Template(text)


@dataclasses.dataclass(frozen=True)
class Style:
    """A way to write the same prompt: what stands behind a descriptor ("Question"), how it is cased, what parts fields.

    The grammar of Sclar et al. 2023 (FormatSpread, section 3.1), over a template's own words; values of fields are
    never touched. `Style()` is the template as written. item: how an enumerated option is marked, `{}` its letter.
    """

    separator: str = ":"
    casing: Callable[[str], str] = str
    between: str = "\n"
    item: str = "{}."

    def restyle(self, text: str) -> str:
        """A template's text in this style."""
        return "".join(_escaped(self._literal(literal)) + _field(*field) for literal, *field in template(text).pieces)

    def describe(self) -> dict[str, str]:
        """The style in words that JSON holds."""
        return {
            "separator": self.separator,
            "casing": self.casing("Some words"),
            "between": self.between,
            "item": self.item,
        }

    def _literal(self, text: str) -> str:
        text = re.sub(r"\b([A-Za-z][\w ]*):", lambda found: self.casing(found[1]) + self.separator, text)
        return text.replace("\n", self.between)

    def restyle_option(self, text: str) -> str:
        """A template of one option: `"{letter}. {choice}"` with its letter marked as `item` says."""
        mark = _escaped(self.item).replace("{{}}", "{letter}")
        return text.replace("{letter}.", mark)


def _escaped(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")


def _field(name: str | None, conversion: str | None) -> str:
    return "" if name is None else "{" + name + ("!" + conversion if conversion else "") + "}"


SEPARATORS = (":", " :", "::", " -", " ::", "\t", ":\n", " =>")
CASINGS: tuple[Callable[[str], str], ...] = (str, str.upper, str.lower, str.title)
BETWEEN = ("\n", "\n\n", " ; ", " \n", " || ", "\t")
ITEMS = ("{}.", "({})", "{})", "[{}]", "<{}>", "{} -")


@functools.cache
def styles() -> tuple[Style, ...]:
    """All styles: as written first, then the others in an order fixed by hash, so that N of them contain N - 1."""
    grid = list(itertools.product(SEPARATORS, CASINGS, BETWEEN, ITEMS))
    others = sorted(range(1, len(grid)), key=lambda number: hashlib.sha256(str(number).encode()).digest())
    return tuple(Style(*grid[number]) for number in (0, *others))
