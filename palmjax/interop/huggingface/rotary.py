"""Rotary positions in a config.json: the keys of old versions of transformers and of new ones, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from palmjax.config import ConfigError
from palmjax.models.positions import BandScaling, LinearScaling, PositionsPart, RoPE, ScalingPart, YaRNScaling

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    ),
}
"""What each type of rotary positions reads; "dynamic" and "longrope" depend on the row's length and are not here."""
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def rope(config: Any) -> dict[str, Any]:
    """`base`, `scaling` and `share` (rotated part of a head, None where the family says it otherwise)."""
    scaling, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if not (isinstance(scaling, Mapping) and isinstance(new, Mapping)):
        raise ConfigError(f"rope_scaling = {scaling or new!r} is not an object")
    given = {**scaling, **new}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ConfigError("rope_parameters that differ between layers are not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _KEYS:
        raise ConfigError(f"rotary positions of type {kind!r} are not supported; only {', '.join(map(repr, _KEYS))}")
    for key in given:
        if key not in (*_ALWAYS, *_KEYS[kind]) and given[key] is not None and kind != "default":
            raise ConfigError(f"rotary positions of type {kind!r} have no {key} = {given[key]!r}")
    bases = [given.get("rope_theta"), *(config.get(key) for key in ("rope_theta", "rotary_emb_base", "default_theta"))]
    shares = [given.get("partial_rotary_factor"), *(config.get(key) for key in ("partial_rotary_factor", "rotary_pct"))]
    return {
        "base": float(next((base for base in bases if base is not None), 10_000.0)),
        "share": next((share for share in shares if share is not None), None),
        "scaling": _scaling(kind, given, config),
    }


def _scaling(kind: str, given: Mapping[str, Any], config: Any) -> ScalingPart | None:
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=_number(given, "factor"))
    original = (
        config.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    if kind == "llama3":
        return BandScaling(
            factor=_number(given, "factor"),
            original_length=original,
            low=_number(given, "low_freq_factor"),
            high=_number(given, "high_freq_factor"),
        )
    stated = given.get("factor")
    factor = config["max_position_embeddings"] / original if stated is None else float(stated)
    return YaRNScaling(
        factor=factor,
        original_length=original,
        fast=float(given.get("beta_fast") or 32),
        slow=float(given.get("beta_slow") or 1),
        attention=_yarn_attention(given, factor),
        truncate=given.get("truncate", True),
    )


def _yarn_attention(given: Mapping[str, Any], factor: float) -> float | None:
    """The factor of queries and keys where it is not the paper's."""
    if (explicit := given.get("attention_factor")) is not None:
        return float(explicit)
    if given.get("mscale") and given.get("mscale_all_dim"):
        above, below = (
            0.1 * given[key] * math.log(factor) + 1.0 if factor > 1 else 1.0 for key in ("mscale", "mscale_all_dim")
        )
        return above / below
    return None


def _number(given: Mapping[str, Any], key: str) -> float:
    if not isinstance(given.get(key), int | float):
        raise ConfigError(f"rotary positions need the number {key}; there is {given.get(key)!r}")
    return float(given[key])


def rope_keys(positions: PositionsPart) -> dict[str, Any]:
    """The keys of rotary positions, for old versions of transformers and new ones. Raises TypeError for other ones."""
    if type(positions) is not RoPE:
        raise TypeError(f"{positions} are not rotary positions")
    said: dict[str, Any]
    match positions.scaling:
        case None:
            said = {"rope_type": "default"}
        case LinearScaling(factor=factor):
            said = {"rope_type": "linear", "factor": factor}
        case BandScaling(factor=factor, original_length=length, low=low, high=high):
            said = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": length}
            said |= {"low_freq_factor": low, "high_freq_factor": high}
        case YaRNScaling(factor=factor, original_length=length, fast=fast, slow=slow) as yarn:
            said = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
            said |= {"beta_fast": fast, "beta_slow": slow, "truncate": yarn.truncate}
            said |= {} if yarn.attention is None else {"attention_factor": yarn.attention}
        case _:
            raise TypeError(f"transformers does not have {positions.scaling}")
    old = {"rope_theta": positions.base} | ({} if positions.scaling is None else {"rope_scaling": said})
    return {**old, "rope_parameters": {**said, "rope_theta": positions.base}}
