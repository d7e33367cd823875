"""Every family against a float64 numpy oracle and against its own cache; single parts against their papers."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import decode
from palmjax.config import ConfigError
from palmjax.data.batch import ConcatenateAndCut, PackPairs
from palmjax.loss import CrossEntropy
from palmjax.models import parameters as parts
from palmjax.models.account import account, count
from palmjax.models.attention import Attention
from palmjax.models.decoder import BlockCycle, RecomputeAll, SerialBlock
from palmjax.models.embeddings import Embedding, LearnedPositions, UntiedHead
from palmjax.models.layers import MLP
from palmjax.models.moe import Experts
from palmjax.models.positions import ALiBi, RelativeBuckets, RoPE, alibi_slopes
from tests.decode.models import by_full_forward_passes
from tests.models import families_numpy as oracle
from tests.models.builders import random_batch
from tests.models.families import BERT, FAMILIES, attention, decoder, parameters


def logits_of(config, params, batch):
    model = config.build()
    return np.asarray(jax.jit(lambda p, b: model.logits(p, model.hidden(p, b)))(params, batch))


def batch_of(rows=2, length=20):
    return random_batch(rows=rows, length=length, vocab_size=96)


def assert_close(got, want):
    """Relative, by norm: each row of logits."""
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < 2e-5, f"relative error {error.max():.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_papers_in_float64(family):
    config = FAMILIES[family]
    params, batch = parameters(config), batch_of()
    got = logits_of(config, params, batch)[..., : config.vocab_size]
    for row in range(2):
        assert_close(got[row], oracle.forward(config, params, batch.tokens[row])[:, : config.vocab_size])


def test_bert_equals_the_paper_with_sentences_and_padding():
    params, batch = parameters(BERT), batch_of()
    types = (np.arange(20) >= 9).astype(np.int32)
    real = np.arange(20) < 13
    batch = dataclasses.replace(batch, segments=np.stack([np.ones(20, np.int32), real.astype(np.int32)]))
    batch = batch.marked(token_types=np.stack([types, types]))
    got = logits_of(BERT, params, batch)
    assert_close(got[0], oracle.forward(BERT, params, batch.tokens[0], types=types))
    assert_close(got[1, :13], oracle.forward(BERT, params, batch.tokens[1, :13], types=types[:13]))


@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "gpt2"])
def test_a_prefix_is_seen_by_its_whole_segment(family):
    config = FAMILIES[family]
    params, batch = parameters(config), batch_of()
    prefix = np.zeros((2, 20), np.int32)
    prefix[0, :8], prefix[1, :15] = 1, 1
    got = logits_of(config, params, batch.marked(prefix=prefix))[..., : config.vocab_size]
    for row in range(2):
        want = oracle.forward(config, params, batch.tokens[row], prefix=prefix[row])
        assert_close(got[row], want[:, : config.vocab_size])


def lively(params):
    """Blocks and positions that weigh more beside the tokens: what follows then depends on more than the last one."""

    def scaled(path, leaf):
        module, name = path[-2].key, path[-1].key
        return 4.0 * leaf if module in ("out", "wo", "query", "position_embedder") and name != "bias" else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_through_the_cache_equal_full_forward_passes(family):
    config = FAMILIES[family]
    model, params = config.build(), lively(parameters(config, seed=1))
    prompts = [[5, 6, 7], [], [9, 90, 33, 41, 8, 60, 11, 72], [20] * 11]
    want, log_probs = by_full_forward_passes(model, params, prompts, 64)
    assert len(np.unique(want)) > 10, "the model repeats itself: the comparison would prove little"
    found = decode.generate(model, params, prompts, 64, stop=None)
    for row, one in enumerate(found):
        np.testing.assert_array_equal(one.tokens, want[row])
        np.testing.assert_allclose(one.log_probs, log_probs[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "gpt2", "glam"])
def test_a_prompt_read_as_a_prefix_gives_the_logits_of_the_full_forward_pass(family):
    config = FAMILIES[family]
    model, params, batch = config.build(), parameters(config), batch_of(rows=3)
    lengths = np.array([1, 5, 9], np.int32)
    prefix = (np.arange(20) < lengths[:, None]).astype(np.int32)
    full = logits_of(config, params, batch.marked(prefix=prefix))
    prefill, extend = jax.jit(model.prefill, static_argnames="as_prefix"), jax.jit(model.extend)
    logits, cache = prefill(params, batch.tokens[:, :9], lengths, model.init_cache(3, 20), as_prefix=True)
    np.testing.assert_allclose(logits, full[np.arange(3), lengths - 1], rtol=1e-4, atol=1e-4)
    for step in range(3):
        at = lengths + step
        logits, cache = extend(params, batch.tokens[np.arange(3), at], cache)
        np.testing.assert_allclose(logits, full[np.arange(3), at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_shapes_and_axes_are_those_of_init(family):
    config = dataclasses.replace(FAMILIES[family], remat=RecomputeAll())
    model = config.build()
    made = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, made) == jax.tree.map(lambda leaf: leaf.shape, model.abstract_params())
    axes = jax.tree.leaves(model.axes, is_leaf=lambda node: isinstance(node, tuple))
    assert [len(one) for one in axes] == [leaf.ndim for leaf in jax.tree.leaves(made)]
    cost = account(config, 64)
    assert cost.parameters + cost.vocabulary_padding == count(made)
    assert cost.hardware_flops_per_token > cost.flops_per_token > 6 * cost.active_parameters


@pytest.mark.parametrize("family", ["gpt3", "glam", "gopher", "t5"])
def test_remat_changes_no_gradient(family):
    plain = FAMILIES[family]
    params, batch = parameters(plain), batch_of()
    want, got = (
        jax.jit(jax.grad(CrossEntropy().build(config.build()), has_aux=True))(params, batch)[0]
        for config in (plain, dataclasses.replace(plain, remat=RecomputeAll(), unroll=2))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), want, got)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gopher", "t5", "mistral", "glam"])
def test_packed_documents_are_separate(family):
    config = FAMILIES[family]
    params, batch = parameters(config), batch_of(rows=1)
    column = np.arange(20)
    packed = dataclasses.replace(
        batch,
        segments=np.where(column < 8, 1, 2)[None].astype(np.int32),
        positions=np.where(column < 8, column, column - 8)[None].astype(np.int32),
    )
    alone = jax.tree.map(lambda x: x[:, :12], dataclasses.replace(batch, tokens=batch.tokens[:, 8:]))
    np.testing.assert_allclose(
        logits_of(config, params, packed)[:, 8:], logits_of(config, params, alone), rtol=1e-4, atol=1e-4
    )


def test_alibi_slopes_are_the_published_ones():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-6)
    for heads in (1, 6, 16, 71, 112):
        np.testing.assert_allclose(alibi_slopes(heads), oracle.alibi(heads), rtol=1e-6)
    bloom = alibi_slopes(112)
    np.testing.assert_allclose(bloom[:64], alibi_slopes(64), rtol=1e-6)
    np.testing.assert_allclose(bloom[64:], alibi_slopes(128)[0:96:2], rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_t5s(bidirectional):
    part = RelativeBuckets(bidirectional=bidirectional)
    distances = np.arange(-300, 301)
    got = part.buckets(jnp.asarray(distances))
    np.testing.assert_array_equal(got, [oracle.bucket(part, int(d)) for d in distances])
    assert int(got.max()) == 31
    # The bucket of distance 0 exists for keys before the query only.
    assert len(np.unique(np.asarray(got))) == (31 if bidirectional else 32)


def test_initial_values_are_the_published_ones():
    """GPT-2's projections into the residual stream shrink with depth; GPT-NeoX's small initialisation; LLaMA's 0.02."""
    config = decoder(SerialBlock(attention=attention(), mlp=MLP(d_ff=256, bias=True)), num_layers=8, head=UntiedHead())

    def stddev(init, *path):
        leaf = dataclasses.replace(config, init=init).build().init(jax.random.key(0))
        for key in path:
            leaf = leaf[key]
        return np.std(leaf)

    out, wi = ("decoder", "layers", "mlp", "wo", "kernel"), ("decoder", "layers", "mlp", "wi", "kernel")
    table, head = ("token_embedder", "embedding"), ("decoder", "logits_dense", "kernel")
    assert stddev(parts.DepthScaledGaussian(stddev=0.02), *wi) == pytest.approx(0.02, rel=0.03)
    assert stddev(parts.DepthScaledGaussian(stddev=0.02), *out) == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    assert stddev(parts.SmallInit(), *wi) == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.03)
    assert stddev(parts.SmallInit(), *out) == pytest.approx(2 / (8 * math.sqrt(64)), rel=0.03)
    assert stddev(parts.Gaussian(stddev=0.02), *table) == pytest.approx(0.02, rel=0.03)
    assert stddev(parts.Gaussian(stddev=0.02), *head) == pytest.approx(0.02, rel=0.03)


