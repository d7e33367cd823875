"""What a family of Hugging Face models is to palmjax: a name map and two functions between configurations.

`read` gives the palmjax model of a `config.json`, `write` the `config.json` of a palmjax model; a model belongs to a
family exactly if reading what was written gives it back. `families.py` lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palmjax.config import ConfigError
from palmjax.interop.huggingface import keys
from palmjax.interop.huggingface.keys import REFUSED, Read
from palmjax.interop.huggingface.rotary import rope
from palmjax.interop.mapping import Rule, Tensor, leaves, plan
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder
from palmjax.models.embeddings import HeadPart, TiedHead, UntiedHead
from palmjax.models.layers import (
    GEGLU,
    GELU,
    ActivationPart,
    FeedForwardPart,
    ReLU,
    SiLU,
    SquaredReLU,
    SwiGLU,
    TanhGELU,
)
from palmjax.models.parameters import FanIn

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
        sizes = {"k": attention.num_kv_heads, "e": groups + 2, "r": attention.head_dim // 2}
        return plan(rules, shapes, sizes, self.architecture)

    def complete(self, config: Config, where: str) -> Read:
        """`config` with defaults and usual names. Raises ConfigError for what palmjax does not have."""
        whole = Read(dict(self.defaults) | {self.aliases.get(key, key): value for key, value in config.items()})
        for key, accepted in {**REFUSED, **self.only}.items():
            if key in whole and whole[key] not in accepted:
                known = " or ".join(repr(value) for value in accepted)
                raise ConfigError(
                    f"{where}: {key} = {whole[key]!r} is not supported for {self.model_type}; only {known}"
                )
        return whole

    def model(self, config: Config, where: str, ignored: Sequence[str] | None = ()) -> Decoder:
        """The palmjax model of a config.json. Raises ConfigError, naming file and key, if there is none.

        ignored: keys that may stand there though nobody knows their meaning; None for any.
        """
        whole = self.complete(config, where)
        try:
            whole["rope"] = rope(whole)
            model = self.read(whole)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except KeyError as error:
            raise ConfigError(f"{where}: {error.args[0]} is missing; {self.model_type} needs it") from error
        except (TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"{where}: not the configuration of a {self.model_type} model: {error}") from error
        known = whole.seen | set(self.defaults) | set(self.only) | set(self.aliases)
        if ignored is not None and (left := keys.unknown(config, {*known, *ignored})):
            raise ConfigError(
                f"{where}: nothing is known of the key {left[0]} = {config[left[0]]!r} in a {self.model_type} model; "
                f"if it changes nothing in the function it computes: --ignore {' '.join(left)}"
            )
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


def head(config: Config, bias: bool = False) -> HeadPart:
    """Tied without a scale, or untied."""
    return TiedHead(logit_scale=1.0) if config["tie_word_embeddings"] else UntiedHead(bias=bias)


def divided(config: Config, whole: str, parts: str) -> int:
    """`config[whole] / config[parts]`. Raises ConfigError if that is no whole number."""
    if config[whole] % config[parts]:
        raise ConfigError(f"{whole} = {config[whole]} is not a multiple of {parts} = {config[parts]}")
    return config[whole] // config[parts]


def size_keys(model: Decoder) -> dict[str, Any]:
    """The keys of a `config.json` for widths and counts, by the names that LLaMA's relatives share.

    Raises AttributeError for a block without one attention and one feed-forward layer, which no such family has.
    """
    block: Any = model.block
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": block.attention.num_heads,
        "num_key_value_heads": block.attention.num_kv_heads,
        "head_dim": block.attention.head_dim,
        "intermediate_size": block.mlp.d_ff,
    }


ACTIVATIONS: Mapping[str, ActivationPart] = {
    "gelu": GELU(),
    "gelu_python": GELU(),
    "gelu_new": TanhGELU(),
    "gelu_pytorch_tanh": TanhGELU(),
    "gelu_fast": TanhGELU(),
    "relu": ReLU(),
    "relu2": SquaredReLU(),
    "silu": SiLU(),
    "swish": SiLU(),
}
"""Activations by transformers' names, of those with several the usual one first."""


def activation(config: Config, key: str) -> ActivationPart:
    """The activation that `config[key]` names. Raises ConfigError if palmjax does not have it."""
    if config[key] not in ACTIVATIONS:
        raise ConfigError(f"{key} = {config[key]!r} is not supported; only {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[config[key]]


def activation_name(part: ActivationPart, tanh: str = "gelu_new") -> str:
    """transformers' name of an activation. tanh: the family's usual one of the tanh GELUs, which differ in rounding."""
    return tanh if part == TanhGELU() else next(name for name, one in ACTIVATIONS.items() if one == part)


def gated(config: Config, key: str, bias: bool) -> FeedForwardPart:
    """A gated feed-forward layer of `intermediate_size`, whose gate has the activation `config[key]`."""
    gate, width = activation(config, key), config["intermediate_size"]
    if isinstance(gate, GELU | TanhGELU):
        return GEGLU(d_ff=width, activation=gate, bias=bias)
    return SwiGLU(d_ff=width, activation=gate, bias=bias)
