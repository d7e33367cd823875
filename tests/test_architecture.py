"""The house rules, read from the source: who imports whom, who alone may say what, and how long things get."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEVELS = (
    {"config", "chips", "files", "libtpu", "progress", "quiet"},
    {"mesh", "sharding", "distributed", "model_dir", "pallas_kernels"},
    {"models", "data", "loss", "loss_scale", "optim", "sampling"},
    {"state", "metrics", "provenance"},
    {"step", "checkpoint", "guard", "watchdog"},
    {"trained"},
    {"decode", "tokenizer", "zoo"},
    {"evaluation", "plan"},
    {"run"},
    {"attempt"},
    {"train", "replay", "report"},
    {"interop"},
)
"""A room imports rooms above it in this list only. At the top of the house, train composes evaluation and decode."""

SIBLINGS = {("models", "data.batch"), ("loss", "data.batch")}
"""The one exception on a level: what a batch is."""

FRONT_DOOR = {"configure", "cli"}
"""They build on what imports no jax, and are used by modules that can be run: those with a `main`."""

SOURCES = ("palmjax", "tasks", "pallas_kernels", "launch", "benchmarks", "tests")
MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 80
LONG_FUNCTIONS: set[tuple[str, str]] = set()
"""(file, function) that read better in one piece than cut up, and why."""


@dataclass(frozen=True)
class Import:
    """`module` is what is imported, with the name behind `from X import` when that may be a module itself."""

    path: Path
    line: int
    module: str
    top_level: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports(path: Path) -> Iterator[Import]:
    """Every import, those inside functions and `import_module("literal")` included."""
    inside = {id(node) for scope in ast.walk(parse(path)) if isinstance(scope, SCOPES) for node in ast.walk(scope)}
    for node in ast.walk(parse(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write absolute imports"
            assert node.module is not None
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in deeper]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            yield Import(path, getattr(node, "lineno", 0), name, id(node) not in inside)


SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def all_imports(*folders: str) -> list[Import]:
    return [found for path in python_files(*folders) for found in imports(path)]


def room(module: str) -> str:
    """The room of a dotted name: "models" of palmjax.models.decoder, "pallas_kernels" of pallas_kernels.attention."""
    parts = module.split(".")
    return parts[1] if parts[0] == "palmjax" and len(parts) > 1 else parts[0]


def level(name: str) -> int:
    found = [index for index, rooms in enumerate(LEVELS) if name in rooms]
    assert found, f"palmjax/{name} has no level: add it to LEVELS"
    return found[0]


def test_every_room_has_a_level() -> None:
    for path in python_files("palmjax"):
        if (name := room(dotted(path))) not in {"palmjax", "__main__", *FRONT_DOOR}:
            level(name)


def test_rooms_import_only_lower_rooms() -> None:
    wrong = []
    for found in all_imports("palmjax"):
        source, target = room(dotted(found.path)), room(found.module)
        if found.module.split(".")[0] not in ("palmjax", "pallas_kernels") or target in {"palmjax", source}:
            continue
        if source in FRONT_DOOR | {"palmjax", "__main__"}:
            allowed = target in {"config", "files", "libtpu", "quiet", *FRONT_DOOR}
        elif target in FRONT_DOOR:
            allowed = found.path.name == "__main__.py" or any(
                isinstance(node, ast.FunctionDef) and node.name == "main" for node in parse(found.path).body
            )
        else:
            sibling = (source, ".".join(found.module.split(".")[1:3])) in SIBLINGS
            allowed = sibling or level(target) < level(source)
        if not allowed:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_interop() -> None:
    wrong = [str(found) for found in all_imports("palmjax") if found.module.startswith("palmjax.interop")]
    assert not [line for line in wrong if not line.startswith("palmjax/interop/")]


@pytest.mark.parametrize(
    ("folder", "at_import", "in_functions"),
    [
        ("pallas_kernels", {"jax", "numpy", "pallas_kernels"}, {"tokamax"}),
        ("launch", {"launch"}, set()),
        ("tasks", {"numpy", "tasks"}, {"seqio", "tensorflow", "tensorflow_datasets", "tokenizers", "zstandard"}),
    ],
)
def test_leaves_depend_on_little(folder: str, at_import: set[str], in_functions: set[str]) -> None:
    wrong = []
    for found in all_imports(folder):
        package = found.module.split(".")[0]
        allowed = sys.stdlib_module_names | at_import | (set() if found.top_level else in_functions)
        if package not in allowed:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_only_the_builder_of_stores_imports_seqio_and_only_when_called() -> None:
    heavy = ("seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "tfds")
    wrong = [
        str(found)
        for found in all_imports("palmjax", "launch", "pallas_kernels")
        if found.module.split(".")[0] in heavy
        and (found.top_level or found.path != ROOT / "palmjax" / "data" / "build.py")
        and room(dotted(found.path)) != "interop"
    ]
    assert not wrong, "\n".join(wrong)


def test_config_knows_neither_jax_nor_gin() -> None:
    modules = {found.module.split(".")[0] for found in imports(ROOT / "palmjax" / "config.py")}
    assert modules <= sys.stdlib_module_names


def test_one_module_reads_gin() -> None:
    users = {found.path for found in all_imports("palmjax", "tasks", "launch") if found.module.split(".")[0] == "gin"}
    assert users == {ROOT / "palmjax" / "configure" / "text.py"}
    assert not list((ROOT / "gin").rglob("*.py")), "gin/ holds text only: an __init__.py would shadow gin-config"


def test_one_module_says_partition_spec() -> None:
    wrong = []
    for path in python_files("palmjax"):
        for node in ast.walk(parse(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if "PartitionSpec" in names and path != ROOT / "palmjax" / "sharding.py":
                wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_readable() -> None:
    wrong = []
    for path in python_files(*SOURCES):
        name = str(path.relative_to(ROOT))
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES:
            wrong.append(f"{name} has {lines} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (name, node.name) not in LONG_FUNCTIONS:
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(
                        f"{name}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"
                    )
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is() -> None:
    """Every module that is not an empty `__init__.py` opens with a docstring, and none is a drawer for leftovers."""
    files = python_files(*SOURCES)
    assert not [str(path) for path in files if path.stem in ("util", "utils", "helpers", "misc")]
    silent = [str(path.relative_to(ROOT)) for path in files if parse(path).body and not ast.get_docstring(parse(path))]
    assert not silent, "\n".join(silent)


# Split, so that this file does not hold what it forbids.
FORBIDDEN = re.compile(
    "|".join(["/wo" + "rk/", "py" + "pi\\.org", "/opt/py" + "pi", "FACTS" + "[ .]", "T5X" + "\\.md"])
)


def test_nothing_speaks_of_one_machine() -> None:
    """No path, host or note of the place where this was written."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        path = ROOT / name
        if not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        wrong += [
            f"{name}:{number}: {line.strip()}"
            for number, line in enumerate(text.splitlines(), 1)
            if FORBIDDEN.search(line)
        ]
    assert not wrong, "\n".join(wrong)
