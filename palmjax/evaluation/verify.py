"""Whether a result still holds: every hash of its manifest made again, and some of its requests asked anew."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palmjax.evaluation import manifest, results, weights
from palmjax.evaluation.forms import Write
from palmjax.evaluation.schedule import Request
from palmjax.evaluation.store import Answer
from palmjax.evaluation.suites import Session, Which
from palmjax.evaluation.watch import Opener

EXCUSED = ("counters.", "checkpoint.path", "suite:")
"""Parts of a manifest that are results, or say where a thing lies: the suite's text counts by its tasks' hashes."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """holds: whether nothing has changed. lines: for people."""

    holds: bool
    lines: list[str]


def verify(folder: Path, recorded: Mapping[str, Any], opener: Opener, path: str, requests: int, seed: int) -> Verdict:
    """Compares. folder, recorded: the result's, and its manifest. opener: of its suite. path: the checkpoint's.

    Raises ConfigError if the documents' files or the checkpoint can't be read.
    """
    opened, session = opener.open(path)
    params = opened.params()
    which = Which(checkpoint=path, step=opened.info.step, weights=weights.fingerprint(params))
    now = session.manifest(which, [])
    changed = [line for line in manifest.differences(recorded, now) if not line.startswith(EXCUSED)]
    lines = [f"changed  {line}" for line in changed]
    if not changed:
        lines.append(f"holds    {len(session.requests()):,} requests, prompts {recorded['prompts'][:16]}, all hashes")
    wrong, asked = _ask_again(session, params, folder, requests, seed)
    lines += [f"differs  {line}" for line in wrong]
    lines.append(f"asked    {asked} log-likelihoods again: {asked - len(wrong)} have the same bits")
    return Verdict(not changed and not wrong, lines)


def _ask_again(session: Session, params: Any, folder: Path, count: int, seed: int) -> tuple[list[str], int]:
    """(lines about answers that are not the recorded ones, how many were asked): of prompts that are as they were."""
    known: list[tuple[Request, list[Any], str]] = []
    for each in session.asked:
        if each.style != each.documents.formats(1)[0]:
            continue
        lines = results.read_documents(folder, each.name)
        for prompt, line in zip(each.prompts, lines, strict=False):
            if prompt.hash != line["prompt"]:
                continue
            for one, reply in zip(prompt.encoded, line["replies"], strict=True):
                if not isinstance(one.question, Write) and len(one.requests) == 1:
                    known.append((one.requests[0], reply, f"{each.name} {prompt.document.id[:12]}"))
    picked = random.Random(seed).sample(known, min(count, len(known)))
    if not picked:
        return [], 0
    wrong = []
    for (_, reply, name), answer in zip(picked, session.answers(params, [one[0] for one in picked]), strict=True):
        assert isinstance(answer, Answer)
        if results.reply_json(answer) != reply:
            wrong.append(f"{name}: {reply[0]!r} -> {answer.log_likelihood!r} nats")
    return wrong, len(picked)
