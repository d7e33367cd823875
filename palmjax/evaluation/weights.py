"""A fingerprint of parameters: of names, types, shapes and bits, whatever the mesh and the number of processes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from palmjax.checkpoint import describe
from palmjax.checkpoint.digest import digests


def fingerprint(params: Any) -> str:
    """SHA-256 over the arrays' names, types, shapes and digests. All processes of a job call it together.

    The digests are those that a checkpoint records of its arrays; like them it tells one model from another, and is no
    protection against a forger.
    """
    found = digests(params)
    arrays = {name: [what, found[name]] for name, what in describe(params).items()}
    return hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()
