"""The sharding seam: rules that refuse nonsense, and einsum's layouts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from palmjax import mesh, sharding
from palmjax.config import ConfigError, MeshConfig, ShardingRules

CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def cube():
    return mesh.build(CUBE)


@pytest.mark.parametrize(
    ("rules", "axes", "shape", "words"),
    [
        (ShardingRules(), ("mlp",), (7,), ["'mlp'", "7", "tensor=2"]),
        (ShardingRules(), ("batch", "length"), (6, 4), ["'batch'", "6", "data=2 x fsdp=2"]),
        (ShardingRules(embed=("tensor",)), ("embed", "mlp"), (4, 4), ["'tensor'", "two dimensions"]),
        (ShardingRules(mlp=("model",)), ("mlp",), (4,), ["'model'", "data, fsdp, tensor"]),
    ],
)
def test_rules_that_cannot_hold_are_refused_by_name(cube, rules, axes, shape, words):
    with pytest.raises(ConfigError) as error:
        sharding.named(cube, rules, axes, shape, "decoder/x")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_dimension_of_one_is_replicated(cube):
    placed = sharding.named(cube, ShardingRules(), ("batch", "length", "kv_heads", "head_dim"), (4, 3, 1, 2))
    assert placed.spec == PartitionSpec(("data", "fsdp"), None, None, None)


@pytest.mark.parametrize("residual", [(), ("tensor",)])
def test_einsum_places_its_result_and_agrees_with_jnp(cube, residual):
    rules = ShardingRules(residual=residual)
    x, w, back = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 3, 8), (8, 6), (6, 8)]))

    def two(x, w, back):
        h = sharding.einsum("BTD,DF->BTF", x, w, out=("batch", "length", "mlp"))
        return h, sharding.einsum("BTF,FD->BTD", h, back, out=("batch", "length", "residual"))

    want = two(x, w, back)
    with sharding.activate(cube, rules):
        placed = [
            jax.device_put(a, sharding.named(cube, rules, axes, a.shape))
            for a, axes in ((x, ("batch", "length", "residual")), (w, ("embed", "mlp")), (back, ("mlp", "embed")))
        ]
        got = jax.jit(two)(*placed)
        assert jax.typeof(got[0]).sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
        assert jax.typeof(got[1]).sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor" if residual else None)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_split_rows_keeps_every_row_on_its_device(cube):
    x = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
    plain = np.asarray(sharding.split_rows(jnp.asarray(x), 2))
    with sharding.activate(cube, ShardingRules()):
        placed = jax.device_put(x, sharding.named(cube, ShardingRules(), ("batch", "length"), x.shape))
        compiled = jax.jit(lambda a: sharding.split_rows(a, 2)).lower(placed).compile()
        split = compiled(placed)
    np.testing.assert_array_equal(plain, split)
    np.testing.assert_array_equal(split[1], x[1::2])
    assert not any(word in str(compiled.as_text()) for word in ("all-to-all", "collective-permute", "all-gather"))


def test_rank_mistakes_are_ours():
    with pytest.raises(AssertionError):
        sharding.named(mesh.build(CUBE), ShardingRules(), ("batch",), (4, 4))


def test_a_wide_product_is_differentiated_in_its_operands_dtype(cube) -> None:
    """float32 logits of bfloat16 states: no product of the backward pass has a float32 operand, in or out of a mesh."""
    x = jax.random.normal(jax.random.key(0), (8, 4, 16), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (32, 16))
    out: sharding.Axes = ("batch", "length", "vocab")

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(sharding.einsum("BTD,VD->BTV", x, w, out=out, dtype=jnp.float32)))

    def exact(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.einsum("BTD,VD->BTV", x, w, precision="highest")))

    rounded = w.astype(jnp.bfloat16).astype(jnp.float32)
    wanted = jax.grad(exact, (0, 1))(x.astype(jnp.float32), rounded)
    alone = jax.grad(loss, (0, 1))(x, w)
    with sharding.activate(cube, ShardingRules()):
        rules = ShardingRules()
        placed = jax.device_put(w, sharding.named(cube, rules, ("vocab", "embed"), w.shape))
        rows = jax.device_put(x, sharding.named(cube, rules, ("batch", "length", "residual"), x.shape))
        together = jax.jit(jax.grad(loss, (0, 1)))(rows, placed)
    for found in (alone, together):
        assert [g.dtype for g in found] == [jnp.bfloat16, jnp.float32]
        for g, exactly in zip(found, wanted, strict=True):
            assert float(jnp.linalg.norm(g - exactly) / jnp.linalg.norm(exactly)) < 2**-7
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w))
    products = [line for line in text.splitlines() if "dot_general[" in line]
    assert len(products) >= 3 and sum(":f32" in line.split("=")[0] for line in products) == 1
