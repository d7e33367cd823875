"""Continuing prompts with a language model, on any mesh: drawn token by token, by beam or by contrastive search.

    from palmjax import decode
    found = decode.generate(model, params, prompts, max_new_tokens=64, sampling=decode.BeamSearch(beams=4))

batches.py: requests into batches of one shape, and the loop over them on the host. programs.py: what is compiled.
search.py: what a way to continue is; tokenwise.py, beam.py, contrastive.py: the three there are. text.py: text and stop
strings. main.py: the verb.
"""

from palmjax.decode.batches import Continuation, generate
from palmjax.decode.beam import BeamSearch, GNMTLength, PowerOfLength
from palmjax.decode.contrastive import ContrastiveSearch
from palmjax.decode.search import SearchPart
from palmjax.decode.text import continuation_text

__all__ = [
    "BeamSearch",
    "Continuation",
    "ContrastiveSearch",
    "GNMTLength",
    "PowerOfLength",
    "SearchPart",
    "continuation_text",
    "generate",
]
