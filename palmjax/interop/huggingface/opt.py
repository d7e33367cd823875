"""OPT: serial pre-norm, or, in the size 350M, post-norm with embeddings narrower than the model."""

from __future__ import annotations

from typing import Any

from palmjax.interop.huggingface.family import Config, Family, activation, activation_name, divided, head
from palmjax.interop.huggingface.gpt import ATTENTION, LAYER, linear, norm
from palmjax.interop.mapping import rule
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, PostNormBlock, SerialBlock
from palmjax.models.embeddings import Embedding, LearnedPositions
from palmjax.models.layers import MLP, LayerNorm
from palmjax.models.positions import NoPositions

OFFSET = 2
"""Rows of the position table before that of the first position."""


def _read(c: Config) -> Decoder:
    # transformers' OPT has no key for epsilon: it is torch's default.
    layer_norm = LayerNorm(epsilon=1e-5, bias=True)
    attention = Attention(
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_attention_heads"],
        head_dim=divided(c, "hidden_size", "num_attention_heads"),
        positions=NoPositions(),
        qkv_bias=c["enable_bias"],
        out_bias=c["enable_bias"],
    )
    mlp = MLP(d_ff=c["ffn_dim"], activation=activation(c, "activation_function"), bias=c["enable_bias"])
    before = c["do_layer_norm_before"]
    block = SerialBlock if before else PostNormBlock
    width = c["word_embed_proj_dim"] or c["hidden_size"]
    return Decoder(
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        d_model=c["hidden_size"],
        block=block(attention=attention, mlp=mlp, norm=layer_norm),
        embedding=Embedding(
            width=None if width == c["hidden_size"] else width,
            positions=LearnedPositions(length=c["max_position_embeddings"], offset=OFFSET),
        ),
        final_norm=layer_norm if before and not c["_remove_final_layer_norm"] else None,
        head=head(c),
    )


def _write(model: Decoder) -> dict[str, Any]:
    block: Any = model.block
    attention, mlp, before = block.attention, block.mlp, isinstance(block, SerialBlock)
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "ffn_dim": mlp.d_ff,
        "max_position_embeddings": model.max_length,
        "word_embed_proj_dim": model.embedding.width or model.d_model,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and model.final_norm is None,
        "enable_bias": attention.qkv_bias,
        "activation_function": activation_name(mlp.activation),
    }


OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    base="model.",
    defaults={
        "word_embed_proj_dim": None,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "activation_function": "relu",
        "tie_word_embeddings": True,
    },
    only={"layer_norm_elementwise_affine": (True,)},
    rules=(
        rule("model.decoder.embed_tokens.weight", "token_embedder/embedding", "v w -> v w"),
        rule("model.decoder.project_in.weight", "token_embedder/project_in/kernel", "d w -> w d"),
        rule("model.decoder.embed_positions.weight", "position_embedder/embedding", "p d -> p d"),
        *norm("model.decoder.layers.{layer}.self_attn_layer_norm", f"{LAYER}/pre_norm"),
        *norm("model.decoder.layers.{layer}.self_attn_layer_norm", f"{LAYER}/attention_norm"),
        *(
            one
            for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
            for one in linear(
                f"model.decoder.layers.{{layer}}.self_attn.{short}_proj",
                f"{ATTENTION}/{name}",
                "(h n) d -> d h n",
                "(h n) -> h n",
            )
        ),
        *linear("model.decoder.layers.{layer}.self_attn.out_proj", f"{ATTENTION}/out", "d (h n) -> h n d", "d -> d"),
        *norm("model.decoder.layers.{layer}.final_layer_norm", f"{LAYER}/mlp_norm"),
        *linear("model.decoder.layers.{layer}.fc1", f"{LAYER}/mlp/wi", "f d -> d f", "f -> f"),
        *linear("model.decoder.layers.{layer}.fc2", f"{LAYER}/mlp/wo", "d f -> f d", "d -> d"),
        *norm("model.decoder.final_layer_norm", "decoder/decoder_norm"),
        rule("model.decoder.project_out.weight", "decoder/logits_dense/project_out/kernel", "w d -> d w"),
        rule("lm_head.weight", "decoder/logits_dense/kernel", "v d -> d v"),
    ),
    read=_read,
    write=_write,
)
