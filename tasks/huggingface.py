"""A Hugging Face tokenizer as a seqio vocabulary. Imports seqio, TensorFlow and tokenizers when called."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

SETTINGS, MODEL = BESIDE = "tokenizer_config.json", "config.json"
"""Files beside a tokenizer.json that name its end-of-text token, by its text and by its id."""


def end_of_text(path: str, tokenizer: Any) -> int:
    """The id behind every document. Raises ValueError if neither file beside `path` names one."""
    folder = os.path.dirname(os.path.abspath(path))
    token, number = (_read(os.path.join(folder, name)) for name in (SETTINGS, MODEL))
    text = token.get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    if text is not None:
        return tokenizer.token_to_id(text)
    found = number.get("eos_token_id")
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, int):
        raise ValueError(f"{path} has no end of text: {SETTINGS} with an eos_token must lie beside it")
    return found


def _read(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def vocabulary(path: str) -> Any:
    """The seqio vocabulary of a tokenizer.json. Raises ValueError if the library is missing or can't read it."""
    return _vocabulary_class()(path)


@functools.cache
def _vocabulary_class() -> Any:
    import seqio
    import tensorflow as tf

    class HuggingFaceVocabulary(seqio.Vocabulary):
        """Ids of the tokenizer itself; EOS is appended by seqio, and no other special token ever."""

        def __init__(self, path: str):
            super().__init__(extra_ids=0)
            self.tokenizer_file = path

        def __eq__(self, other: object) -> bool:
            return isinstance(other, HuggingFaceVocabulary) and self.tokenizer_file == other.tokenizer_file

        def __hash__(self) -> int:
            return hash(self.tokenizer_file)

        @functools.cached_property
        def _tokenizer(self) -> Any:
            try:
                import tokenizers
            except ImportError as error:
                raise ValueError(
                    f"{self.tokenizer_file} needs the library of its format: pip install 'palmjax[huggingface]'"
                ) from error
            try:
                return tokenizers.Tokenizer.from_file(self.tokenizer_file)
            except Exception as error:  # the library raises Exception itself
                raise ValueError(f"{self.tokenizer_file} is not a tokenizer.json: {error}") from error

        @functools.cached_property
        def eos_id(self) -> int:
            return end_of_text(self.tokenizer_file, self._tokenizer)

        @property
        def unk_id(self) -> None:
            return None

        @property
        def _base_vocab_size(self) -> int:
            return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

        def _encode(self, s: str) -> list[int]:
            return self._tokenizer.encode(s, add_special_tokens=False).ids

        def _decode(self, ids: Any) -> str:
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

        def _encode_tf(self, s: Any) -> Any:
            def encode(text: Any) -> Any:
                return tf.constant(self._encode(text.numpy().decode()), tf.int32)

            ids = tf.py_function(encode, [s], tf.int32)
            ids.set_shape([None])
            return ids

        def _decode_tf(self, ids: Any) -> Any:
            return tf.py_function(lambda ids: tf.constant(self._decode(ids.numpy())), [ids], tf.string)

    return HuggingFaceVocabulary
