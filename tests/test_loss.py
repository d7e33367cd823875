"""The loss against float64: cross-entropy, z-loss and its gradient, weights, accuracy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax.config import ConfigError
from palmjax.loss import CrossEntropy, token_losses, token_sums
from palmjax.models.embeddings import UntiedHead
from tests.models.builders import random_batch, tiny_palm


def test_token_losses_equal_float64_even_for_large_logits():
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((2, 5, 11)) * 40).astype(np.float32)
    targets = rng.integers(0, 11, (2, 5), dtype=np.int32)
    loss, log_z, correct = token_losses(jnp.asarray(logits), jnp.asarray(targets))
    wide = logits.astype(np.float64)
    want_log_z = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
    want = want_log_z - np.take_along_axis(wide, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_z, want_log_z, rtol=1e-6)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(correct, wide.argmax(-1) == targets)


def test_z_loss_adds_its_own_gradient():
    """d/dlogits of z * log(Z)^2 is 2 z log(Z) softmax (T5X computes the same by hand)."""
    logits = jax.random.normal(jax.random.key(0), (1, 3, 7)) * 3
    batch = jax.tree.map(lambda x: x[:1, :3], random_batch(vocab_size=7))

    def total(logits, z):
        sums = token_sums(logits, batch)
        return sums["loss"] + z * sums["log_z_squared"]

    with_z, without = (jax.grad(total)(logits, z) for z in (0.1, 0.0))
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    want = 2 * 0.1 * log_z * jax.nn.softmax(logits) * batch.weights[..., None]
    np.testing.assert_allclose(with_z - without, want, rtol=1e-4, atol=1e-6)


def test_tokens_without_weight_count_for_nothing():
    model = tiny_palm(num_layers=1).build()
    params, batch = model.init(jax.random.key(0)), random_batch(rows=2)
    loss = CrossEntropy().build(model)
    changed = np.where(batch.weights == 0, 5, batch.targets).astype(np.int32)
    first, second = (loss(params, b)[1] for b in (batch, dataclasses.replace(batch, targets=changed)))
    for name in first:
        assert first[name] == second[name], name
    assert first["weight"] == batch.weights.sum()


def test_a_negative_z_loss_is_refused():
    with pytest.raises(ConfigError, match=r"z_loss = -1"):
        CrossEntropy(z_loss=-1)


@pytest.mark.parametrize("field", ["part", "tokens"])
def test_logits_by_parts_leave_a_head_with_a_bias_out(field):
    model = tiny_palm(num_layers=1, head=UntiedHead(bias=True)).build()
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ConfigError, match=rf"CrossEntropy.{field}: this head is more than one product"):
        jax.eval_shape(CrossEntropy(**{field: 8}).build(model), params, random_batch())
    with pytest.raises(ConfigError, match=rf"{field} = 0"):
        CrossEntropy(**{field: 0})
    with pytest.raises(ConfigError, match="the logits are cut one way"):
        CrossEntropy(part=8, tokens=8)


def test_logits_by_parts_of_an_untied_head_give_the_same_loss_and_gradients():
    model = tiny_palm(num_layers=1, head=UntiedHead(logit_scale=0.5, soft_cap=2.0)).build()
    params, batch = model.init(jax.random.key(0)), random_batch(rows=2)
    losses = (CrossEntropy(), CrossEntropy(part=40), CrossEntropy(tokens=7))
    want, *others = (jax.value_and_grad(loss.build(model), has_aux=True)(params, batch) for loss in losses)
    for got in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, want)


def test_a_total_by_tokens_returns_the_float32_sum_of_its_table_s_gradient():
    model = tiny_palm(num_layers=1, dtype="bfloat16", head=UntiedHead()).build()
    params, batch = model.init(jax.random.key(0)), random_batch(rows=2)

    def of_table(loss: CrossEntropy) -> np.ndarray:
        gradients = jax.grad(lambda params: loss.build(model)(params, batch)[0])(params)
        return np.asarray(gradients["decoder"]["logits_dense"]["kernel"])

    want, got = of_table(CrossEntropy()), of_table(CrossEntropy(tokens=7))
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)
    assert not np.array_equal(got, got.astype("bfloat16").astype(np.float32)), "not rounded to bfloat16"
