"""GPT-2, GPT-J and GPT-NeoX."""

from __future__ import annotations

from typing import Any

from palmjax.interop.huggingface.family import Config, Family, activation, activation_name, divided, head
from palmjax.interop.huggingface.rotary import rope_keys
from palmjax.interop.mapping import Piece, Rule, rule
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, ParallelBlock, SerialBlock
from palmjax.models.embeddings import Embedding, LearnedPositions
from palmjax.models.layers import MLP, LayerNorm
from palmjax.models.positions import InterleavedRoPE, NoPositions, RoPE

LAYER = "decoder/layers"
ATTENTION = f"{LAYER}/self_attention"


def norm(tensor: str, parameter: str) -> tuple[Rule, Rule]:
    """A LayerNorm with a bias."""
    return (
        rule(f"{tensor}.weight", f"{parameter}/scale", "d -> d"),
        rule(f"{tensor}.bias", f"{parameter}/bias", "d -> d"),
    )


def fused_qkv(tensor: str) -> tuple[Rule, Rule]:
    """Query, key and value of each head side by side (Megatron's order): BLOOM and GPT-NeoX."""
    names = enumerate(("query", "key", "value"))
    pieces = [(f"{ATTENTION}/{name}", {"3": (i, i + 1)}) for i, name in names]
    return (
        Rule(f"{tensor}.weight", tuple(Piece(f"{name}/kernel", "(h 3 n) d -> d h n", at) for name, at in pieces)),
        Rule(f"{tensor}.bias", tuple(Piece(f"{name}/bias", "(h 3 n) -> h n", at) for name, at in pieces)),
    )


def linear(tensor: str, parameter: str, pattern: str, bias: str) -> tuple[Rule, Rule]:
    """A kernel and a bias."""
    return (
        rule(f"{tensor}.weight", f"{parameter}/kernel", pattern),
        rule(f"{tensor}.bias", f"{parameter}/bias", bias),
    )


# --- GPT-2: Conv1D kernels, [in, out] as palmjax has them ----------------------------------------------------------

_QKV = [(f"{ATTENTION}/{name}", {"3": (i, i + 1)}) for i, name in enumerate(("query", "key", "value"))]


def _read_gpt2(c: Config) -> Decoder:
    D, layer_norm = c["n_embd"], LayerNorm(epsilon=c["layer_norm_epsilon"], bias=True)
    attention = Attention(
        num_heads=c["n_head"],
        num_kv_heads=c["n_head"],
        head_dim=divided(c, "n_embd", "n_head"),
        positions=NoPositions(),
        qkv_bias=True,
        out_bias=True,
        scale=None if c["scale_attn_weights"] else 1.0,
    )
    mlp = MLP(d_ff=c["n_inner"] or 4 * D, activation=activation(c, "activation_function"), bias=True)
    return Decoder(
        vocab_size=c["vocab_size"],
        num_layers=c["n_layer"],
        d_model=D,
        block=SerialBlock(attention=attention, mlp=mlp, norm=layer_norm),
        embedding=Embedding(positions=LearnedPositions(length=c["n_positions"])),
        final_norm=layer_norm,
        head=head(c),
    )


