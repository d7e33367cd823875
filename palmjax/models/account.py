"""Parameters, FLOPs and cache bytes of a model from its configuration alone; nothing is computed on a device."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from palmjax import sharding
from palmjax.config import ShardingRules
from palmjax.models.api import HEAD
from palmjax.models.decoder import Decoder
from palmjax.models.moe import Experts
from palmjax.sharding import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """What a model costs. FLOPs count a multiply-add as two.

    parameters: of the published architecture; vocabulary_padding: values added for a mesh, counted apart.
    active_parameters: those that one token meets; fewer than all only with experts.
    flops_per_token: model FLOPs of one training token, 6 N + 12 L H Q T with N the active parameters (PaLM appendix B,
    no halving for causality; a layer with a window counts the window's keys).
    hardware_flops_per_token: with what rematerialisation computes again. kv_bytes_per_token: of the cache, in the
    compute dtype.
    """

    parameters: int
    active_parameters: int
    vocabulary_padding: int
    flops_per_token: float
    hardware_flops_per_token: float
    kv_bytes_per_token: int


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: its path in the tree joined by "/", shape, logical axes, and the part of it that one token meets."""

    name: str
    shape: tuple[int, ...]
    axes: Axes
    active_share: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@functools.lru_cache(maxsize=8)
def leaves(config: Decoder) -> tuple[Leaf, ...]:
    """Every parameter of the model, from its own abstract tree."""
    model = config.build()
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_params()):
        axes = functools.reduce(lambda tree, key: tree[key.key], path, model.axes)
        name = "/".join(key.key for key in path)
        found.append(Leaf(name, leaf.shape, axes, _active_share(config, name) if "experts" in axes else 1.0))
    return tuple(found)


def _active_share(config: Decoder, name: str) -> float:
    turn = config.block.layers
    experts = turn[0].mlp if len(turn) == 1 else turn[int(name.split("/")[2].removeprefix("block_"))].mlp
    assert isinstance(experts, Experts), name
    return experts.top_k / experts.num_experts


def padding(config: Decoder, leaf: Leaf) -> int:
    """Values of a parameter that only pad the vocabulary."""
    if "vocab" not in leaf.axes:
        return 0
    return leaf.size // config.padded_vocab_size * (config.padded_vocab_size - config.vocab_size)


def parameter_table(config: Decoder, mesh: dict[str, int], rules: ShardingRules) -> str:
    """Every parameter's name, shape with logical axes, mesh axes and values a device, and the totals; one line each.

    mesh: axis sizes. Raises ConfigError if an axis does not divide a dimension.
    """
    lines, on_device, total, pad = [], 0, 0, 0
    for leaf in leaves(config):
        dims = sharding.mesh_axes(rules, leaf.axes, leaf.shape, mesh, leaf.name)
        share = leaf.size // math.prod(mesh[axis] for dim in dims for axis in dim)
        on_device, total, pad = on_device + share, total + leaf.size, pad + padding(config, leaf)
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(leaf.axes, leaf.shape, strict=True))
        lines.append(f"{leaf.name:<48} ({shape})  {sharding.text(dims)}  {share:,} a device")
    lines.append(f"Total: {total - pad:,} parameters, {pad:,} of vocabulary padding, ")
    lines[-1] += f"{on_device:,} values a device on {', '.join(f'{a}={n}' for a, n in mesh.items())}"
    return "\n".join(lines) + "\n"


def count(tree: Any) -> int:
    """Values in a tree of arrays or ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def training_flops(parameters: float, layers: int, heads: int, head_dim: int, length: int) -> float:
    """Model FLOPs a training token: 6 N + 12 L H Q T (PaLM appendix B)."""
    return 6.0 * parameters + 12.0 * layers * heads * head_dim * length


def account(config: Decoder, length: int) -> Account:
    """The account of `config` trained on rows of `length` tokens."""
    every = leaves(config)
    pad = sum(padding(config, leaf) for leaf in every)
    parameters = sum(leaf.size for leaf in every) - pad
    active = round(sum(leaf.size * leaf.active_share for leaf in every)) - pad
    turn = config.block.layers
    keys = [min(length, layer.attention.window or length) * layer.attention.num_heads for layer in turn]
    forward_attention = 4.0 * sum(keys) * (config.num_layers // len(turn)) * config.attention.head_dim
    model = 6.0 * active + 3.0 * forward_attention
    again = 0.0
    if config.remat is not None:
        body = sum(
            leaf.size * leaf.active_share
            for leaf in every
            if leaf.name.startswith("decoder/") and not leaf.name.startswith(f"decoder/{HEAD}/")
        )
        again = config.remat.matmuls_again * 2.0 * body + config.remat.attention_again * forward_attention
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[config.dtype]
    return Account(
        parameters=parameters,
        active_parameters=active,
        vocabulary_padding=pad,
        flops_per_token=model,
        hardware_flops_per_token=model + again,
        kv_bytes_per_token=2 * width * config.num_layers * config.attention.num_kv_heads * config.attention.head_dim,
    )
