"""What a result depended on, as hashes and versions, and whether it still does. No jax.

`describe` makes the manifest of a run from what the run itself used; `differences` compares one with another, so that
`palmjax eval verify` says what has changed and not only that something has.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from palmjax.data.vocabulary import Vocabulary
from palmjax.evaluation.documents import digest
from palmjax.evaluation.evaluate import Asked
from palmjax.evaluation.templates import Style

FORMAT = 1
RULES = {
    "boundary": "context and continuation are tokenized together, spaces at the context's end with the continuation; "
    "a token that spans both is scored and counted (boundary_merges)",
    "bos": "once, at the front of every prompt whose vocabulary has one there; alone where there is no context",
    "rolling": "disjoint windows, the first behind BOS, the last with all the context a row holds; BOS is never scored",
    "overflow": "exemplars are dropped whole, the farthest first (shots_dropped); then the context of all of a "
    "document's questions is cut at its left behind BOS (truncated), or refused; a choice longer than a row is read in "
    "windows as in rolling, behind the context's last token (longer_than_a_row)",
    "ties": "share the credit and are counted, in the headline's figure (ties); so are choices less than 0.01 apart "
    "(near_ties)",
    "exemplars": "from the train split, by SHA-256 of (seed, document id) or (seed, group)",
    "limit": "the first documents by SHA-256 of their content",
}
"""How edges are decided: the same in every run of this version."""


def merkle_root(leaves: Sequence[str]) -> str:
    """SHA-256 over a binary tree of hexadecimal hashes; an odd one at a level's end goes up as it is."""
    level = [bytes.fromhex(leaf) for leaf in leaves] or [hashlib.sha256(b"").digest()]
    while len(level) > 1:
        pairs = [level[place : place + 2] for place in range(0, len(level), 2)]
        level = [hashlib.sha256(b"".join(pair)).digest() if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0].hex()


def tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """The vocabulary and its policy for BOS and EOS."""
    return {
        **vocabulary.to_json(),
        "fingerprint": vocabulary.fingerprint,
        "prompt_bos": vocabulary.prompt_bos,
        "bos": vocabulary.bos_id,
        "eos": vocabulary.eos_id,
    }


def tasks(asked: Sequence[Asked]) -> dict[str, Any]:
    """Of each task and format: its definition, documents and prompts by hash, in hash order."""
    found: dict[str, Any] = {}
    for each in asked:
        task = each.documents.task
        entry = found.setdefault(
            each.name,
            {
                "definition": digest(repr(dataclasses.replace(task, source=task.source.unplaced()))),
                "documents": merkle_root([document.id for document in each.documents.documents]),
                "count": len(each.documents.documents),
                "notes": dict(task.source.notes()),
                "formats": [],
            },
        )
        entry["formats"].append(
            {
                "style": "as written" if each.style == Style() else each.style.describe(),
                "prompts": merkle_root([prompt.hash for prompt in each.prompts]),
            }
        )
    return found


def prompts_root(asked: Sequence[Asked]) -> str:
    """Merkle root of every prompt of every task and format."""
    return merkle_root([prompt.hash for each in asked for prompt in each.prompts])


def describe(asked: Sequence[Asked], vocabulary: Vocabulary, **facts: Any) -> dict[str, Any]:
    """The manifest: what was asked and by which rules, and the facts of the model and the machine."""
    return {
        "format": FORMAT,
        "rules": RULES,
        "prompts": prompts_root(asked),
        "tasks": tasks(asked),
        "tokenizer": tokenizer(vocabulary),
        **facts,
    }


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`path: recorded -> now` for every leaf that is not the same."""
    old, new = dict(_leaves(recorded)), dict(_leaves(now))
    missing = "nothing"
    return [
        f"{path}: {old.get(path, missing)} -> {new.get(path, missing)}"
        for path in {**old, **new}
        if old.get(path, missing) != new.get(path, missing)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else name)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
