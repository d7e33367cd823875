"""T5X's flags: `--gin_file=X` (repeatable), `--gin.NAME=VALUE`, `--gin_bindings=...`, `--gin_search_paths=a,b`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palmjax.config import ConfigError

USAGE = """\
configuration flags
  FILE.gin, --gin_file=FILE   a gin file; repeatable, later ones override earlier ones
  --gin.KEY=VALUE             a binding, over all files: --gin.TRAIN_STEPS=100 --gin.AdamW.decay=0.1
                              a plain word or path needs no quotes: --gin.MODEL_DIR=/tmp/run;
                              text with spaces does, in gin and in the shell: --gin.PROMPT="'a b'"
  --gin_bindings=TEXT         the same, as gin text
  --gin_search_paths=A,B      folders searched for gin files, after the working directory
"""


@dataclass(frozen=True)
class Flags:
    """What the command line said about configuration, in order."""

    files: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    search_paths: tuple[str, ...] = ()


def parse_flags(argv: Sequence[str]) -> tuple[Flags, list[str]]:
    """Splits a command line into configuration flags and the rest, which keeps its order.

    `--gin_file X` is accepted as well as `--gin_file=X`. A positional argument that ends in `.gin` is a gin file,
    except right after a flag of another kind, whose value it is. After `--` everything is rest.
    """
    files: list[str] = []
    bindings: list[str] = []
    folders: list[str] = []
    rest: list[str] = []
    lists = {"--gin_file": files, "--gin_bindings": bindings, "--gin_search_paths": folders}
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        flag, equals, value = argument.partition("=")
        if argument == "--":
            rest += argv[position - 1 :]
            break
        if flag in lists:
            if not equals:
                if position == len(argv):
                    raise ConfigError(f"{flag} needs a value: {flag}=...")
                value = argv[position]
                position += 1
            lists[flag].append(value)
        elif flag.startswith("--gin."):
            if not equals:
                raise ConfigError(f"{flag} needs a value: {flag}=...")
            bindings.append(argument.removeprefix("--gin."))
        elif flag.startswith("--gin"):
            raise ConfigError(f"unknown flag {flag}; configuration flags are {', '.join(lists)} and --gin.KEY=VALUE")
        elif argument.endswith(".gin") and not (rest and argv[position - 2] == rest[-1] and _takes_value(rest[-1])):
            files.append(argument)
        else:
            rest.append(argument)
    search_paths = tuple(path for joined in folders for path in joined.split(",") if path)
    return Flags(tuple(files), tuple(bindings), search_paths), rest


def _takes_value(argument: str) -> bool:
    return argument.startswith("-") and "=" not in argument
