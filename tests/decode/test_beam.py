"""Beam search: the tokens of transformers' generate, and the best of all continuations when the beam holds them all."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from palmjax import decode
from palmjax.config import ConfigError
from palmjax.data.batch import Batch
from palmjax.decode import BeamSearch, GNMTLength, PowerOfLength
from tests.decode.models import PROMPTS, built, greedy, texts
from tests.models.builders import tiny_palm

EOS = 1


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[Any, Any, Any]:
    """A random LLaMA of transformers, and the same one here."""
    pytest.importorskip("torch", reason="the peer is transformers' generate, of the interop extra")
    from palmjax.interop import convert
    from tests.interop import models

    folder = tmp_path_factory.mktemp("beams")
    model = models.tiny("llama 2: grouped queries")
    model.save_pretrained(folder / "theirs", safe_serialization=True)
    convert.from_huggingface(folder / "theirs", folder / "ours")
    return model, *models.restored(folder / "ours")


@pytest.mark.parametrize(("beams", "alpha", "new", "least"), [(4, 1.0, 24, 0), (3, 0.0, 24, 0), (2, -1.0, 24, 3)])
def test_continuations_are_those_of_transformers(theirs, beams, alpha, new, least):
    """With an end that comes up often, so that finished and unfinished continuations compete."""
    import torch

    peer, model, params = theirs
    rng = np.random.default_rng(beams)
    prompts = [rng.integers(3, 97, length).tolist() for length in (1, 4, 9, 17, 5, 6)]
    free = decode.generate(model, params, prompts, new, bos=None, stop=None, sampling=BeamSearch(beams=beams))
    everything = np.concatenate([one.tokens for one in free])
    stop = int(np.bincount(everything).argmax())
    search = BeamSearch(beams=beams, length=PowerOfLength(alpha=alpha))
    ours = decode.generate(model, params, prompts, new, bos=None, stop=stop, sampling=search, min_new_tokens=least)
    lengths = set()
    for prompt, one in zip(prompts, ours, strict=True):
        given = torch.tensor([prompt])
        found = peer.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new,
            min_new_tokens=least or None,
            do_sample=False,
            num_beams=beams,
            length_penalty=alpha,
            eos_token_id=stop,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        want = found.sequences[0, len(prompt) :].tolist()
        want = want[: want.index(stop) + 1] if stop in want else want
        assert one.tokens.tolist() == want
        assert one.finished == (want[-1] == stop)
        score = one.log_probs.sum() / len(want) ** alpha
        assert score == pytest.approx(float(found.sequences_scores[0]), rel=1e-4)
        lengths.add(len(want))
    assert len(lengths) > 1, "no continuation ended early: the comparison would prove little"


def all_continuations(model: Any, params: Any, prompt: list[int], count: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every continuation that ends with EOS, or has `count` tokens, by one forward pass."""
    ids = range(model.config.vocab_size)
    ended = [(*c, EOS) for n in range(count) for c in itertools.product([i for i in ids if i != EOS], repeat=n)]
    open_ = list(itertools.product([i for i in ids if i != EOS], repeat=count))
    rows = [[0, *prompt, *c] for c in (*ended, *open_)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = Batch(tokens=tokens, targets=tokens, weights=ones, segments=ones, positions=positions)
    log_probs = np.asarray(jax.nn.log_softmax(model.logits(params, model.hidden(params, batch)), axis=-1))
    first = 1 + len(prompt)
    return {
        tuple(row[first:]): float(sum(log_probs[i, at - 1, row[at]] for at in range(first, len(row))))
        for i, row in enumerate(rows)
    }


@pytest.mark.parametrize(
    ("length", "divisor"),
    [
        (PowerOfLength(alpha=0.7), lambda n: n**0.7),
        (GNMTLength(alpha=3.0), lambda n: ((5 + n) / 6) ** 3.0),
    ],
    ids=["power", "GNMT"],
)
def test_a_beam_that_holds_everything_finds_the_best_of_all_continuations(length, divisor):
    model = tiny_palm(vocab_size=4).build()
    params = jax.tree.map(lambda x: 3.0 * x, jax.jit(model.init)(jax.random.key(3)))
    every = all_continuations(model, params, [3, 2], 3)
    best = max(every, key=lambda tokens: every[tokens] / divisor(len(tokens)))
    (found,) = decode.generate(model, params, [[3, 2]], 3, sampling=BeamSearch(beams=27, length=length), stop=EOS)
    assert tuple(found.tokens.tolist()) == best
    assert found.log_probs.sum() == pytest.approx(every[best], rel=1e-4)


def test_one_beam_is_greedy_and_more_beams_find_more_probable_texts():
    one = decode.generate(*built(), PROMPTS, 64, sampling=BeamSearch(beams=1), stop=None)
    assert texts(one) == texts(greedy())
    four = decode.generate(*built(), PROMPTS, 64, sampling=BeamSearch(beams=4), stop=None)
    gains = [b.log_probs.sum() - a.log_probs.sum() for a, b in zip(one, four, strict=True)]
    assert np.mean(gains) > 0.5, gains


def test_no_beams_are_refused():
    with pytest.raises(ConfigError, match=r"BeamSearch.beams = 0"):
        BeamSearch(beams=0)
