"""From a tokenized corpus back to text as people write it. Imports config and the standard library.

A language model reads text; WikiText and its like are published with spaces between tokens. What is scored is then the
text, and what it is divided by (words, bytes) is the published one's, so that perplexities of different tokenizations
compare.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable

from palmjax.config import Part, section


class DetokenizerPart(Part):
    """A rule. `build()` returns it as a function of a text."""

    @abc.abstractmethod
    def build(self) -> Callable[[str], str]: ...


_WIKITEXT: tuple[tuple[str, str], ...] = (
    # contractions and numbers
    (r"s '", "s'"),
    (r"/' [0-9]/", "/'[0-9]/"),
    *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    # what a space follows, and none precedes
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    # what encloses
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    # headings, degrees, lines, numbers that were masked, genitives
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" \u00b0 ", "\u00b0"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


@section
class WikiText(DetokenizerPart):
    """The rule for WikiText of Megatron-LM (Shoeybi et al. 2019) and of lm-eval's task `wikitext`, byte for byte; one
    replacement after the other.
    """

    def build(self) -> Callable[[str], str]:
        rules = [(re.compile(pattern), text) for pattern, text in _WIKITEXT]

        def detokenize(text: str) -> str:
            for pattern, replacement in rules:
                text = pattern.sub(replacement, text)
            return text

        return detokenize
