"""Cohere's Command-R: PaLM's block (parallel, one norm with a scale only, SwiGLU, no biases, tied logits with a scale).

So it is also the form in which a PaLM leaves for transformers. Its rotary positions pair neighbouring dimensions of a
head; the map brings them into palmjax's order, in which a pair is half a head apart.
"""

from __future__ import annotations

from typing import Any

from palmjax.interop.huggingface.family import Config, Family, activation_name, divided, gated, size_keys
from palmjax.interop.huggingface.gpt import ATTENTION, LAYER
from palmjax.interop.huggingface.rotary import rope_keys
from palmjax.interop.mapping import rule
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, ParallelBlock
from palmjax.models.embeddings import TiedHead
from palmjax.models.layers import LayerNorm
from palmjax.models.positions import RoPE


def _read(c: Config) -> Decoder:
    norm = LayerNorm(epsilon=c["layer_norm_eps"])
    attention = Attention(
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=c["head_dim"] or divided(c, "hidden_size", "num_attention_heads"),
        positions=RoPE(base=c["rope"]["base"], scaling=c["rope"]["scaling"]),
    )
    scale = c["logit_scale"]
    return Decoder(
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        d_model=c["hidden_size"],
        block=ParallelBlock(attention=attention, mlp=gated(c, "hidden_act", bias=False), norm=norm),
        final_norm=norm,
        head=TiedHead(logit_scale=None if scale == c["hidden_size"] ** -0.5 else scale),
    )


def _write(model: Decoder) -> dict[str, Any]:
    block: Any = model.block
    head: Any = model.head
    return {
        **size_keys(model),
        "layer_norm_eps": block.norm.epsilon,
        "hidden_act": activation_name(block.mlp.activation, "gelu_pytorch_tanh"),
        "logit_scale": model.d_model**-0.5 if head.logit_scale is None else head.logit_scale,
        **rope_keys(block.attention.positions),
    }


COHERE = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    base="model.",
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "layer_norm_eps": 1e-5,
        "hidden_act": "silu",
        "logit_scale": 0.0625,
        "default_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    only={"attention_bias": (False,), "use_qk_norm": (False,), "tie_word_embeddings": (True,)},
    rules=(
        rule("model.embed_tokens.weight", "token_embedder/embedding", "v d -> v d"),
        rule("model.layers.{layer}.input_layernorm.weight", f"{LAYER}/pre_norm/scale", "d -> d"),
        *(
            rule(f"model.layers.{{layer}}.self_attn.{short}_proj.weight", f"{ATTENTION}/{name}/kernel", pattern)
            for short, name, pattern in (
                ("q", "query", "(h r 2) d -> d h (2 r)"),
                ("k", "key", "(h r 2) d -> d h (2 r)"),
                ("v", "value", "(h n) d -> d h n"),
            )
        ),
        rule("model.layers.{layer}.self_attn.o_proj.weight", f"{ATTENTION}/out/kernel", "d (h n) -> h n d"),
        *(
            rule(f"model.layers.{{layer}}.mlp.{short}_proj.weight", f"{LAYER}/mlp/{name}/kernel", pattern)
            for short, name, pattern in (
                ("gate", "wi_0", "f d -> d f"),
                ("up", "wi_1", "f d -> d f"),
                ("down", "wo", "d f -> f d"),
            )
        ),
        rule("model.norm.weight", "decoder/decoder_norm/scale", "d -> d"),
    ),
    read=_read,
    write=_write,
    ignored=(r"rotary_emb\.inv_freq$",),
)
