"""Name maps: which tensors of another stack hold which of palmjax's parameters. Data, and the plan made from it.

A `Rule` names a foreign tensor, once or for every layer, and the parameters in it. A rule whose parameters a model does
not have does not apply to it (biases, an untied head), so one list serves all variants of a family.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from palmjax.config import ConfigError
from palmjax.interop import layout

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter, "decoder/layers/mlp/wo/kernel", in a tensor: `pattern` and `take` as `layout` reads them."""

    parameter: str
    pattern: str
    take: Mapping[str, layout.Take] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A foreign tensor and its pieces. `{layer}` in the name: one tensor for each layer of a stack."""

    tensor: str
    pieces: tuple[Piece, ...]


def rule(tensor: str, parameter: str, pattern: str) -> Rule:
    """A tensor that is one parameter."""
    return Rule(tensor, (Piece(parameter, pattern),))


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of one tensor with numbers: `index` of the parameter (its layer, or nothing) and the axes' sizes."""

    parameter: Path
    index: tuple[int, ...]
    pattern: str
    take: Mapping[str, layout.Take]
    sizes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One foreign tensor: name, shape, and where its parts go."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def leaves(tree: Mapping[str, Any], above: Path = ()) -> dict[Path, Any]:
    """{("decoder", "decoder_norm", "scale"): leaf} of a nested dict."""
    found: dict[Path, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, (*above, name)) if isinstance(value, Mapping) else {(*above, name): value}
    return found


def plan(
    rules: Iterable[Rule], shapes: Mapping[Path, tuple[int, ...]], sizes: Mapping[str, int], family: str
) -> dict[str, Tensor]:
    """The foreign tensors of a model whose parameters have `shapes`, by name, layer by layer.

    sizes: of axes that a parameter's shape does not give. Raises ConfigError for a parameter that the family has no
    tensor for.
    """
    planned: list[tuple[tuple[int, ...], int, Tensor]] = []
    covered = dict.fromkeys(shapes, 0)
    for order, one in enumerate(rules):
        paths = [tuple(piece.parameter.split("/")) for piece in one.pieces]
        if not any(path in shapes for path in paths):
            continue
        stacked = "{layer}" in one.tensor
        layers = shapes[next(path for path in paths if path in shapes)][0] if stacked else 1
        for layer in range(layers):
            index = (layer,) if stacked else ()
            parts = [
                _part(piece, path, index, shapes, sizes, family) for piece, path in zip(one.pieces, paths, strict=True)
            ]
            shape = layout.foreign_shape(parts[0].pattern, parts[0].sizes)
            for part in parts:
                covered[part.parameter] += math.prod(shapes[part.parameter][len(index) :])
            planned.append((index, order, Tensor(one.tensor.replace("{layer}", str(layer)), shape, tuple(parts))))
    for path, shape in shapes.items():
        if covered[path] != math.prod(shape):
            raise ConfigError(f"{family} has no tensor for the parameter {'/'.join(path)} {list(shape)}")
    planned.sort(key=lambda one: (one[0] or (-1,), one[1]))
    return {tensor.name: tensor for _, _, tensor in planned}


def _part(
    piece: Piece,
    path: Path,
    index: tuple[int, ...],
    shapes: Mapping[Path, tuple[int, ...]],
    sizes: Mapping[str, int],
    family: str,
) -> Part:
    if path not in shapes:
        raise ConfigError(f"{family} needs the parameter {piece.parameter}, which this model does not have")
    solved = layout.sizes_of(piece.pattern, shapes[path][len(index) :], sizes, piece.take)
    return Part(path, index, piece.pattern, piece.take, solved)


def check_tensors(
    planned: Mapping[str, Tensor],
    found: Mapping[str, Any],
    accepted: Sequence[str],
    ignored: Sequence[str],
    expected_of: str,
) -> None:
    """Raises ConfigError, naming the tensor, its file and what was expected, unless `found` is what was planned.

    found: name -> what has `dtype`, `shape` and `file`. accepted: dtypes. ignored: patterns of names without meaning
    here. expected_of: what the expectation follows from, in words.
    """
    for name, tensor in planned.items():
        if name not in found:
            hint = _nearest(name, [other for other in found if other not in planned])
            raise ConfigError(f"no tensor {name!r}: {expected_of} needs it, of shape {list(tensor.shape)}{hint}")
        there = found[name]
        if tuple(there.shape) != tensor.shape:
            raise ConfigError(
                f"{there.file}: {name!r} has shape {list(there.shape)}; {expected_of} needs {list(tensor.shape)}"
            )
        if there.dtype not in accepted:
            raise ConfigError(f"{there.file}: {name!r} has dtype {there.dtype}; it must be {', '.join(accepted)}")
    for name, there in found.items():
        if name not in planned and not any(re.search(pattern, name) for pattern in ignored):
            hint = _nearest(name, planned)
            raise ConfigError(f"{there.file}: {name!r} {list(there.shape)} has no place in {expected_of}{hint}")


def _nearest(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.8)
    return f"; nearest: {close[0]!r}" if close else ""
