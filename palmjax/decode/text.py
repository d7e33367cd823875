"""Tokens as text: what a continuation reads as behind its prompt, and where a stop string comes up in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from palmjax.data.vocabulary import Vocabulary


def continuation_text(vocabulary: Vocabulary, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` behind `prompt`. A piece's space, or half a character, needs what precedes it."""
    ends = [place for place, token in enumerate(prompt) if token == vocabulary.eos_id]
    prompt = prompt[ends[-1] + 1 :] if ends else prompt  # text ends at an EOS
    before, whole = vocabulary.decode(prompt), vocabulary.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else vocabulary.decode(tokens)


def first_stop(
    text_of: Callable[[Sequence[int]], str], tokens: Sequence[int], seen: int, stops: Sequence[str], least: int
) -> tuple[int, str] | None:
    """The fewest of `tokens` whose text holds one of `stops`, and their text before it; None if there is none.

    The first `seen` tokens are known to hold none. A stop string that is over before token number `least` is passed
    over. What comes out does not depend on how often this is asked.
    """
    passed = len(text_of(tokens[: least - 1])) if least > 1 else 0

    def place(text: str) -> int:
        places = [text.find(stop, max(0, passed - len(stop) + 1)) for stop in stops]
        return min((place for place in places if place >= 0), default=-1)

    if len(tokens) < least or place(text_of(tokens)) < 0:
        return None
    for count in range(max(seen + 1, least), len(tokens) + 1):
        text = text_of(tokens[:count])
        if (found := place(text)) >= 0:
            return count, text[:found]
    return None
