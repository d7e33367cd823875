"""PaLM's model: against a float64 numpy oracle, its initialisation, masks, remat, padding, dropout and cache."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax.config import ConfigError
from palmjax.loss import CrossEntropy, token_sums
from palmjax.models import decoder
from palmjax.models.attention import Attention
from palmjax.models.layers import SwiGLU
from tests.models import palm_numpy
from tests.models.builders import random_batch, tiny_palm


def _logits(model, params, batch):
    return model.logits(params, model.hidden(params, batch))


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["multi-query", "grouped", "multi-head"])
def test_forward_equals_the_paper_in_float64(kv_heads):
    model = tiny_palm(kv_heads=kv_heads).build()
    params = model.init(jax.random.key(1))
    # Scales away from one, so that a forgotten one shows.
    params["decoder"]["decoder_norm"]["scale"] = jnp.linspace(0.5, 1.5, 64)
    batch = random_batch(rows=2)
    got = _logits(model, params, batch)
    for row in range(2):
        want = palm_numpy.forward(params, batch.tokens[row])
        np.testing.assert_allclose(got[row], want, rtol=2e-5, atol=2e-5)


def test_initialisation_is_the_published_one():
    config = tiny_palm(num_layers=2, d_model=256, vocab_size=2048)
    params = config.build().init(jax.random.key(0))
    layers = params["decoder"]["layers"]
    fan_in = {"wi_0": 256, "wi_1": 256, "wo": 128}
    for name, width in fan_in.items():
        assert np.std(layers["mlp"][name]["kernel"]) == pytest.approx(width**-0.5, rel=0.02)
    for name, width in {"query": 256, "key": 256, "value": 256, "out": 64}.items():
        assert np.std(layers["self_attention"][name]["kernel"]) == pytest.approx(width**-0.5, rel=0.04)
    assert np.std(params["token_embedder"]["embedding"]) == pytest.approx(1.0, rel=0.01)
    kernels = layers["mlp"]["wi_0"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1]), "layers must not share their initial values"


def test_a_tokens_own_logit_at_the_start_is_what_tied_unit_embeddings_give():
    """The input token's own logit is sqrt(d / var(residual)): E~N(0,1), normalised residual, logits / sqrt(d)."""
    model = tiny_palm(num_layers=4, d_model=256, vocab_size=512).build()
    params = model.init(jax.random.key(0))
    batch = random_batch(rows=4, length=64, vocab_size=512)
    own = np.take_along_axis(np.asarray(_logits(model, params, batch)), batch.tokens[..., None], axis=-1).mean()
    left = np.concatenate([palm_numpy.residual(params, row) for row in batch.tokens])
    assert own == pytest.approx(math.sqrt(256 / left.var()), rel=0.05)


def test_the_future_is_unseen_and_packed_documents_are_separate():
    model = tiny_palm().build()
    params = model.init(jax.random.key(0))
    batch = random_batch(rows=1)
    base = _logits(model, params, batch)
    later = batch.tokens.copy()
    later[:, 15:] = 7
    changed = _logits(model, params, dataclasses.replace(batch, tokens=later))
    np.testing.assert_array_equal(base[:, :15], changed[:, :15])
    assert not np.allclose(base[:, 15:], changed[:, 15:])

    packed = dataclasses.replace(
        batch,
        segments=np.where(np.arange(24) < 10, 1, 2)[None].astype(np.int32),
        positions=np.where(np.arange(24) < 10, np.arange(24), np.arange(24) - 10)[None].astype(np.int32),
    )
    together = _logits(model, params, packed)
    alone = _logits(
        model, params, jax.tree.map(lambda x: x[:, :14], dataclasses.replace(batch, tokens=batch.tokens[:, 10:]))
    )
    np.testing.assert_allclose(together[:, 10:], alone, rtol=1e-5, atol=1e-5)


