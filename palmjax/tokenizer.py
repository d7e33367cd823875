"""`palmjax tokenizer`: trains a SentencePiece vocabulary with PaLM's rules. May import config and data.vocabulary.

PaLM section 2: lossless and reversible, whitespace kept, text outside the vocabulary split into UTF-8 bytes with a
token for each, numbers split into single digits. decode(encode(s)) == s holds for every string that UTF-8 can hold.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence

from palmjax.config import ConfigError
from palmjax.data.vocabulary import SentencePiece
from palmjax.files import write_whole

# SentencePiece writes a space as U+2581 and so takes U+2581 in a text for a space. Its own normalizer therefore escapes
# it, with U+0001 as the escape character, and the denormalizer turns it back. The escape of U+2581 has three bytes like
# itself, so that bytes are still counted exactly (only U+0001 itself counts double). Both rules are in the model file,
# where every program that uses SentencePiece, seqio among them, applies them.
_ESCAPES = {"\u2581": "\1\2\2", "\1": "\1\1"}

SENTENCE_CHARACTERS = 2048  # texts are cut so for training: SentencePiece's memory grows with the longest one
MODEL_FILE = "tokenizer.model"


def train(
    texts: Iterable[str], vocab_size: int, model_type: str = "unigram", character_coverage: float = 0.9995
) -> SentencePiece:
    """A vocabulary of vocab_size ids: 0 pad, 1 EOS, 2 unknown (never used), 256 bytes, and pieces. Deterministic.

    model_type: "unigram" or "bpe". character_coverage: share of the texts' characters that get pieces of their own;
    the others are spelt in bytes. Raises ConfigError if the texts do not give so many pieces, or there is no text.
    """
    import sentencepiece

    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = _rules(os.path.join(folder, "escape.tsv"), _ESCAPES)
        back = _rules(os.path.join(folder, "unescape.tsv"), {code: text for text, code in _ESCAPES.items()})
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=character_coverage,
                normalization_rule_tsv=rules,
                denormalization_rule_tsv=back,
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                byte_fallback=True,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                max_sentence_length=8 * SENTENCE_CHARACTERS,
                num_threads=1,  # the sums of several threads would depend on their timing
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[-1].rpartition("] ")[2]  # behind SentencePiece's file, line and condition
            raise ConfigError(f"cannot train a vocabulary of {vocab_size} ids: {reason}") from error
    return SentencePiece(_without_paths(model.getvalue()))


def _without_paths(model: bytes) -> bytes:
    """The model without the names of the temporary rule files, so that equal texts give equal bytes."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
    for spec in (proto.normalizer_spec, proto.denormalizer_spec):
        spec.ClearField("normalization_rule_tsv")
    return proto.SerializeToString(deterministic=True)


def read_texts(patterns: Sequence[str]) -> list[str]:
    """The text of every file that the patterns match. Raises ConfigError, naming the file, if one is not UTF-8 text."""
    paths = []
    for pattern in patterns:
        matches = sorted(
            path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)
        )
        if not matches:
            raise ConfigError(f"no file matches {pattern!r}")
        paths += matches
    texts = []
    for path in dict.fromkeys(paths):
        with open(path, "rb") as file:
            data = file.read()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        if "\0" in text:
            raise ConfigError(f"{path} is not text but binary: it has a NUL at byte {data.index(0)}")
        texts.append(text)
    if not any(texts):
        raise ConfigError(f"no text in {', '.join(patterns)}: {len(texts)} files, all empty")
    return texts


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), SENTENCE_CHARACTERS):
            yield text[start : start + SENTENCE_CHARACTERS]


def _rules(path: str, replacements: dict[str, str]) -> str:
    """Writes a SentencePiece rule file: code points, a tab, the code points that replace them. Returns its path."""
    with open(path, "w", encoding="ascii") as file:
        for source, target in replacements.items():
            file.write("\t".join(" ".join(f"{ord(c):04X}" for c in side) for side in (source, target)) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a vocabulary from the command line's files and writes DIR/tokenizer.model."""
    parser = argparse.ArgumentParser(prog="palmjax tokenizer", description="Train a SentencePiece vocabulary.")
    parser.add_argument("--input", nargs="+", required=True, help="UTF-8 text files or patterns")
    parser.add_argument("--vocab_size", type=int, required=True, help="ids, with 3 special ones and 256 bytes")
    parser.add_argument("--output", required=True, help=f"folder for {MODEL_FILE}")
    parser.add_argument("--model_type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument("--character_coverage", type=float, default=0.9995)
    flags = parser.parse_args(argv)
    texts = read_texts(flags.input)
    vocabulary = train(texts, flags.vocab_size, flags.model_type, flags.character_coverage)
    os.makedirs(flags.output, exist_ok=True)
    path = os.path.join(flags.output, MODEL_FILE)
    write_whole(path, vocabulary.model)
    sample = "".join(texts)[: 1 << 20]
    ratio = len(sample.encode()) / len(vocabulary.encode(sample))
    print(f"{path}: {vocabulary.size:,} ids; {ratio:.2f} bytes a token on the first {len(sample):,} characters")
    return 0


if __name__ == "__main__":
    from palmjax.cli import run_main

    raise SystemExit(run_main(main))
