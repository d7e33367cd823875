"""The mixture of experts: places, drops and the balancing loss, token by token, and what the step reports of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax.loss import CrossEntropy
from palmjax.models.layers import MLP
from palmjax.models.moe import Experts
from palmjax.optim import Adafactor
from palmjax.state import init_state
from palmjax.step import accumulate, build_step
from tests.models import families_numpy as oracle
from tests.models.builders import random_batch
from tests.models.families import RMS, decoder, glam, parameters


def model_with(**changes):
    return decoder(glam(Experts(**({"num_experts": 4, "expert": MLP(d_ff=32)} | changes))), final_norm=RMS)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("capacity_factor", [0.25, 1.0, 1.25])
def test_tokens_that_find_no_place_go_on_by_the_residual_stream(top_k, capacity_factor):
    config = model_with(top_k=top_k, capacity_factor=capacity_factor)
    params, batch = parameters(config), random_batch(rows=2, length=20)
    model = config.build()
    hidden, report = jax.jit(model.forward)(params, batch)
    want = {"aux_loss": 0.0, "dropped": 0.0, "routed": 0.0}
    logits = [oracle.forward(config, params, row, report=want) for row in batch.tokens]
    np.testing.assert_allclose(model.logits(params, hidden), logits, rtol=2e-3, atol=2e-4)
    assert report["dropped"] == want["dropped"]
    assert report["routed"] == want["routed"] == 2 * 20 * top_k
    assert want["dropped"] > 0 or capacity_factor > 1.0, "too much room to show anything"
    assert float(report["aux_loss"]) == pytest.approx(want["aux_loss"], rel=1e-5)


def test_capacity_of_a_row():
    part = Experts(num_experts=64, expert=MLP(d_ff=8), capacity_factor=1.25)
    assert part.capacity(1024) == 40
    assert part.capacity(1) == 1
    assert Experts(num_experts=2, expert=MLP(d_ff=8), capacity_factor=9.0).capacity(10) == 10


def test_balanced_routers_pay_the_least():
    """With equal probabilities the loss of a layer is its weight, whoever is chosen."""
    config = model_with(aux_weight=0.5)
    params, batch = parameters(config), random_batch(rows=2, length=20)
    router = params["decoder"]["layers"]["block_1"]["mlp"]["router"]
    forward = jax.jit(config.build().forward)

    def aux(router):
        params["decoder"]["layers"]["block_1"]["mlp"]["router"] = router
        return float(forward(params, batch)[1]["aux_loss"]) / 40

    assert aux(jnp.zeros_like(router)) == pytest.approx(0.5, rel=1e-6)
    assert aux(1e3 * router) > 0.5, "certain choices, unevenly spread"


def test_padding_takes_no_place():
    config = model_with(capacity_factor=0.5)
    params, batch = parameters(config), random_batch(rows=2, length=20)
    real = np.arange(20) < 12
    padded = dataclasses.replace(batch, segments=np.stack([real, real]).astype(np.int32))
    other = dataclasses.replace(padded, tokens=np.where(real, batch.tokens, 7))
    model = config.build()
    forward = jax.jit(model.forward)
    (a, report), (b, _) = forward(params, padded), forward(params, other)
    np.testing.assert_array_equal(a[:, :12], b[:, :12])
    assert report["routed"] == 2 * 12 * 2


def test_a_row_does_not_depend_on_its_batch():
    config = model_with(capacity_factor=0.5)
    params, batch = parameters(config), random_batch(rows=4, length=20)
    model = config.build()
    hidden = jax.jit(model.hidden)
    together = hidden(params, batch)
    alone = hidden(params, jax.tree.map(lambda x: x[1:2], batch))
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5, atol=1e-5)


def test_microbatches_equal_the_whole_batch_and_the_step_reports_drops():
    config = model_with(capacity_factor=0.5)
    params, batch = parameters(config), random_batch(rows=4, length=20)
    model = config.build()
    loss = CrossEntropy().build(model)
    (whole, sums), (parts, again) = (
        jax.jit(lambda p, n=n: accumulate(loss, p, batch, None, n))(params) for n in (1, 2)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, again)

    optimizer = Adafactor()
    transformation = optimizer.build(model.axes)
    state = init_state(params, transformation, jax.random.key(0))
    step = jax.jit(build_step(loss, transformation, optimizer.learning_rate))
    _, metrics = step(state, batch)
    _, report = jax.jit(model.forward)(params, batch)
    assert metrics["dropped_share"] == pytest.approx(float(report["dropped"] / report["routed"]))
    assert 0.3 < metrics["dropped_share"] < 0.9
    assert metrics["aux_loss"] == pytest.approx(float(report["aux_loss"]) / float(np.sum(batch.weights)))


def test_the_router_learns_from_both_losses():
    config = model_with()
    params, batch = parameters(config), random_batch(rows=2, length=20)

    def router_gradient(weight):
        part = model_with(aux_weight=weight)
        gradients, _ = jax.jit(jax.grad(CrossEntropy().build(part.build()), has_aux=True))(params, batch)
        return np.asarray(gradients["decoder"]["layers"]["block_1"]["mlp"]["router"])

    without, with_it = router_gradient(0.0), router_gradient(0.01)
    assert np.linalg.norm(without) > 0
    assert np.linalg.norm(with_it - without) > 1e-4


def test_the_router_stays_float32_when_decoding_in_bfloat16():
    model = dataclasses.replace(model_with(), dtype="bfloat16").build()
    cast = model.in_compute_dtype(parameters(model.config))
    block = cast["decoder"]["layers"]["block_1"]["mlp"]
    assert block["router"].dtype == jnp.float32
    assert block["experts"]["wi"]["kernel"].dtype == jnp.bfloat16
