"""Stop strings, found in the text however its tokens spell it, and text that depends on what precedes it."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from palmjax import decode
from palmjax.data.vocabulary import Bytes, SentencePiece
from palmjax.decode import programs, text
from tests.decode.models import PROMPTS, built


def test_text_is_decoded_with_what_precedes_it():
    vocabulary = Bytes()
    whole = vocabulary.encode("naïve")
    # The prompt ends inside the two bytes of ï.
    assert decode.continuation_text(vocabulary, whole[:3], whole[3:]) == "ïve"
    assert decode.continuation_text(vocabulary, whole[:2], [*whole[2:], 1, 70]) == "ïve"


def test_an_end_of_text_in_the_prompt_hides_no_continuation():
    vocabulary = Bytes()
    prompt = [*vocabulary.encode("first"), 1, *vocabulary.encode("second")]
    assert decode.continuation_text(vocabulary, prompt, vocabulary.encode(" third")) == " third"
    assert decode.continuation_text(vocabulary, prompt[:6], vocabulary.encode("alone")) == "alone"


def join(pieces: list[str]):
    """Tokens are numbers of pieces of text."""
    return lambda tokens: "".join(pieces[token] for token in tokens)


PIECES = ["the ", "en", "d of", " it", "\n\nQ", "\n", "Q:", " 3"]


@pytest.mark.parametrize(
    ("tokens", "stops", "least", "want"),
    [
        ([0, 1, 2, 3], ["end"], 0, (3, "the ")),  # spans two tokens
        ([0, 1, 2, 3], ["the"], 0, (1, "")),
        ([0, 1, 2, 3], ["d of it", "of"], 0, (3, "the end ")),  # the one whole first, not the one that begins first
        ([0, 4, 0], ["\n\n", "Q"], 0, (2, "the ")),  # both in one token: cut at the first
        ([0, 5, 5, 6], ["\n\n"], 0, (3, "the ")),
        ([0, 5, 6, 7], ["\nQ:"], 0, (3, "the ")),
        ([0, 3, 3], ["zzz"], 0, None),
        ([], ["x"], 0, None),
        ([5, 0, 5, 0], ["\n"], 3, (3, "\nthe ")),  # the first one is over before token 3
        ([5, 0, 5, 0], ["\n"], 5, None),
        ([0, 5, 5, 6], ["\n\n"], 3, (3, "the ")),  # not over yet before token 3
        ([1, 2, 1, 2], ["end"], 3, (4, "end of")),
    ],
)
def test_the_first_whole_stop_string_cuts_whenever_one_looks(tokens, stops, least, want):
    for every in range(1, len(tokens) + 1):
        seen = 0
        for count in [*range(every, len(tokens), every), len(tokens)]:
            found = text.first_stop(join(PIECES), tokens[:count], seen, stops, least)
            seen = count
            if found is not None:
                break
        assert found == want, every
    if not tokens:
        assert text.first_stop(join(PIECES), tokens, 0, stops, least) is None


class Letters(Bytes):
    """Every id is one printable character, so that any of the model's tokens is text."""

    def decode(self, ids) -> str:
        return "".join(chr(32 + i) for i in ids)


def written(one: decode.Continuation) -> str:
    assert one.text is not None
    return one.text


def new_triple(text: str, start: int) -> str:
    """Three characters at `start` or behind it that the text has not had before."""
    places = range(start, len(text) - 2)
    return next(text[at : at + 3] for at in places if text.find(text[at : at + 3]) == at)


@pytest.mark.parametrize("way", [None, decode.ContrastiveSearch(alpha=0.5), decode.BeamSearch(beams=2)])
def test_a_stop_string_ends_its_row_and_no_other(way, monkeypatch):
    run = functools.partial(decode.generate, *built(), PROMPTS[:4], 60, sampling=way, stop=None, vocabulary=Letters())
    free = run()
    stop = new_triple(written(free[0]), 20)
    counts = []
    real = programs.advance
    monkeypatch.setattr(programs, "advance", lambda *a, **k: counts.append(int(a[3])) or real(*a, **k))
    found = run(stop_strings=[stop, "never there"])
    for one, whole in zip(found, free, strict=True):
        place = written(whole).find(stop)
        assert one.finished == (place >= 0)
        assert one.text == (written(whole)[:place] if place >= 0 else whole.text)
        tokens = whole.tokens[: place + len(stop)] if place >= 0 else whole.tokens
        np.testing.assert_array_equal(one.tokens, tokens)
        assert len(one.log_probs) == len(one.tokens)
    assert found[0].finished and not found[1].finished
    assert counts == ([60] if isinstance(way, decode.BeamSearch) else [17, 33, 49, 60] if way is None else counts)


def test_all_rows_stopped_end_the_loop(monkeypatch):
    run = functools.partial(decode.generate, *built(), PROMPTS[:2], 60, stop=None, vocabulary=Letters())
    stops = [written(one)[8:11] for one in run()]
    counts = []
    real = programs.advance
    monkeypatch.setattr(programs, "advance", lambda *a, **k: counts.append(int(a[3])) or real(*a, **k))
    assert all(one.finished for one in run(stop_strings=stops))
    assert counts == [17]


def test_a_stop_string_within_the_fewest_tokens_is_passed_over():
    run = functools.partial(decode.generate, *built(), PROMPTS[:1], 60, stop=None, vocabulary=Letters())
    free = written(run()[0])
    early = free[4]
    (one,) = run(stop_strings=[early], min_new_tokens=10)
    text = written(one)
    assert len(text) >= 9 and text == free[: len(text)]
    assert early in text and early not in free[9 : len(text)]
    assert one.finished == (early in free[9:])


def test_pieces_of_a_sentencepiece_vocabulary_keep_their_spaces(tmp_path):
    from palmjax import tokenizer

    words = ["the end of the story", "an end and another end", "stop here and go on"] * 30
    vocabulary = tokenizer.train(words, 281)
    assert isinstance(vocabulary, SentencePiece)
    prompt, tokens = vocabulary.encode("the end"), vocabulary.encode(" of the story stop here")
    read = functools.partial(decode.continuation_text, vocabulary, prompt)
    assert read(tokens) == " of the story stop here"
    found = text.first_stop(read, tokens, 0, ["y st"], 0)
    assert found is not None and found[1] == " of the stor"
    assert "y st" not in read(tokens[: found[0] - 1])
