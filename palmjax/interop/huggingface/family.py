"""What a family of Hugging Face models is to palmjax: a name map and two functions between configurations.

`read` gives the palmjax model of a `config.json`, `write` the `config.json` of a palmjax model; a model belongs to a
family exactly if reading what was written gives it back. `families.py` lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from palmjax.config import ConfigError
from palmjax.interop.mapping import Rule, Tensor, leaves, plan
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder
from palmjax.models.embeddings import HeadPart, TiedHead, UntiedHead
from palmjax.models.parameters import FanIn
from palmjax.models.positions import PositionsPart, RoPE

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    architecture: the class in transformers. base: prefix of the tensors' names, which files without a head leave out.
    defaults: of keys that a config.json may leave out, as transformers' own class has them. aliases: other names of
    keys. only: keys that change the model in ways palmjax does not have, with the values that do not. ignored: patterns
    of tensors that are no parameters (masks and frequencies that old versions stored). renamed: parts of the rules'
    names that a variant calls otherwise.
    """

    model_type: str
    architecture: str
    base: str
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    rules: tuple[Rule, ...]
    read: Callable[[Config], Decoder]
    write: Callable[[Decoder], dict[str, Any]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    renamed: Callable[[Decoder], Mapping[str, str]] = lambda model: {}

    def plan(self, model: Decoder) -> dict[str, Tensor]:
        """The tensors of a model by transformers' names. Raises ConfigError for a parameter that has none."""
        shapes = parameter_shapes(model)
        renamed, rules = self.renamed(model), []
        for one in self.rules:
            name = one.tensor
            for old, new in renamed.items():
                name = name.replace(old, new)
            rules.append(Rule(name, one.pieces))
        attention = model.attention
        groups = attention.num_heads // attention.num_kv_heads
        return plan(rules, shapes, {"k": attention.num_kv_heads, "e": groups + 2}, self.architecture)

    def complete(self, config: Config, where: str) -> dict[str, Any]:
        """`config` with defaults and usual names. Raises ConfigError for what palmjax does not have."""
        renamed = {self.aliases.get(key, key): value for key, value in config.items()}
        whole = dict(self.defaults) | {key: value for key, value in renamed.items() if key in renamed}
        for key, accepted in self.only.items():
            if key in whole and whole[key] not in accepted:
                known = " or ".join(repr(value) for value in accepted)
                raise ConfigError(
                    f"{where}: {key} = {whole[key]!r} is not supported for {self.model_type}; only {known}"
                )
        whole["rope"] = _rope(whole, where)
        return whole

    def model(self, config: Config, where: str) -> Decoder:
        """The palmjax model of a config.json. Raises ConfigError, naming file and key, if there is none."""
        whole = self.complete(config, where)
        try:
            model = self.read(whole)
        except KeyError as error:
            raise ConfigError(f"{where}: {error.args[0]} is missing; {self.model_type} needs it") from error
        except (TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"{where}: not the configuration of a {self.model_type} model: {error}") from error
        bfloat16 = config.get("dtype", config.get("torch_dtype")) in ("bfloat16", "float16")
        return dataclasses.replace(model, dtype="bfloat16" if bfloat16 else "float32")

    def config(self, model: Decoder) -> dict[str, Any] | None:
        """The config.json of a palmjax model, or None if the family has no such model."""
        plain = architecture(model)
        try:
            written = self.write(plain) | {"model_type": self.model_type, "architectures": [self.architecture]}
            written |= {"vocab_size": model.vocab_size, "tie_word_embeddings": model.head.tied}
            back = architecture(self.model(written, "the model"))
        except (ConfigError, AttributeError, KeyError, TypeError):
            return None
        return written if back == plain else None


def architecture(model: Decoder) -> Decoder:
    """`model` without what does not change its function: dtype, what is recomputed, initializers, padding, kernels."""
    same = {"dtype": "float32", "remat": None, "unroll": 1, "dropout": 0.0, "init": FanIn(), "vocab_multiple": 1}
    if any(not isinstance(layer.attention, Attention) for layer in model.block.layers):
        return dataclasses.replace(model, **same)
    attention: Any = model.attention
    block: Any = model.block
    if hasattr(block, "attention"):
        scale = None if attention.scale == attention.head_dim**-0.5 else attention.scale
        block = dataclasses.replace(block, attention=dataclasses.replace(attention, impl="auto", scale=scale))
    return dataclasses.replace(model, block=block, **same)


def parameter_shapes(model: Decoder) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every parameter by path, without the padding of the vocabulary, which no other stack has."""
    built = model.build()
    axes = leaves(built.axes)
    return {
        path: tuple(
            model.vocab_size if name == "vocab" else size for name, size in zip(axes[path], leaf.shape, strict=True)
        )
        for path, leaf in leaves(built.abstract_params()).items()
    }


# --- what the families' configurations have in common --------------------------------------------------------------


def _rope(config: Config, where: str) -> dict[str, Any]:
    """`base` and `share` (rotated part of a head, None where the family says it otherwise) of any version's keys."""
    given = dict(config.get("rope_parameters") or {})
    scaling = config.get("rope_scaling") or {}
    kind = given.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise ConfigError(f"{where}: rotary positions of type {kind!r} are not supported; only 'default'")
    base = given.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 10_000.0)))
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    return {"base": float(base), "share": share}


def rope_keys(positions: PositionsPart) -> dict[str, Any]:
    """The keys of rotary positions, for old versions of transformers and new ones. Raises TypeError for other ones."""
    if not isinstance(positions, RoPE):
        raise TypeError(f"{positions} are not rotary positions")
    return {
        "rope_theta": positions.base,
        "rope_parameters": {"rope_type": "default", "rope_theta": positions.base},
    }


def head(config: Config, bias: bool = False) -> HeadPart:
    """Tied without a scale, or untied."""
    return TiedHead(logit_scale=1.0) if config["tie_word_embeddings"] else UntiedHead(bias=bias)


def divided(config: Config, whole: str, parts: str) -> int:
    """`config[whole] / config[parts]`. Raises ConfigError if that is no whole number."""
    if config[whole] % config[parts]:
        raise ConfigError(f"{whole} = {config[whole]} is not a multiple of {parts} = {config[parts]}")
    return config[whole] // config[parts]
