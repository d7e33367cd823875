"""Decoding with a cache gives what full forward passes give, whatever the batch, the mesh and the room in the cache."""

from __future__ import annotations

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palmjax import decode, mesh, sharding
from palmjax.config import ConfigError, ShardingRules
from palmjax.data.vocabulary import Bytes
from palmjax.decode import batches, programs
from palmjax.decode.search import Asked
from palmjax.decode.tokenwise import TokenByToken
from palmjax.sampling import Greedy, Temperature
from tests.decode.models import MIX, NEW, PROMPTS, built, by_full_forward_passes, greedy, spread, texts


@pytest.mark.parametrize("kv_heads", [1, 2], ids=["multi-query", "grouped"])
def test_greedy_tokens_equal_those_of_full_forward_passes(kv_heads):
    want, log_probs = by_full_forward_passes(*built(kv_heads), PROMPTS[:4], NEW)
    assert len(np.unique(want)) > 40, "the model repeats itself: the comparison would prove little"
    for row, one in enumerate(greedy(kv_heads)[:4]):
        np.testing.assert_array_equal(one.tokens, want[row])
        np.testing.assert_allclose(one.log_probs, log_probs[row], rtol=1e-4, atol=1e-4)
        assert not one.finished


WAYS = {
    "greedy": Greedy(),
    "sampled": MIX,
    "beams": decode.BeamSearch(beams=3),
    "contrastive": decode.ContrastiveSearch(alpha=0.5, top_k=3),
}


@pytest.mark.parametrize(("way", "dtype"), [*((way, "float32") for way in WAYS), ("sampled", "bfloat16")])
def test_a_request_gets_the_same_bits_alone_and_in_any_company(way, dtype):
    """Batches of 1, 3 and 8, in another order, and among 19 of very different lengths that fill several programs."""
    run = functools.partial(decode.generate, *built(dtype=dtype), max_new_tokens=40, sampling=WAYS[way], stop=2)
    together = run(PROMPTS)
    assert len({one.tokens.tobytes() for one in together}) == len(PROMPTS), "texts alike would prove little"

    def same(found: list[decode.Continuation], want: list[decode.Continuation]) -> None:
        for one, other in zip(found, want, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.log_probs, other.log_probs)

    same(run(PROMPTS[:3]), together[:3])
    for row in (0, 2, 5):
        same(run([PROMPTS[row]], requests=[row]), [together[row]])
    order = [6, 2, 7, 0, 4, 1, 5, 3]
    same(run([PROMPTS[row] for row in order], requests=order), [together[row] for row in order])
    strangers = [[11] * length for length in (300, 1, 70, 200, 129, 5, 64, 63, 240, 250, 17)]
    crowd = [*strangers[:6], *PROMPTS, *strangers[6:]]
    ids = [*range(100, 106), *range(len(PROMPTS)), *range(106, 111)]
    same(run(crowd, requests=ids)[6 : 6 + len(PROMPTS)], together)


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
    ("layout", "way", "prompts"),
    [((2, 2, 2), way, 3) for way in WAYS] + [((8, 1, 1), "greedy", 1)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_a_mesh_gives_the_tokens_of_one_device(layout, way, prompts):
    model, params = built(kv_heads=2)
    laid_out, placed = spread(model, params, **dict(zip(mesh.AXES, layout, strict=True)))
    run = functools.partial(
        decode.generate, model, prompts=PROMPTS[:prompts], max_new_tokens=NEW, sampling=WAYS[way], stop=None
    )
    assert texts(run(params=laid_out, mesh=placed, rules=ShardingRules())) == texts(run(params=params))


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


def lowered(model, params, search, placed=None, *, rows=8, new=NEW, room=256):
    """`begin` traced for prompts of one row's length, and its state and arguments for `advance`."""
    job = batches._Job(
        model=model,
        params=params,
        search=search,
        key=np.zeros(2, np.uint32),
        stops=batches._Stops(None, (), None, 0),
        most=new,
        as_prefix=False,
        rows=rows,
        mesh=placed,
        rules=ShardingRules(),
    )
    values = (np.zeros((rows, room), np.int32), np.ones(rows, np.int32), np.zeros(rows, bool))
    asked = Asked(job._place(np.zeros(rows, np.uint32)), job.key, *map(np.int32, (1, 0, new)))
    static = {"model": model, "search": search, "rules": ShardingRules()}
    shapes = {"room": room, "new_length": new, "chunk": 64, "as_prefix": False}
    traced = programs.begin.trace(params, *map(job._place, values), asked, **static, **shapes)
    state, _ = traced.out_info
    after = programs.advance.lower(params, state, job._place(values[2]), np.int32(new), asked, **static)
    return traced.lower(), after, state


def test_the_loop_ends_when_all_rows_have_ended(monkeypatch):
    free, calls = texts(greedy())[0], []
    real = programs.advance
    monkeypatch.setattr(programs, "advance", lambda *a, **k: calls.append(real(*a, **k)) or calls[-1])
    decode.generate(*built(), PROMPTS[:1], NEW, stop=free[9])
    assert [int(view.count) for _, view in calls] == [free.index(free[9]) + 1]


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
    cast = model.in_compute_dtype(params)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype.name, cast)
    assert dtypes["token_embedder"]["embedding"] == dtypes["decoder"]["layers"]["mlp"]["wo"]["kernel"] == "bfloat16"
    assert dtypes["decoder"]["layers"]["pre_norm"]["scale"] == dtypes["decoder"]["decoder_norm"]["scale"] == "float32"
    tokens = np.array([[0, 5, 6, 7]], np.int32)
    lengths = np.array([4], np.int32)
    a, b = (model.prefill(p, tokens, lengths, model.init_cache(1, 4))[0] for p in (params, cast))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", [None, (2, 2, 2)], ids=str)
