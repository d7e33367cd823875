"""Falcon: parallel with one norm (7B) or two (40B, 180B), or serial; multi-query or grouped queries."""

from __future__ import annotations

from typing import Any

from palmjax.config import ConfigError
from palmjax.interop.huggingface.family import Config, Family, activation, activation_name, divided, head
from palmjax.interop.huggingface.gpt import ATTENTION, LAYER, linear, norm
from palmjax.interop.huggingface.rotary import rope_keys
from palmjax.interop.mapping import Piece, Rule, rule
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, ParallelBlock, SerialBlock
from palmjax.models.layers import MLP, LayerNorm
from palmjax.models.positions import RoPE


def _read(c: Config) -> Decoder:
    D, H = c["hidden_size"], c["num_attention_heads"]
    layer_norm = LayerNorm(epsilon=c["layer_norm_epsilon"], bias=True)
    new = c["new_decoder_architecture"]
    attention = Attention(
        num_heads=H,
        num_kv_heads=(c["num_kv_heads"] or H) if new else 1 if c["multi_query"] else H,
        head_dim=divided(c, "hidden_size", "num_attention_heads"),
        positions=RoPE(base=c["rope"]["base"], scaling=c["rope"]["scaling"]),
        qkv_bias=c["bias"],
        out_bias=c["bias"],
    )
    mlp = MLP(d_ff=c["ffn_hidden_size"] or 4 * D, activation=activation(c, "activation"), bias=c["bias"])
    two = new and (c["num_ln_in_parallel_attn"] or 2) == 2
    parallel = ParallelBlock(attention=attention, mlp=mlp, norm=layer_norm, mlp_norm=layer_norm if two else None)
    serial = SerialBlock(attention=attention, mlp=mlp, norm=layer_norm)
    if new and not c["parallel_attn"]:
        raise ConfigError("new_decoder_architecture with parallel_attn = False is no Falcon that was trained")
    return Decoder(
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        d_model=D,
        block=parallel if c["parallel_attn"] else serial,
        final_norm=layer_norm,
        head=head(c),
    )


def _write(model: Decoder) -> dict[str, Any]:
    block: Any = model.block
    attention = block.attention
    two = getattr(block, "mlp_norm", None) is not None
    new = two or 1 < attention.num_kv_heads < attention.num_heads
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "ffn_hidden_size": block.mlp.d_ff,
        "layer_norm_epsilon": block.norm.epsilon,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two else 1) if new else None,
        "multi_query": attention.num_kv_heads == 1,
        "parallel_attn": isinstance(block, ParallelBlock),
        "bias": attention.qkv_bias,
        "alibi": False,
        "activation": activation_name(block.mlp.activation),
        **rope_keys(attention.positions),
    }


def _renamed(model: Decoder) -> dict[str, str]:
    """What the norms are called: with two norms in a parallel block, `ln_attn` and `ln_mlp`."""
    block: Any = model.block
    if isinstance(block, ParallelBlock) and block.mlp_norm is not None:
        return {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
    return {}


# Each key/value head's queries, its key and its value side by side: e = queries a key/value head + 2. Multi-query is
# one such group, multi-head as many as there are heads.
_QKV: tuple[tuple[str, str, str, tuple[int, int]], ...] = (
    ("query", "d (k e) n", "(k e) n", (0, -2)),
    ("key", "d k n", "k n", (-2, -1)),
    ("value", "d k n", "k n", (-1, 0)),
)

FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    base="transformer.",
    defaults={
        "num_kv_heads": None,
        "ffn_hidden_size": None,
        "layer_norm_epsilon": 1e-5,
        "new_decoder_architecture": False,
        "num_ln_in_parallel_attn": None,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "activation": "gelu",
        "alibi": False,
        "tie_word_embeddings": True,
    },
    aliases={"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"},
    # Falcon-RW's ALiBi is divided by sqrt(head_dim) with the scores, which no other family's is.
    only={"alibi": (False,)},
    rules=(
        rule("transformer.word_embeddings.weight", "token_embedder/embedding", "v d -> v d"),
        *norm("transformer.h.{layer}.input_layernorm", f"{LAYER}/pre_norm"),
        *norm("transformer.h.{layer}.post_attention_layernorm", f"{LAYER}/mlp_norm"),
        Rule(
            "transformer.h.{layer}.self_attention.query_key_value.weight",
            tuple(Piece(f"{ATTENTION}/{name}/kernel", f"(k e n) d -> {to}", {"e": at}) for name, to, _, at in _QKV),
        ),
        Rule(
            "transformer.h.{layer}.self_attention.query_key_value.bias",
            tuple(Piece(f"{ATTENTION}/{name}/bias", f"(k e n) -> {to}", {"e": at}) for name, _, to, at in _QKV),
        ),
        *linear("transformer.h.{layer}.self_attention.dense", f"{ATTENTION}/out", "d (h n) -> h n d", "d -> d"),
        *linear("transformer.h.{layer}.mlp.dense_h_to_4h", f"{LAYER}/mlp/wi", "f d -> d f", "f -> f"),
        *linear("transformer.h.{layer}.mlp.dense_4h_to_h", f"{LAYER}/mlp/wo", "d f -> f d", "d -> d"),
        *norm("transformer.ln_f", "decoder/decoder_norm"),
        rule("lm_head.weight", "decoder/logits_dense/kernel", "v d -> d v"),
    ),
    read=_read,
    write=_write,
    renamed=_renamed,
)
