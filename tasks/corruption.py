"""What objectives do to one piece of text: pure functions of its token ids and a generator of random numbers.

Imports numpy, and is imported by `tasks.objectives` when a store is built.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Example = dict[str, np.ndarray]
"""`inputs` and `targets`, token ids."""


def sentinel(vocabulary: Any, number: int) -> int:
    """The id of sentinel `number`: the vocabulary's last ids, counted down (T5's <extra_id_0> is the last)."""
    return int(vocabulary.vocab_size) - 1 - number


def noise_spans(length: int, density: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """Which tokens are noise, bool [length]: spans of `mean_span` tokens on average that cover `density` of them.

    Spans of noise and of text take turns, text first, and each division in spans is as likely as any other, so that
    no two spans of noise touch (Raffel et al. 2020, section 3.1.4).
    """
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)

    def divided(total: int) -> np.ndarray:
        ends = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff(np.concatenate([[0], ends, [total]]))

    lengths = np.stack([divided(length - noise), divided(noise)], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def corrupt_spans(tokens: np.ndarray, noise: np.ndarray, vocabulary: Any, extra_ids: int) -> Example:
    """T5's span corruption: inputs are the text with a sentinel for each span of noise; targets are the spans, each
    behind its sentinel, and a final sentinel. Raises ValueError if that takes more sentinels than there are.
    """
    edges = np.diff(np.concatenate([[False], noise, [False]]).astype(np.int8))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if len(starts) + 1 > extra_ids:
        raise ValueError(f"{len(starts)} spans need {len(starts) + 1} sentinels, and extra_ids is {extra_ids}")
    inputs, targets, before = [], [], 0
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        mark = np.asarray([sentinel(vocabulary, number)], tokens.dtype)
        inputs += [tokens[before:start], mark]
        targets += [mark, tokens[start:stop]]
        before = stop
    final = np.asarray([sentinel(vocabulary, len(starts))], tokens.dtype)
    return {"inputs": np.concatenate([*inputs, tokens[before:]]), "targets": np.concatenate([*targets, final])}


def split_at(tokens: np.ndarray, place: int) -> Example:
    """The first `place` tokens as inputs, the rest as targets."""
    return {"inputs": tokens[:place], "targets": tokens[place:]}


def mask_tokens(
    tokens: np.ndarray, rate: float, rng: np.random.Generator, *, mask: int, first: int, last: int
) -> Example:
    """BERT's masking of `rate` of the tokens: 80 % read as `mask`, 10 % as a random id from `first` to before `last`,
    10 % as they are. targets: those tokens, 0 elsewhere.
    """
    count = min(max(round(rate * len(tokens)), 1), len(tokens))
    chosen = np.sort(rng.choice(len(tokens), count, replace=False))
    fate, strangers = rng.random(count), rng.integers(first, last, count)
    inputs, targets = tokens.copy(), np.zeros_like(tokens)
    targets[chosen] = tokens[chosen]
    inputs[chosen] = np.where(fate < 0.8, mask, np.where(fate < 0.9, strangers, tokens[chosen]))
    return {"inputs": inputs, "targets": targets}
