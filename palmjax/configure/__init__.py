"""gin files and flags to one typed, checked `Experiment`; and back to text. Imported by the verbs' mains only.

    flags, rest = parse_flags(argv)
    loaded = load(flags.files, flags.bindings, flags.search_paths)
    loaded.experiment          # palmjax.config.Experiment
    loaded.operative           # gin text that gives an equal experiment when loaded alone

names.py: which classes a name may mean. text.py: gin to statements. build.py: statements to the tree, nothing left
over. check.py: types. show.py: the tree as text. flags.py: the command line.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from palmjax.config import ConfigError, Experiment, ModelPart
from palmjax.configure.build import Config, Node, build, build_macro, effective
from palmjax.configure.flags import USAGE, Flags, parse_flags
from palmjax.configure.names import Names
from palmjax.configure.show import Operative, Tree, describe, flatten
from palmjax.configure.text import Reader, as_gin

__all__ = [
    "USAGE",
    "Flags",
    "Loaded",
    "as_gin",
    "describe",
    "load",
    "load_model",
    "load_section",
    "load_with",
    "main",
    "parse_flags",
]


Section = TypeVar("Section")


@dataclass(frozen=True)
class Loaded(Generic[Section]):
    """A checked configuration. `value` decides what happens; the rest tells how it came about."""

    value: Section
    root: Node
    config: Config

    @property
    def experiment(self: Loaded[Experiment]) -> Experiment:
        return self.value

    @functools.cached_property
    def operative(self) -> str:
        """Flat, sorted gin text without includes that gives an equal value when loaded alone."""
        return str(Operative(self.root, self.config))

    def tree(self) -> str:
        """The include chain and every value with the place that set it and what it overrode."""
        return str(Tree(self.root, self.config))

    def flat(self) -> dict[str, Any]:
        """Every leaf by its path in the tree, such as "train.steps"."""
        return dict(flatten(self.value))


def load(
    files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = (), placeholders: bool = False
) -> Loaded[Experiment]:
    """Reads gin files, then bindings (`"NAME=value"`), later ones over earlier ones, and builds the experiment.

    Files are looked for in the working directory, `search_paths` and the shipped configs. Raises ConfigError with the
    file and line for anything that is misspelt, of the wrong type, without effect, ambiguous, circular or not set.

    placeholders: text that must be set and is not (a path, a folder) becomes `<NAME>`, for those who need the step only
    and open no file.
    """
    if not files:
        raise ConfigError("no gin file: name one, such as gin/exp/palm_stdlib.gin")
    config = _read(files, bindings, search_paths, placeholders)
    root = build(config)
    return Loaded(root.instance, root, config)


def load_section(
    cls: type[Section], files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> Loaded[Section]:
    """A tree of another root than Experiment: the section `cls` and what is below it. Otherwise as `load`."""
    config = _read(files, bindings, search_paths)
    root = build(config, cls)
    return Loaded(root.instance, root, config)


def load_with(
    cls: type[Section],
    section_files: Sequence[str],
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> tuple[Loaded[Section], Loaded[Experiment]]:
    """Two trees of files of their own, a section's and the experiment's, under one command line.

    Each binding counts in the tree where it has an effect, or in both (a macro that both have), and is refused if it
    has one in neither.
    """
    section = _read(section_files, bindings, search_paths)
    experiment = _read(files, bindings, search_paths)
    in_section, in_experiment = effective(section, cls), effective(experiment, Experiment)
    found = build(section, cls, in_experiment), build(experiment, Experiment, in_section)
    return Loaded(found[0].instance, found[0], section), Loaded(found[1].instance, found[1], experiment)


def _read(
    files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str], placeholders: bool = False
) -> Config:
    reader = Reader(search_paths)
    for name in files:
        reader.file(name)
    for binding in bindings:
        reader.binding(binding)
    return Config(reader.source, Names(reader.source.imports), placeholders)


def load_model(files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()) -> ModelPart:
    """The model alone: the macro MODEL of gin files such as `models/gpt2_small.gin`. Files and errors as in `load`."""
    return build_macro(_read(files, bindings, search_paths), "MODEL", ModelPart)


def main(argv: Sequence[str] | None = None) -> int:
    """`palmjax config FILE.gin [...]`: prints the resolved tree, the operative gin text, or the flat dump."""
    flags, rest = parse_flags(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="palmjax config",
        usage="palmjax config FILE.gin [FILE.gin ...] [--gin.KEY=VALUE ...] [--format {tree,gin,flat}]",
        description="Print a configuration as it will run: every value and where it was set.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--format", choices=("tree", "gin", "flat"), default="tree", help="tree: with origins (default)"
    )
    options = parser.parse_args(rest)
    loaded = load(flags.files, flags.bindings, flags.search_paths)
    if options.format == "tree":
        print(loaded.tree(), end="")
    elif options.format == "gin":
        print(loaded.operative, end="")
    else:
        print(describe(loaded.experiment), end="")
    return 0