def test_window_limits_what_a_query_sees():
    model = tiny_palm(num_layers=1, attention={"window": 4}).build()
    params = model.init(jax.random.key(0))
    batch = random_batch(rows=1)
    early = batch.tokens.copy()
    early[:, 0] = 5
    base, changed = (_logits(model, params, dataclasses.replace(batch, tokens=t)) for t in (batch.tokens, early))
    np.testing.assert_array_equal(base[:, 4:], changed[:, 4:])
    assert not np.allclose(base[:, :4], changed[:, :4])


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": decoder.RecomputeAll()},
        {"remat": decoder.RecomputeElementwise()},
        {"remat": decoder.RecomputeAttention()},
        {"unroll": 3},
    ],
    ids=["all", "elementwise", "attention", "unrolled"],
)
def test_remat_and_unroll_change_no_gradient(changes):
    plain, other = tiny_palm().build(), tiny_palm(**changes).build()
    params, batch = plain.init(jax.random.key(0)), random_batch(rows=2)
    want, got = (jax.jit(jax.grad(CrossEntropy().build(m), has_aux=True))(params, batch)[0] for m in (plain, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), want, got)


def test_remat_keeps_less():
    def kept(config):
        loss, params = CrossEntropy().build(config.build()), config.build().init(jax.random.key(0))
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params, random_batch(rows=8)).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    everything, nothing = kept(tiny_palm(num_layers=8)), kept(tiny_palm(num_layers=8, remat=decoder.RecomputeAll()))
    assert nothing < 0.5 * everything


def test_padding_of_the_vocabulary_has_no_probability_and_changes_no_loss():
    padded = tiny_palm(vocab_size=90, vocab_multiple=64)
    model, plain = padded.build(), tiny_palm(vocab_size=90).build()
    assert padded.padded_vocab_size == 128
    params, batch = model.init(jax.random.key(0)), random_batch(rows=2, vocab_size=90)
    logits = _logits(model, params, batch)
    assert logits.shape[-1] == 128
    assert np.all(jax.nn.softmax(logits)[..., 90:] == 0.0)
    cut = params | {"token_embedder": {"embedding": params["token_embedder"]["embedding"][:90]}}
    want = token_sums(_logits(plain, cut, batch), batch)
    got = token_sums(logits, batch)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)


def test_compute_is_bfloat16_and_parameters_and_logits_float32():
    model = tiny_palm(dtype="bfloat16").build()
    params, batch = model.init(jax.random.key(0)), random_batch(rows=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = model.hidden(params, batch)
    assert hidden.dtype == jnp.bfloat16
    logits = np.asarray(model.logits(params, hidden))
    assert logits.dtype == np.float32
    assert np.any(logits != logits.astype(jnp.bfloat16)), "float32 logits must not be rounded bfloat16 values"
    exact = tiny_palm().build()
    np.testing.assert_allclose(model.logits(params, hidden), _logits(exact, params, batch), atol=0.25)


def test_dropout_is_a_function_of_its_key():
    model = tiny_palm(dropout=0.2).build()
    params, batch = model.init(jax.random.key(0)), random_batch(rows=2)
    keys = jax.random.split(jax.random.key(3))
    first, again, other = (model.hidden(params, batch, key) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(model.hidden(params, batch), tiny_palm().build().hidden(params, batch))


def test_prefill_and_extend_give_the_logits_of_the_full_forward_pass():
    model = tiny_palm(kv_heads=2).build()
    params, batch = model.init(jax.random.key(0)), random_batch(rows=3, length=20)
    full = np.asarray(_logits(model, params, batch))
    lengths = np.array([1, 5, 9], np.int32)
    logits, cache = jax.jit(model.prefill)(params, batch.tokens[:, :9], lengths, model.init_cache(3, 20))
    np.testing.assert_allclose(logits, full[np.arange(3), lengths - 1], rtol=1e-5, atol=1e-5)
    extend = jax.jit(model.extend)
    for step in range(8):
        at = lengths + step
        logits, cache = extend(params, batch.tokens[np.arange(3), at], cache)
        np.testing.assert_allclose(logits, full[np.arange(3), at], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache["length"], lengths + 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Attention(num_heads=6, num_kv_heads=4, head_dim=16), ["num_heads = 6", "num_kv_heads = 4"]),
        (lambda: Attention(num_heads=6, head_dim=15), ["head_dim = 15"]),
        (lambda: tiny_palm(num_layers=0), ["num_layers = 0"]),
        (lambda: tiny_palm(dropout=1.0), ["dropout = 1.0"]),
    ],
)
def test_impossible_sizes_are_refused_by_name(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_parts_are_values():
    assert SwiGLU(d_ff=8) == SwiGLU(d_ff=8)
    assert hash(tiny_palm()) == hash(tiny_palm())
