"""LLaMA, Mistral and Qwen2: serial, RMSNorm, rotary positions, SwiGLU, grouped queries. Many share the layout."""

from __future__ import annotations

import dataclasses
from typing import Any

from palmjax.config import ConfigError
from palmjax.interop.huggingface.family import Config, Family, activation_name, divided, gated, head, size_keys
from palmjax.interop.huggingface.gpt import ATTENTION, LAYER, linear
from palmjax.interop.huggingface.rotary import rope_keys
from palmjax.interop.mapping import rule
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, SerialBlock
from palmjax.models.layers import RMSNorm
from palmjax.models.positions import RoPE


def _model(c: Config, *, window: int | None, qkv_bias: bool, out_bias: bool) -> Decoder:
    rms_norm = RMSNorm(epsilon=c["rms_norm_eps"])
    attention = Attention(
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=c["head_dim"] or divided(c, "hidden_size", "num_attention_heads"),
        positions=RoPE(base=c["rope"]["base"], scaling=c["rope"]["scaling"]),
        window=window,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
    )
    if c["rope"]["share"] not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor = {c['rope']['share']} is not supported; heads are rotated whole")
    return Decoder(
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        d_model=c["hidden_size"],
        block=SerialBlock(attention=attention, mlp=gated(c, "hidden_act", bias=c["mlp_bias"]), norm=rms_norm),
        final_norm=rms_norm,
        head=head(c),
    )


def _read(c: Config) -> Decoder:
    return _model(c, window=c["sliding_window"], qkv_bias=c["attention_bias"], out_bias=c["attention_bias"])


def _write(model: Decoder) -> dict[str, Any]:
    block: Any = model.block
    attention = block.attention
    return {
        **size_keys(model),
        "rms_norm_eps": block.norm.epsilon,
        "hidden_act": activation_name(block.mlp.activation, "gelu_pytorch_tanh"),
        "attention_bias": attention.qkv_bias,
        "mlp_bias": block.mlp.bias,
        "sliding_window": attention.window,
        **rope_keys(attention.positions),
    }


def _write_llama(model: Decoder) -> dict[str, Any]:
    written = _write(model)
    if written.pop("sliding_window") is not None:
        raise TypeError("LLaMA has no window")
    return written


def _write_mistral(model: Decoder) -> dict[str, Any]:
    written = _write(model)
    if written.pop("attention_bias") or written.pop("mlp_bias"):
        raise TypeError("Mistral has no biases")
    return written


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    base="model.",
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    # pretraining_tp only changes in which order transformers multiplies.
    only={"sliding_window": (None,)},
    rules=(
        rule("model.embed_tokens.weight", "token_embedder/embedding", "v d -> v d"),
        rule("model.layers.{layer}.input_layernorm.weight", f"{LAYER}/pre_norm/scale", "d -> d"),
        *(
            one
            for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
            for one in linear(
                f"model.layers.{{layer}}.self_attn.{short}_proj",
                f"{ATTENTION}/{name}",
                "(h n) d -> d h n",
                "(h n) -> h n",
            )
        ),
        *linear("model.layers.{layer}.self_attn.o_proj", f"{ATTENTION}/out", "d (h n) -> h n d", "d -> d"),
        rule("model.layers.{layer}.post_attention_layernorm.weight", f"{LAYER}/mlp_norm/scale", "d -> d"),
        *(
            one
            for short, name in (("gate", "wi_0"), ("up", "wi_1"))
            for one in linear(f"model.layers.{{layer}}.mlp.{short}_proj", f"{LAYER}/mlp/{name}", "f d -> d f", "f -> f")
        ),
        *linear("model.layers.{layer}.mlp.down_proj", f"{LAYER}/mlp/wo", "d f -> f d", "d -> d"),
        rule("model.norm.weight", "decoder/decoder_norm/scale", "d -> d"),
        rule("lm_head.weight", "decoder/logits_dense/kernel", "v d -> d v"),
    ),
    read=_read,
    write=_write_llama,
    ignored=(r"rotary_emb\.inv_freq$",),
)

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    # transformers' class has a window of 4096 where a config.json says nothing.
    defaults=dict(LLAMA.defaults) | {"sliding_window": 4096, "num_key_value_heads": 8},
    only={"attention_bias": (False,), "mlp_bias": (False,)},
    write=_write_mistral,
)


# --- Qwen2: biases of queries, keys and values; a window for the layers from max_window_layers on ------------------


def _read_qwen2(c: Config) -> Decoder:
    window, first = c["sliding_window"], c["max_window_layers"]
    layers, kinds = c["num_hidden_layers"], set(c["layer_types"] or ())
    if not kinds and c["use_sliding_window"] and window is not None and first < layers:
        kinds = {"sliding_attention"} | ({"full_attention"} if first > 0 else set())
    if len(kinds) > 1:
        raise ConfigError(f"layers of different windows are not supported: max_window_layers = {first} of {layers}")
    sliding = kinds == {"sliding_attention"}
    return _model(c, window=window if sliding else None, qkv_bias=True, out_bias=False)


def _write_qwen2(model: Decoder) -> dict[str, Any]:
    written = _write(model)
    for key in ("attention_bias", "mlp_bias"):  # transformers' class has no such keys
        del written[key]
    window = written.pop("sliding_window")
    if window is None:
        return written
    kinds = ["sliding_attention"] * model.num_layers
    return written | {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": 0,
        "layer_types": kinds,
    }


QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=dict(LLAMA.defaults)
    | {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28, "layer_types": None},
    only={"attention_bias": (False,), "mlp_bias": (False,)},
    read=_read_qwen2,
    write=_write_qwen2,
)
