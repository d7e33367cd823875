"""What the config.gin of a T5X run tells that its tree of parameters does not: activations and the vocabulary."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from palmjax.config import ConfigError
from palmjax.models.layers import ActivationPart, ReLU, SiLU, TanhGELU

FILE = "config.gin"
ACTIVATIONS: dict[str, ActivationPart] = {
    "gelu": TanhGELU(),  # flax.linen.gelu's default
    "relu": ReLU(),
    "silu": SiLU(),
    "swish": SiLU(),
}
"""By the names that T5X looks up in flax.linen."""
_BINDING = re.compile(r"^[\w./]*\bmlp_activations\s*=\s*\\?\s*([(\[][^)\]]*[)\]])", re.MULTILINE)
_MODEL_FILE = re.compile(r"""\bsentencepiece_model_file\s*=\s*\\?\s*["']([^"'\n]+)["']""")


def vocabulary_file(checkpoint: Path) -> str | None:
    """The SentencePiece model that config.gin beside `checkpoint` names; None if there is not just one."""
    file = checkpoint.parent / FILE
    named = set(_MODEL_FILE.findall(file.read_text())) if file.is_file() else set()
    return named.pop() if len(named) == 1 else None


def activation(checkpoint: Path, *, is_gated: bool, usual: ActivationPart) -> ActivationPart:
    """The feed-forward layers' activation (the gate's, `wi_0`): that of config.gin beside `checkpoint`, else `usual`.

    Where there is no config.gin, a line on stderr says what was taken for granted. Raises ConfigError for activations
    that palmjax's layers do not have, or that do not go with the tree.
    """
    file = checkpoint.parent / FILE
    said = set(_BINDING.findall(file.read_text())) if file.is_file() else set()
    if not said:
        print(
            f"{checkpoint}: a tree does not tell activations, and there is no {FILE} with mlp_activations beside it: "
            f"{type(usual).__name__}{' gates' if is_gated else ''} as is usual; else give MODEL.gin",
            file=sys.stderr,
        )
        return usual
    try:
        (names,) = {tuple(ast.literal_eval(one)) for one in said}
    except (ValueError, SyntaxError, TypeError) as error:
        raise ConfigError(f"{file}: mlp_activations = {' and '.join(sorted(said))}: give MODEL.gin") from error
    if names and names[0] in ACTIVATIONS and names[1:] == (("linear",) if is_gated else ()):
        return ACTIVATIONS[names[0]]
    gated = "('gelu', 'linear')" if is_gated else "('relu',)"
    raise ConfigError(
        f"{file}: mlp_activations = {names} is no layer of palmjax with the matrices of {checkpoint.name}; known are "
        f"{', '.join(ACTIVATIONS)}, as in {gated}; give MODEL.gin"
    )
