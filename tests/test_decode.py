"""Decoding with a cache gives what full forward passes give, whatever the batch, the mesh and the room in the cache."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import decode, mesh, sharding
from palmjax.config import ConfigError, MeshConfig, ShardingRules
from palmjax.data.batch import Batch
from palmjax.data.vocabulary import Bytes
from palmjax.sampling import Greedy, Temperature
from tests.models.builders import tiny_palm

PROMPTS = [[5, 6, 7], [], [9, 90, 33, 41] * 8, [20] * 17, [3], [60, 61], [8, 7, 6, 5, 4], [95]]
NEW = 64
MIX = Temperature(temperature=0.9, top_k=30, top_p=0.95)


@functools.cache
def built(kv_heads: int = 1, dtype: str = "float32") -> tuple[Any, Any]:
    """A model and parameters whose greedy text varies. A fresh model repeats its last token: its embeddings are tied,
    and large beside what the blocks add.
    """
    model = tiny_palm(kv_heads=kv_heads, vocab_size=96, vocab_multiple=40, dtype=dtype).build()
    params = jax.jit(model.init)(jax.random.key(0))
    params["token_embedder"]["embedding"] *= 0.05
    params["decoder"]["layers"]["self_attention"]["query"]["kernel"] *= 3.0
    return model, params


@functools.cache
def greedy(kv_heads: int = 1) -> list[decode.Continuation]:
    return decode.generate(*built(kv_heads), PROMPTS, NEW, stop=None)


def texts(found: list[decode.Continuation]) -> list[list[int]]:
    return [one.tokens.tolist() for one in found]


def by_full_forward_passes(model, params, prompts, count):
    """Greedy tokens and their log-probabilities with no cache: every row is computed again as a whole at each step."""

    @jax.jit
    def following(tokens, lengths):
        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        batch = Batch(tokens=tokens, targets=tokens, weights=ones, segments=ones, positions=positions)
        logits = model.logits(params, model.hidden(params, batch))
        return jax.nn.log_softmax(logits[jnp.arange(len(prompts)), lengths - 1])

    lengths = np.array([len(prompt) + 1 for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + count), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, 1 : lengths[row]] = prompt
    chosen, log_probs = [], []
    for _ in range(count):
        found = np.asarray(following(tokens, lengths))
        chosen.append(found.argmax(-1))
        log_probs.append(found.max(-1))
        tokens[np.arange(len(prompts)), lengths] = chosen[-1]
        lengths += 1
    return np.stack(chosen, 1), np.stack(log_probs, 1)


@pytest.mark.parametrize("kv_heads", [1, 2], ids=["multi-query", "grouped"])
def test_greedy_tokens_equal_those_of_full_forward_passes(kv_heads):
    want, log_probs = by_full_forward_passes(*built(kv_heads), PROMPTS[:4], NEW)
    assert len(np.unique(want)) > 40, "the model repeats itself: the comparison would prove little"
    for row, one in enumerate(greedy(kv_heads)[:4]):
        np.testing.assert_array_equal(one.tokens, want[row])
        np.testing.assert_allclose(one.log_probs, log_probs[row], rtol=1e-4, atol=1e-4)
        assert not one.finished


@pytest.mark.parametrize("sampling", [Greedy(), MIX], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_batch(sampling):
    run = functools.partial(decode.generate, *built(), max_new_tokens=NEW, sampling=sampling, stop=None)
    together = texts(run(PROMPTS))
    assert texts(run(PROMPTS[:3])) == together[:3]
    for row in (0, 2):
        assert texts(run([PROMPTS[row]], requests=[row])) == [together[row]]


def test_draws_depend_on_seed_request_and_position_only():
    run = functools.partial(decode.generate, *built(), sampling=MIX, stop=None)
    base = texts(run([[4, 5]] * 3, 40, seed=1))
    assert base == texts(run([[4, 5]] * 3, 40, seed=1))
    assert len({tuple(row) for row in base}) == 3, "requests must differ"
    assert texts(run([[4, 5]], 40, seed=2)) != base[:1]
    assert texts(run([[4, 5]], 40, seed=1, requests=[2])) == base[2:]
    # What was generated, given as prompt, goes on as it would have gone on.
    assert texts(run([[4, 5, *base[0][:15]]], 25, seed=1)) == [base[0][15:]]


def test_each_position_draws_anew():
    """With nothing learned every id is as probable, and one key for all positions would give one id for all."""
    model, params = built()
    blank = jax.tree.map(jnp.zeros_like, params)
    (found,) = texts(decode.generate(model, blank, [[1]], NEW, sampling=Temperature(), stop=None))
    assert len(set(found)) > NEW // 2


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("layout", "sampling", "prompts"),
    [((2, 2, 2), Greedy(), 3), ((2, 2, 2), MIX, 3), ((8, 1, 1), Greedy(), 1)],
    ids=["2x2x2 greedy", "2x2x2 sampled", "8x1x1 one prompt"],
)
def test_a_mesh_gives_the_tokens_of_one_device(layout, sampling, prompts):
    model, params = built(kv_heads=2)
    placed = mesh.build(MeshConfig(**dict(zip(mesh.AXES, layout, strict=True))))
    with sharding.activate(placed, ShardingRules()):
        abstract = sharding.concrete(jax.eval_shape(model.init, jax.random.key(0)), placed)
    spread = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    run = functools.partial(
        decode.generate, model, prompts=PROMPTS[:prompts], max_new_tokens=NEW, sampling=sampling, stop=None
    )
    assert texts(run(params=spread, mesh=placed, rules=ShardingRules())) == texts(run(params=params))


def test_a_stop_token_ends_its_row_and_no_other():
    free = texts(greedy())[:4]
    # A token that row 0 reaches and that not all others do.
    stop = next(t for t in free[0][5:] if any(t not in row for row in free[1:]))
    found = decode.generate(*built(), PROMPTS[:4], NEW, stop=stop)
    for row, one in zip(free, found, strict=True):
        want = row[: row.index(stop) + 1] if stop in row else row
        assert one.tokens.tolist() == want
        assert one.finished == (stop in row)
        assert len(one.log_probs) == len(want)
    assert found[0].finished and len(found[0].tokens) < NEW


def test_the_loop_ends_when_all_rows_have_ended():
    free = texts(greedy())[0]
    model, params = built()
    tokens = np.zeros((2, 16), np.int32)
    tokens[0, 1:4] = PROMPTS[0]
    lengths, requests, done = np.array([4, 1], np.int32), np.zeros(2, np.int32), np.array([False, True])
    run = functools.partial(decode._decode, model=model, sampling=Greedy(), rules=ShardingRules(), new_length=NEW)
    _, _, count = run(params, tokens, lengths, requests, done, np.zeros(2, np.uint32), np.int32(free[9]), np.int32(60))
    assert count == free.index(free[9]) + 1


@pytest.mark.parametrize("count", [1, 16, 17, 63])
def test_any_number_of_tokens_is_the_beginning_of_more(count):
    assert texts(decode.generate(*built(), PROMPTS[:2], count, stop=None)) == [
        row[:count] for row in texts(greedy())[:2]
    ]


def test_padding_of_the_vocabulary_is_never_chosen():
    model, params = built()
    assert model.config.padded_vocab_size > model.config.vocab_size
    hot = decode.generate(model, params, [[1]] * 8, 64, sampling=Temperature(temperature=50.0), stop=None)
    assert max(max(row) for row in texts(hot)) < model.config.vocab_size


def test_bfloat16_casts_matrices_once_and_changes_no_token():
    model, params = built(dtype="bfloat16")
    cast = decode._in_compute_dtype(model, params)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype.name, cast)
    assert dtypes["token_embedder"]["embedding"] == dtypes["decoder"]["layers"]["mlp"]["wo"]["kernel"] == "bfloat16"
    assert dtypes["decoder"]["layers"]["pre_norm"]["scale"] == dtypes["decoder"]["decoder_norm"]["scale"] == "float32"
    tokens = np.array([[0, 5, 6, 7]], np.int32)
    lengths = np.array([4], np.int32)
    a, b = (model.prefill(p, tokens, lengths, model.init_cache(1, 4))[0] for p in (params, cast))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", [None, (2, 2, 2)], ids=str)
def test_the_cache_is_written_in_place(layout):
    """Nothing of the cache's size is copied in the loop or around it: temporary memory is one cache and little more."""
    model, params = built(kv_heads=2)
    rules, rows, length, new = ShardingRules(), 8, 16, 4096 - 16
    placed = None if layout is None else mesh.build(MeshConfig(data=2, fsdp=2, tensor=2))
    values = (
        np.zeros((rows, length), np.int32),
        np.ones(rows, np.int32),
        np.zeros(rows, np.int32),
        np.zeros(rows, bool),
    )
    arguments = [decode._place(value, placed, rules) for value in values]
    limits = (np.zeros(2, np.uint32), np.int32(1), np.int32(new))

    def lower(params):
        return decode._decode.lower(
            params, *arguments, *limits, model=model, sampling=Greedy(), rules=rules, new_length=new
        )

    if placed is None:
        compiled = lower(params).compile()
    else:
        with sharding.activate(placed, rules):
            compiled = lower(sharding.concrete(jax.eval_shape(model.init, jax.random.key(0)), placed)).compile()
    cache = jax.eval_shape(functools.partial(model.init_cache, rows, length + new))["key"]
    local_rows, local_heads = (rows, 2) if placed is None else (rows // 4, 1)
    bytes_of_cache = 2 * cache.size * cache.dtype.itemsize * local_rows * local_heads // (rows * 2)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    assert memory.temp_size_in_bytes < 1.3 * bytes_of_cache
    shape = f"{cache.shape[0]},{local_rows},{cache.shape[2]},{local_heads},{cache.shape[4]}"
    assert f"f32[{shape}]" in text, "the cache is not where this test looks"
    assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)


@pytest.mark.parametrize(
    ("prompts", "count", "seed", "words"),
    [
        ([], 4, 0, ["no prompts"]),
        ([[1, 2]], 0, 0, ["max_new_tokens = 0"]),
        ([[1], [2, 96]], 4, 0, ["prompt 1", "96", "0 to 95"]),
        ([[-1]], 4, 0, ["-1"]),
        ([[1]], 4, 1 << 32, ["seed = 4294967296", "4294967295"]),
    ],
)
def test_what_cannot_be_continued_is_refused(prompts, count, seed, words):
    with pytest.raises(ConfigError) as error:
        decode.generate(*built(), prompts, count, seed=seed)
    assert all(word in str(error.value) for word in words)


def test_text_is_decoded_with_what_precedes_it():
    vocabulary = Bytes()
    whole = vocabulary.encode("naïve")
    # The prompt ends inside the two bytes of ï.
    assert decode.continuation_text(vocabulary, whole[:3], whole[3:]) == "ïve"
    assert decode.continuation_text(vocabulary, whole[:2], [*whole[2:], 1, 70]) == "ïve"