def _write_gpt2(model: Decoder) -> dict[str, Any]:
    block: Any = model.block
    return {
        "n_embd": model.d_model,
        "n_layer": model.num_layers,
        "n_head": block.attention.num_heads,
        "n_inner": block.mlp.d_ff,
        "n_positions": model.max_length,
        "scale_attn_weights": block.attention.scale is None,
        "layer_norm_epsilon": block.norm.epsilon,
        "activation_function": activation_name(block.mlp.activation),
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    base="transformer.",
    defaults={
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    aliases={
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
    },
    only={
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    rules=(
        rule("transformer.wte.weight", "token_embedder/embedding", "v d -> v d"),
        rule("transformer.wpe.weight", "position_embedder/embedding", "p d -> p d"),
        *norm("transformer.h.{layer}.ln_1", f"{LAYER}/pre_norm"),
        Rule(
            "transformer.h.{layer}.attn.c_attn.weight",
            tuple(Piece(f"{name}/kernel", "d (3 h n) -> d h n", at) for name, at in _QKV),
        ),
        Rule(
            "transformer.h.{layer}.attn.c_attn.bias",
            tuple(Piece(f"{name}/bias", "(3 h n) -> h n", at) for name, at in _QKV),
        ),
        *linear("transformer.h.{layer}.attn.c_proj", f"{ATTENTION}/out", "(h n) d -> h n d", "d -> d"),
        *norm("transformer.h.{layer}.ln_2", f"{LAYER}/mlp_norm"),
        *linear("transformer.h.{layer}.mlp.c_fc", f"{LAYER}/mlp/wi", "d f -> d f", "f -> f"),
        *linear("transformer.h.{layer}.mlp.c_proj", f"{LAYER}/mlp/wo", "f d -> f d", "d -> d"),
        *norm("transformer.ln_f", "decoder/decoder_norm"),
        rule("lm_head.weight", "decoder/logits_dense/kernel", "v d -> d v"),
    ),
    read=_read_gpt2,
    write=_write_gpt2,
    ignored=(r"\.attn\.(bias|masked_bias)$",),
)


# --- GPT-J: parallel, one norm, interleaved rotary positions on a part of each head --------------------------------


def _read_gptj(c: Config) -> Decoder:
    D, layer_norm = c["n_embd"], LayerNorm(epsilon=c["layer_norm_epsilon"], bias=True)
    head_dim, dims = divided(c, "n_embd", "n_head"), c["rotary_dim"]
    attention = Attention(
        num_heads=c["n_head"],
        num_kv_heads=c["n_head"],
        head_dim=head_dim,
        positions=InterleavedRoPE(dims=None if dims in (None, head_dim) else dims),
    )
    mlp = MLP(d_ff=c["n_inner"] or 4 * D, activation=activation(c, "activation_function"), bias=True)
    return Decoder(
        vocab_size=c["vocab_size"],
        num_layers=c["n_layer"],
        d_model=D,
        block=ParallelBlock(attention=attention, mlp=mlp, norm=layer_norm),
        final_norm=layer_norm,
        head=head(c, bias=True),
    )


def _write_gptj(model: Decoder) -> dict[str, Any]:
    block: Any = model.block
    positions = block.attention.positions
    return {
        "n_embd": model.d_model,
        "n_layer": model.num_layers,
        "n_head": block.attention.num_heads,
        "n_inner": block.mlp.d_ff,
        "rotary_dim": positions.dims or block.attention.head_dim,
        "layer_norm_epsilon": block.norm.epsilon,
        "activation_function": activation_name(block.mlp.activation),
    }


GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    base="transformer.",
    defaults={
        "n_inner": None,
        "rotary_dim": 64,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    },
    aliases=GPT2.aliases,
    only={"tie_word_embeddings": (False,), "rotary": (True,)},
    rules=(
        rule("transformer.wte.weight", "token_embedder/embedding", "v d -> v d"),
        *norm("transformer.h.{layer}.ln_1", f"{LAYER}/pre_norm"),
        *(
            rule(f"transformer.h.{{layer}}.attn.{short}_proj.weight", f"{ATTENTION}/{name}/kernel", "(h n) d -> d h n")
            for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
        ),
        rule("transformer.h.{layer}.attn.out_proj.weight", f"{ATTENTION}/out/kernel", "d (h n) -> h n d"),
        *linear("transformer.h.{layer}.mlp.fc_in", f"{LAYER}/mlp/wi", "f d -> d f", "f -> f"),
        *linear("transformer.h.{layer}.mlp.fc_out", f"{LAYER}/mlp/wo", "d f -> f d", "d -> d"),
        *norm("transformer.ln_f", "decoder/decoder_norm"),
        *linear("lm_head", "decoder/logits_dense", "v d -> d v", "v -> v"),
    ),
    read=_read_gptj,
    write=_write_gptj,
    ignored=(r"\.attn\.(bias|masked_bias|embed_positions)$",),
)


# --- GPT-NeoX: parallel with two norms or serial, rotary positions on a part of each head --------------------------


def _read_gpt_neox(c: Config) -> Decoder:
    layer_norm = LayerNorm(epsilon=c["layer_norm_eps"], bias=True)
    head_dim = divided(c, "hidden_size", "num_attention_heads")
    dims = int(head_dim * (0.25 if c["rope"]["share"] is None else c["rope"]["share"]))
    attention = Attention(
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_attention_heads"],
        head_dim=head_dim,
        positions=RoPE(base=c["rope"]["base"], dims=None if dims == head_dim else dims, scaling=c["rope"]["scaling"]),
        qkv_bias=c["attention_bias"],
        out_bias=c["attention_bias"],
    )
    mlp = MLP(d_ff=c["intermediate_size"], activation=activation(c, "hidden_act"), bias=True)
    parallel = ParallelBlock(attention=attention, mlp=mlp, norm=layer_norm, mlp_norm=layer_norm)
    serial = SerialBlock(attention=attention, mlp=mlp, norm=layer_norm)
    return Decoder(
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        d_model=c["hidden_size"],
        block=parallel if c["use_parallel_residual"] else serial,
        final_norm=layer_norm,
        head=head(c),
    )


def _write_gpt_neox(model: Decoder) -> dict[str, Any]:
    block: Any = model.block
    attention = block.attention
    keys = rope_keys(attention.positions)
    share = (attention.positions.dims or attention.head_dim) / attention.head_dim
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "intermediate_size": block.mlp.d_ff,
        "layer_norm_eps": block.norm.epsilon,
        "hidden_act": activation_name(block.mlp.activation),
        "attention_bias": attention.qkv_bias,
        "use_parallel_residual": isinstance(block, ParallelBlock),
        **keys,
        "rotary_emb_base": keys["rope_theta"],
        "rotary_pct": share,
        "rope_parameters": keys["rope_parameters"] | {"partial_rotary_factor": share},
    }


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    base="gpt_neox.",
    defaults={
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    only={},
    rules=(
        rule("gpt_neox.embed_in.weight", "token_embedder/embedding", "v d -> v d"),
        *norm("gpt_neox.layers.{layer}.input_layernorm", f"{LAYER}/pre_norm"),
        *norm("gpt_neox.layers.{layer}.post_attention_layernorm", f"{LAYER}/mlp_norm"),
        *fused_qkv("gpt_neox.layers.{layer}.attention.query_key_value"),
        *linear("gpt_neox.layers.{layer}.attention.dense", f"{ATTENTION}/out", "d (h n) -> h n d", "d -> d"),
        *linear("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", f"{LAYER}/mlp/wi", "f d -> d f", "f -> f"),
        *linear("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", f"{LAYER}/mlp/wo", "d f -> f d", "d -> d"),
        *norm("gpt_neox.final_layer_norm", "decoder/decoder_norm"),
        rule("embed_out.weight", "decoder/logits_dense/kernel", "v d -> d v"),
    ),
    read=_read_gpt_neox,
    write=_write_gpt_neox,
    ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
)
