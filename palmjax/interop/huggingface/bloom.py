"""BLOOM: serial pre-norm, ALiBi, a norm behind the embedding."""

from __future__ import annotations

from typing import Any

from palmjax.interop.huggingface.family import Config, Family, divided, head
from palmjax.interop.huggingface.gpt import ATTENTION, LAYER, fused_qkv, linear, norm
from palmjax.interop.mapping import rule
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, SerialBlock
from palmjax.models.embeddings import Embedding
from palmjax.models.layers import MLP, LayerNorm, TanhGELU
from palmjax.models.positions import ALiBi


def _read(c: Config) -> Decoder:
    D, layer_norm = c["hidden_size"], LayerNorm(epsilon=c["layer_norm_epsilon"], bias=True)
    attention = Attention(
        num_heads=c["n_head"],
        num_kv_heads=c["n_head"],
        head_dim=divided(c, "hidden_size", "n_head"),
        positions=ALiBi(),
        qkv_bias=True,
        out_bias=True,
    )
    return Decoder(
        vocab_size=c["vocab_size"],
        num_layers=c["n_layer"],
        d_model=D,
        block=SerialBlock(attention=attention, mlp=MLP(d_ff=4 * D, activation=TanhGELU(), bias=True), norm=layer_norm),
        embedding=Embedding(norm=layer_norm),
        final_norm=layer_norm,
        head=head(c),
    )


def _write(model: Decoder) -> dict[str, Any]:
    block: Any = model.block
    return {
        "hidden_size": model.d_model,
        "n_layer": model.num_layers,
        "n_head": block.attention.num_heads,
        "layer_norm_epsilon": block.norm.epsilon,
    }


BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    base="transformer.",
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    # transformers' slow path leaves out biases.
    only={"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,)},
    rules=(
        rule("transformer.word_embeddings.weight", "token_embedder/embedding", "v d -> v d"),
        *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        *norm("transformer.h.{layer}.input_layernorm", f"{LAYER}/pre_norm"),
        *fused_qkv("transformer.h.{layer}.self_attention.query_key_value"),
        *linear("transformer.h.{layer}.self_attention.dense", f"{ATTENTION}/out", "d (h n) -> h n d", "d -> d"),
        *norm("transformer.h.{layer}.post_attention_layernorm", f"{LAYER}/mlp_norm"),
        *linear("transformer.h.{layer}.mlp.dense_h_to_4h", f"{LAYER}/mlp/wi", "f d -> d f", "f -> f"),
        *linear("transformer.h.{layer}.mlp.dense_4h_to_h", f"{LAYER}/mlp/wo", "d f -> f d", "d -> d"),
        *norm("transformer.ln_f", "decoder/decoder_norm"),
        rule("lm_head.weight", "decoder/logits_dense/kernel", "v d -> d v"),
    ),
    read=_read,
    write=_write,
)
