"""Vocabularies and the tokenizer verb: any text survives, digits stay apart, bytes are counted exactly."""

from __future__ import annotations

import os
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from palmjax import tokenizer
from palmjax.config import ConfigError
from palmjax.data.vocabulary import Bytes, PassThrough, SentencePiece, Vocabulary, from_json

STDLIB = sysconfig.get_paths()["stdlib"]
TEXTS = tokenizer.read_texts([os.path.join(STDLIB, f"{name}.py") for name in ("argparse", "ast", "bisect", "calendar")])
VOCABULARIES: dict[str, Vocabulary] = {
    "bytes": Bytes(),
    "unigram": tokenizer.train(TEXTS, 600),
    "bpe": tokenizer.train(TEXTS, 900, model_type="bpe", character_coverage=0.99),
}
every_vocabulary = pytest.mark.parametrize("kind", list(VOCABULARIES))
text = st.text(st.characters(codec="utf-8"))
code = st.text(" \t\r\n\v\0\u00a0\u2003\u2581\ue000\1\2\x7f019aé\u0301😀<>/su_")


@every_vocabulary
@given(text=text | code)
@example("\u2581 \u2581\u2581 \1\2\2 \1\1\2\2")
@example("a\tb\r\nc \0 😀🏽‍🚀")
@example("<s></s><unk><pad><0x41>")
@example("  two  spaces  ")
@example("\ufeff\ufffd\u0085")
@example("\N{LATIN SMALL LETTER E}\N{COMBINING ACUTE ACCENT}\N{ANGSTROM SIGN}ﬁ")  # what normalization would change
def test_any_text_comes_back(kind: str, text: str) -> None:
    vocabulary = VOCABULARIES[kind]
    ids = vocabulary.encode(text)
    assert vocabulary.decode([*ids, vocabulary.eos_id, 7]) == text
    assert all(3 <= i < vocabulary.size for i in ids)  # no special id, unknown among them


@every_vocabulary
@given(text=text | code)
def test_bytes_are_counted_exactly(kind: str, text: str) -> None:
    vocabulary = VOCABULARIES[kind]
    counted = vocabulary.token_bytes()[vocabulary.encode(text)].sum()
    escapes = 0 if kind == "bytes" else text.count("\1")  # the tokenizer's escape character stands for itself twice
    assert counted == len(text.encode()) + escapes


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@given(text=st.text("0123456789 .,x"))
def test_every_digit_is_a_token_of_its_own(kind: str, text: str) -> None:
    vocabulary = VOCABULARIES[kind]
    for i in vocabulary.encode(text):
        piece = vocabulary.decode([i])
        assert not any(unicodedata.category(c) == "Nd" for c in piece) or len(piece) == 1


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_learns_code_and_is_deterministic(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    assert isinstance(vocabulary, SentencePiece)
    again = {"unigram": lambda: tokenizer.train(TEXTS, 600), "bpe": lambda: tokenizer.train(TEXTS, 900, "bpe", 0.99)}
    assert again[kind]() == vocabulary
    sample = TEXTS[0]
    assert len(sample.encode()) / len(vocabulary.encode(sample)) > 1.8
    assert any(vocabulary.decode([i]).isspace() and vocabulary.token_bytes()[i] >= 4 for i in range(vocabulary.size))


@every_vocabulary
def test_a_vocabulary_survives_being_stored(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    stored = from_json(vocabulary.to_json(), vocabulary.files())
    assert stored == vocabulary and hash(stored) == hash(vocabulary)
    assert stored.fingerprint == vocabulary.fingerprint and stored.encode("a b") == vocabulary.encode("a b")


def test_fingerprints_tell_vocabularies_apart() -> None:
    others = [*VOCABULARIES.values(), Bytes(extra_ids=1), PassThrough(259), PassThrough(259, eos=2)]
    assert len({vocabulary.fingerprint for vocabulary in others}) == len(others)


def test_byte_ids_are_byt5s() -> None:
    vocabulary = Bytes(extra_ids=100)
    assert vocabulary.encode("aé") == [100, 198, 172]
    assert (vocabulary.size, vocabulary.eos_id) == (359, 1)
    assert vocabulary.decode([0, 100, 2, 300, 1, 100]) == "a"
    assert vocabulary.token_bytes().sum() == 256


def test_pass_through_has_no_text() -> None:
    with pytest.raises(ConfigError, match="cannot encode any"):
        PassThrough(10).encode("a")
    assert PassThrough(10).decode([4, 5, 1, 6]) == "4 5"
    assert np.array_equal(PassThrough(3).token_bytes(), np.zeros(3))


def test_damaged_descriptions_are_refused() -> None:
    vocabulary = VOCABULARIES["unigram"]
    (name, model), *_ = vocabulary.files().items()
    with pytest.raises(ConfigError, match=r"vocabulary\.model is missing"):
        from_json(vocabulary.to_json(), {})
    with pytest.raises(ConfigError, match=r"vocabulary\.model is damaged"):
        from_json(vocabulary.to_json(), {name: model[:-1] + b"x"})
    with pytest.raises(ConfigError, match="unknown vocabulary kind 'words'"):
        from_json({"kind": "words"}, {})
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        _ = SentencePiece(b"no model").size


def test_tokenizer_verb_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [os.path.join(STDLIB, "cal*.py"), os.path.join(STDLIB, "bisect.py")]
    command = ["--input", *files, "--vocab_size", "400", "--output", str(tmp_path / "new" / "folder")]
    assert tokenizer.main(command) == 0
    vocabulary = SentencePiece((tmp_path / "new" / "folder" / "tokenizer.model").read_bytes())
    assert vocabulary.size == 400 and vocabulary.eos_id == 1
    assert "400 ids" in capsys.readouterr().out


def test_tokenizer_verb_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    def run(data: bytes, vocab_size: int = 400) -> None:
        (tmp_path / "a.txt").write_bytes(data)
        tokenizer.main(["--input", str(tmp_path / "*.txt"), "--vocab_size", str(vocab_size), "--output", str(tmp_path)])

    with pytest.raises(ConfigError, match="no file matches"):
        tokenizer.main(["--input", str(tmp_path / "none*"), "--vocab_size", "400", "--output", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8 text: .* at byte 3"):
        run(b"abc\xff")
    with pytest.raises(ConfigError, match=r"a\.txt is not text but binary.* byte 1"):
        run(b"a\0b")
    with pytest.raises(ConfigError, match="all empty"):
        run(b"")
    with pytest.raises(ConfigError, match=r"vocabulary of 40000 ids: Vocabulary size too high"):
        run(TEXTS[2].encode(), vocab_size=40_000)
    with pytest.raises(ConfigError, match="vocabulary of 100 ids"):
        run(TEXTS[2].encode(), vocab_size=100)
    assert not (tmp_path / "tokenizer.model").exists()
