"""What a state consists of: its arrays by name, and the same as nested dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from palmjax.config import ConfigError


def _name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"a state can't be saved under the tree key {key!r}")


def leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """(name parts, leaf) in tree order. NamedTuples and dataclasses give field names, tuples give positions."""
    return [(tuple(map(_name, path)), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def describe(tree: Any) -> dict[str, str]:
    """Every array's name and what it is, `{"params/decoder/decoder_norm/scale": "float32[512]"}`."""
    return {"/".join(name): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in leaves(tree)}


def nested(tree: Any) -> dict[str, Any]:
    """The leaves as nested dicts by name, so that no class of optax is part of the format."""
    out: dict[str, Any] = {}
    for name, leaf in leaves(tree):
        inner = out
        for part in name[:-1]:
            inner = inner.setdefault(part, {})
        inner[name[-1]] = leaf
    return out


def like(tree: Any, values: Mapping[str, Any]) -> Any:
    """Nested dicts `values` in the structure of `tree`: the inverse of `nested`."""

    def find(name: tuple[str, ...]) -> Any:
        inner: Any = values
        for part in name:
            inner = inner[part]
        return inner

    return jax.tree.unflatten(jax.tree.structure(tree), [find(name) for name, _ in leaves(tree)])


def check_arrays(path: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises ConfigError naming the first array that differs between the checkpoint and what this run needs."""
    names = [*wanted, *(name for name in saved if name not in wanted)]
    differing = [n for n in names if saved.get(n) != wanted.get(n)]
    if not differing:
        return
    # A parameter tells more than the moments that follow from it.
    name = min(differing, key=lambda n: (not n.startswith("params/"), names.index(n)))
    kind = "model" if name.startswith("params/") else "optimizer" if name.startswith("opt_state/") else "state"
    there, here = saved.get(name, "no such array"), wanted.get(name, "no such array")
    count = f" ({len(differing)} arrays differ)" if len(differing) > 1 else ""
    raise ConfigError(
        f"{path} is of another {kind}: {name} is {there} in the checkpoint and {here} in this configuration{count}; "
        "use the gin file that it was trained with, or another MODEL_DIR"
    )
