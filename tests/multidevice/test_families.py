"""Families on 8 virtual devices give the numbers of one device; experts exchange tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from palmjax import decode, mesh, sharding
from palmjax.config import ConfigError, MeshConfig, ShardingRules
from palmjax.loss import CrossEntropy
from palmjax.models.layers import MLP
from palmjax.models.moe import Experts
from palmjax.step import accumulate
from tests.models.builders import random_batch
from tests.models.families import BERT, FAMILIES, RMS, decoder, glam, parameters

pytestmark = pytest.mark.multidevice

MOE = decoder(glam(Experts(num_experts=8, expert=MLP(d_ff=32), capacity_factor=0.75)), final_norm=RMS)
MODELS = {**FAMILIES, "bert": BERT, "experts": MOE}
SPREAD = ("opt_350m", "bloom", "gopher", "gpt_j", "t5", "bert")
"""Between them, one of each kind of parameter but experts."""


def place(params, config, placed, rules):
    with sharding.activate(placed, rules):
        abstract = sharding.concrete(jax.eval_shape(config.build().init, jax.random.key(0)), placed)
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract))


def on_one_device(config, params, batch):
    """Gradients and sums as numpy."""
    loss = CrossEntropy().build(config.build())
    return jax.tree.map(np.asarray, jax.jit(lambda p, b: accumulate(loss, p, b, None, 1))(params, batch))


def run(config, params, batch, layout, rules) -> tuple[Any, str]:
    """Gradients and sums as numpy, and the compiled program's text."""
    loss = CrossEntropy().build(config.build())
    placed = mesh.build(layout)
    put = functools.partial(_put, placed, rules)
    with sharding.activate(placed, rules):
        lowered = jax.jit(lambda p, b: accumulate(loss, p, b, None, 1)).lower(
            place(params, config, placed, rules), jax.tree.map(put, batch)
        )
        compiled = lowered.compile()
        out = compiled(place(params, config, placed, rules), jax.tree.map(put, batch))
    return jax.tree.map(np.asarray, out), str(compiled.as_text())


def _put(placed, rules, x):
    return jax.device_put(x, sharding.named(placed, rules, ("batch", "length"), x.shape))


def assert_same(got, want):
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (want, got)), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Softmax does not change when all of a query's scores move, so this gradient is zero and rounding is all of it.
        floor = 1.0 if name.endswith("key/bias") else 1e-3
        error = np.linalg.norm(a - b) / max(np.linalg.norm(a), floor)
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("family", SPREAD)
def test_a_family_on_a_mesh_equals_one_device(family):
    config = dataclasses.replace(MODELS[family], vocab_multiple=2)
    params, batch = parameters(config), random_batch(rows=8, length=16)
    if family != "bert":
        batch = batch.marked(prefix=(np.arange(16) < 5).astype(np.int32)[None].repeat(8, 0))
    want = on_one_device(config, params, batch)
    got, _ = run(config, params, batch, MeshConfig(data=2, fsdp=2, tensor=2), ShardingRules())
    assert_same(got, want)


@functools.cache
def single():
    return on_one_device(MOE, parameters(MOE), random_batch(rows=8, length=16))


@pytest.mark.parametrize(
    ("layout", "rules"),
    [
        (MeshConfig(data=1, expert=8), ShardingRules()),
        (MeshConfig(data=2, expert=4), ShardingRules()),
        (MeshConfig(data=1, fsdp=2, expert=4), ShardingRules()),
        (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), ShardingRules()),
        (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), ShardingRules(residual=("tensor",))),
        (MeshConfig(data=2, fsdp=2, tensor=2), ShardingRules()),
    ],
    ids=["8 experts", "data x expert", "fsdp x expert", "fsdp x tensor x expert", "residual over tensor", "no axis"],
)
def test_experts_in_parallel_equal_one_device(layout, rules):
    got, text = run(MOE, parameters(MOE), random_batch(rows=8, length=16), layout, rules)
    assert_same(got, single())
    assert single()[1]["dropped"] > 0
    assert ("all-to-all" in text) == (layout.expert > 1)


def test_each_device_holds_its_own_experts_only():
    layout, rules = MeshConfig(data=2, expert=4), ShardingRules()
    placed = place(parameters(MOE), MOE, mesh.build(layout), rules)
    kernel = placed["decoder"]["layers"]["block_1"]["mlp"]["experts"]["wi"]["kernel"]
    assert kernel.shape == (1, 8, 64, 32)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 2, 64, 32)}


def test_decoding_with_experts_in_parallel_gives_the_tokens_of_one_device():
    params, prompts, rules = parameters(MOE), [[5, 6, 7], [9, 90, 33], [20]], ShardingRules()
    want = decode.generate(MOE.build(), params, prompts, 16, stop=None)
    placed = mesh.build(MeshConfig(data=2, expert=4))
    spread = place(params, MOE, placed, rules)
    got = decode.generate(MOE.build(), spread, prompts, 16, stop=None, mesh=placed, rules=rules)
    assert [one.tokens.tolist() for one in got] == [one.tokens.tolist() for one in want]


def test_what_the_expert_axis_cannot_divide_is_refused():
    with pytest.raises(ConfigError, match=r"'experts' of size 4 is not divisible by mesh axes expert=8"):
        place(parameters(FAMILIES["glam"]), FAMILIES["glam"], mesh.build(MeshConfig(data=1, expert=8)), ShardingRules())


def test_a_mesh_has_the_expert_axis_only_where_it_splits():
    assert mesh.build(MeshConfig()).axis_names == ("data", "fsdp", "tensor")
    assert dict(mesh.build(MeshConfig(data=1, fsdp=-1, expert=4)).shape) == {
        **{"data": 1, "fsdp": 2, "tensor": 1},
        "expert": 4,
    }
    with pytest.raises(ConfigError, match="expert=3"):
        mesh.build(MeshConfig(expert=3))