def test_bfloat16_computes_in_bfloat16_with_float32_logits():
    for family in ("gpt3", "bloom", "glam", "gopher", "t5", "opt_350m"):
        config = dataclasses.replace(FAMILIES[family], dtype="bfloat16")
        model, params, batch = config.build(), parameters(config), batch_of()
        hidden = model.hidden(params, batch)
        assert hidden.dtype == jnp.bfloat16
        logits = model.logits(params, hidden)
        assert logits.dtype == jnp.float32
        exact = logits_of(FAMILIES[family], params, batch)
        error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
        assert error < 0.06, (family, error)


def test_rows_longer_than_the_positions_are_refused():
    model = decoder(
        SerialBlock(attention=attention(), mlp=MLP(d_ff=8)), embedding=Embedding(positions=LearnedPositions(length=16))
    ).build()
    with pytest.raises(ConfigError, match=r"max_new_tokens = 9 it passes the 16 positions"):
        decode.generate(model, None, [[5] * 8], 9)


def test_an_encoder_is_refused_where_the_next_token_is_predicted():
    model = BERT.build()
    with pytest.raises(ConfigError, match="encoder"):
        decode.generate(model, None, [[5]], 4)
    with pytest.raises(ConfigError, match=r"causal = False with ConcatenateAndCut.*PackPairs"):
        model.check_rows(16, ConcatenateAndCut())
    model.check_rows(16, PackPairs())
    with pytest.raises(ConfigError, match=r"rows of 129 tokens.*128 positions"):
        model.check_rows(129, PackPairs())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RoPE(dims=7), ["RoPE.dims = 7", "even"]),
        (lambda: Attention(num_heads=4, head_dim=16, positions=RoPE(dims=32)), ["RoPE.dims = 32", "head_dim = 16"]),
        (lambda: RelativeBuckets(num_buckets=6), ["num_buckets = 6", "multiple of 4"]),
        (lambda: RelativeBuckets(num_buckets=32, max_distance=16), ["max_distance = 16"]),
        (lambda: Experts(num_experts=4, expert=MLP(d_ff=8), top_k=5), ["top_k = 5", "num_experts = 4"]),
        (lambda: BlockCycle(blocks=()), ["BlockCycle.blocks"]),
        (lambda: dataclasses.replace(FAMILIES["gpt3"], num_layers=3), ["num_layers = 3", "2 blocks"]),
        (
            lambda: decoder(
                BlockCycle(
                    blocks=tuple(SerialBlock(attention=attention(kv=kv), mlp=MLP(d_ff=8)) for kv in (1, 2)),
                )
            ),
            ["BlockCycle.blocks", "(1, 16), (2, 16)"],
        ),
        (
            lambda: dataclasses.replace(FAMILIES["opt_350m"], head=UntiedHead()),
            ["Embedding.width = 40", "d_model = 64"],
        ),
    ],
)
def test_impossible_compositions_are_refused_by_name(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_parts_are_values():
    assert ALiBi() == ALiBi()
    assert len({hash(config) for config in FAMILIES.values()}) == len(FAMILIES)