@pytest.mark.parametrize("way", ["greedy", "contrastive"])
def test_the_cache_is_written_in_place(layout, way):
    """Nothing of the cache's size is copied, in the loops or around them: the program that reads prompts makes one
    cache, the one that writes tokens none.
    """
    model, params = built(kv_heads=2)
    search = TokenByToken() if way == "greedy" else WAYS[way]
    room, rows, placed = 16384, 8, None
    if layout is not None:
        params, placed = spread(model, params, data=2, fsdp=2, tensor=2)
    context = contextlib.nullcontext() if placed is None else sharding.activate(placed, ShardingRules())
    with context:
        before, after, state = lowered(model, params, search, placed, room=room)
        programs_ = [before.compile(), after.compile()]
    share = (rows, 2) if placed is None else (rows // 4, 1)
    cache = state.cache["key"]
    width = cache.shape[1] // rows
    bytes_of_cache = 2 * cache.size * cache.dtype.itemsize * share[0] * share[1] // (rows * 2)
    shape = f"{cache.shape[0]},{share[0] * width},{room},{share[1]},{cache.shape[4]}"
    # The candidates of a contrastive search begin with copies of their request's row.
    for program, most in zip(programs_, (0.1 if width == 1 else 0.75, 0.1), strict=True):
        memory, text = program.memory_analysis(), program.as_text()
        assert memory is not None and text is not None
        assert memory.temp_size_in_bytes < most * bytes_of_cache
        assert f"f32[{shape}]" in text, "the cache is not where this test looks"
        if program is programs_[1]:
            assert not re.search(rf"f32\[{shape}\]\S* copy\(", text)
            assert memory.alias_size_in_bytes > bytes_of_cache


@pytest.mark.parametrize(
    ("prompts", "count", "seed", "words"),
    [
        ([], 4, 0, ["no prompts"]),
        ([[1, 2]], 0, 0, ["max_new_tokens = 0"]),
        ([[1], [2, 96]], 4, 0, ["prompt 1", "96", "0 to 95"]),
        ([[-1]], 4, 0, ["-1"]),
        ([[1]], 4, 1 << 32, ["seed = 4294967296", "4294967295"]),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_continued_is_refused(prompts, count, seed, words):
    with pytest.raises(ConfigError) as error:
        decode.generate(*built(), prompts, count, seed=seed)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_new_tokens": 5}, ["min_new_tokens = 5", "max_new_tokens = 4"]),
        ({"stop_strings": ["x"]}, ["vocabulary"]),
        ({"stop_strings": ["x", ""], "vocabulary": Bytes()}, ["empty"]),
        ({"stop_strings": "end", "vocabulary": Bytes()}, ["'end'", "list"]),
        ({"requests": [-3]}, ["request = -3"]),
        ({"rows": 0}, ["rows = 0"]),
        ({"sampling": decode.ContrastiveSearch(top_k=97)}, ["top_k = 97", "96"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        decode.generate(*built(), [[1]], 4, **settings)
    assert all(word in str(error.value) for word in words)


def test_batches_hold_requests_of_one_program_and_all_requests_once():
    lengths = [1, 300, 200, 201, 64, 65, 193, 192, 1000] + [30] * 20
    found = batches.batches(lengths, 64, rows=8)
    assert sorted(index for batch in found for index in batch.members) == list(range(len(lengths)))
    assert [batch.room for batch in found] == sorted((batch.room for batch in found), reverse=True)
    for batch in found:
        assert len(batch.members) <= 8 and batch.chunk == 64
        assert {max(256, 1 << (lengths[i] + 63).bit_length()) for i in batch.members} == {batch.room}
    assert len(found) == 1 + 1 + 3
    # A prefix language model reads each prompt whole.
    assert {batch.chunk for batch in batches.batches([3, 65, 200], 10, rows=8, as_prefix=True)} == {64, 128, 256}


def test_a_prefix_language_model_reads_prompts_whole():
    """With a prompt longer than a chunk: the tokens of full forward passes that see all of the prompt."""
    prompt = [int(token) for token in np.random.default_rng(0).integers(3, 96, 100)]
    found = decode.generate(*built(), [prompt, [5, 6]], 24, stop=None, as_prefix=True)
    want, log_probs = by_full_forward_passes(*built(), [prompt, [5, 6]], 24, as_prefix=True)
    plain = decode.generate(*built(), [prompt, [5, 6]], 24, stop=None)
    assert texts(found) == want.tolist() != texts(plain)
    np.testing.assert_allclose([one.log_probs for one in found], log_probs, rtol=1e-4, atol=1e-4)


def test_results_are_told_as_their_batches_end():
    told = []
    prompts = [[7] * length for length in (3, 300, 5, 4)]
    found = decode.generate(*built(), prompts, 4, rows=2, on_found=lambda index, one: told.append((index, one)))
    assert [index for index, _ in told] == [1, 2, 3, 0]
    assert all(one is found[index] for index, one in told)


def test_nothing_stops_before_the_fewest_tokens():
    free = texts(greedy())[0]
    run = functools.partial(decode.generate, *built(), PROMPTS[:1], NEW, stop=free[5])
    (short,), (long,) = run(), run(min_new_tokens=20)
    assert len(short.tokens) == free.index(free[5]) + 1
    assert free[5] not in long.tokens[:-1].tolist() and len(long.tokens) > 20
    assert long.tokens[: len(short.tokens) - 1].tolist() == short.tokens[:-1].tolist()
