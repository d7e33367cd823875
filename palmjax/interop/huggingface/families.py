"""The families that palmjax converts, and which of them a configuration or a model belongs to."""

from __future__ import annotations

from typing import Any

from palmjax.config import ConfigError
from palmjax.interop.huggingface.bloom import BLOOM
from palmjax.interop.huggingface.cohere import COHERE
from palmjax.interop.huggingface.falcon import FALCON
from palmjax.interop.huggingface.family import Family
from palmjax.interop.huggingface.gpt import GPT2, GPT_NEOX, GPTJ
from palmjax.interop.huggingface.llama import LLAMA, MISTRAL, QWEN2
from palmjax.interop.huggingface.opt import OPT
from palmjax.models.decoder import Decoder

FAMILIES = (GPT2, OPT, BLOOM, FALCON, GPTJ, GPT_NEOX, LLAMA, MISTRAL, QWEN2, COHERE)
"""In the order in which a model that several can hold is given to them."""


def named(model_type: str, where: str) -> Family:
    """The family of a `model_type`. Raises ConfigError for another one."""
    known = {family.model_type: family for family in FAMILIES}
    if model_type in known:
        return known[model_type]
    # No nearest one: mixtral is no misspelt mistral.
    raise ConfigError(f"{where}: models of type {model_type!r} are not converted; known: {', '.join(map(repr, known))}")


def holding(model: Decoder, where: str) -> tuple[Family, dict[str, Any]]:
    """The family that has this model, and its config.json. Raises ConfigError if none has.

    Of several the first one, and before it one whose head is usually tied, or untied, as this model's is.
    """
    held = [(family, config) for family in FAMILIES if (config := family.config(model)) is not None]
    usual = [one for one in held if one[0].defaults["tie_word_embeddings"] == model.head.tied]
    for family, config in usual or held:
        return family, config
    raise ConfigError(
        f"{where}: no family of transformers is this model ({type(model.block).__name__}, "
        f"{type(model.attention.positions).__name__}, {type(model.head).__name__}); "
        f"known: {', '.join(family.model_type for family in FAMILIES)}"
    )
