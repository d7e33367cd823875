"""Parameters, FLOPs and cache bytes of a model from its configuration alone; nothing is computed on a device."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from palmjax import sharding
from palmjax.config import ShardingRules
from palmjax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """What a model costs. FLOPs count a multiply-add as two.

    parameters: of the published architecture; vocabulary_padding: rows added for a mesh, counted apart.
    flops_per_token: model FLOPs of one training token, 6 N + 12 L H Q T (PaLM appendix B, no halving for causality).
    hardware_flops_per_token: with what rematerialisation computes again. kv_bytes_per_token: of the cache, in the
    compute dtype.
    """

    parameters: int
    vocabulary_padding: int
    flops_per_token: float
    hardware_flops_per_token: float
    kv_bytes_per_token: int


def parameter_table(config: Decoder, mesh: dict[str, int], rules: ShardingRules) -> str:
    """Every parameter's name, shape with logical axes, mesh axes and values a device, and the totals; one line each.

    mesh: axis sizes. Raises ConfigError if an axis does not divide a dimension.
    """
    model = config.build()
    lines, on_device = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_params()):
        name = "/".join(key.key for key in path)
        axes = functools.reduce(lambda tree, key: tree[key.key], path, model.axes)
        dims = sharding.mesh_axes(rules, axes, leaf.shape, mesh, name)
        share = leaf.size // math.prod(mesh[axis] for dim in dims for axis in dim)
        on_device += share
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(axes, leaf.shape, strict=True))
        lines.append(f"{name:<48} ({shape})  {sharding.text(dims)}  {share:,} a device")
    padding = (config.padded_vocab_size - config.vocab_size) * config.d_model
    lines.append(f"Total: {count(model.abstract_params()) - padding:,} parameters, {padding:,} of vocabulary padding, ")
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
    params = config.build().abstract_params()
    padding = (config.padded_vocab_size - config.vocab_size) * config.d_model
    parameters = count(params) - padding
    attention = config.block.attention
    model = training_flops(parameters, config.num_layers, attention.num_heads, attention.head_dim, length)
    forward_attention = 4.0 * config.num_layers * attention.num_heads * attention.head_dim * length
    again = 0.0
    if config.remat is not None:
        again = (
            config.remat.matmuls_again * 2.0 * count(params["decoder"])
            + config.remat.attention_again * forward_attention
        )
    width = {"float32": 4, "bfloat16": 2}[config.dtype]
    return Account(
        parameters=parameters,
        vocabulary_padding=padding,
        flops_per_token=model,
        hardware_flops_per_token=model + again,
        kv_bytes_per_token=2 * width * config.num_layers * attention.num_kv_heads * attention.head_dim,
    )
