"""Tiny members of every family, in float32, composed as the files of gin/models compose the published ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palmjax.models.attention import Attention
from palmjax.models.decoder import BlockCycle, Decoder, ParallelBlock, PostNormBlock, SerialBlock
from palmjax.models.embeddings import Embedding, LearnedPositions, MaskedLMHead, TiedHead, TokenTypes, UntiedHead
from palmjax.models.layers import GEGLU, GELU, MLP, LayerNorm, ReLU, RMSNorm, SquaredReLU, SwiGLU
from palmjax.models.moe import Experts
from palmjax.models.parameters import Gaussian
from palmjax.models.positions import (
    ALiBi,
    InterleavedRoPE,
    NoPositions,
    PositionsPart,
    RelativeBuckets,
    RoPE,
    SharedRelativeBuckets,
    TransformerXL,
)

VOCAB = 96
LN = LayerNorm(epsilon=1e-5, bias=True)
RMS = RMSNorm(epsilon=1e-5)
ONE = TiedHead(logit_scale=1.0)


def attention(positions: PositionsPart | None = None, *, bias: bool = True, kv: int = 6, **more: Any) -> Attention:
    """Six heads, no power of two, of 16 dimensions."""
    positions = positions or NoPositions()
    more = {"qkv_bias": bias, "out_bias": bias} | more
    return Attention(num_heads=6, num_kv_heads=kv, head_dim=16, positions=positions, **more)


def decoder(block: Any, **changes: Any) -> Decoder:
    base = {"vocab_size": VOCAB, "num_layers": 2, "d_model": 64, "dtype": "float32", "init": Gaussian(stddev=0.15)}
    return Decoder(**{**base, "block": block, "final_norm": LN, "head": ONE, **changes})


def learned(**more: Any) -> Embedding:
    return Embedding(positions=LearnedPositions(length=128), **more)


MLP_B = MLP(d_ff=128, bias=True)
BUCKETS = RelativeBuckets(num_buckets=8, max_distance=16)
EXPERTS = Experts(num_experts=4, expert=MLP(d_ff=32), capacity_factor=4.0)


def gpt3(*blocks: Attention) -> BlockCycle:
    return BlockCycle(blocks=tuple(SerialBlock(attention=a, mlp=MLP_B, norm=LN) for a in blocks))


def glam(experts: Experts, positions: PositionsPart = BUCKETS) -> BlockCycle:
    a = attention(positions, bias=False)
    dense = SerialBlock(attention=a, mlp=GEGLU(d_ff=96), norm=RMS)
    return BlockCycle(blocks=(dense, SerialBlock(attention=a, mlp=experts, norm=RMS)))


FAMILIES: dict[str, Decoder] = {
    "gpt2": decoder(SerialBlock(attention=attention(), mlp=MLP_B, norm=LN), embedding=learned(), vocab_multiple=40),
    "gpt3": decoder(gpt3(attention(), attention(window=5)), embedding=learned(), num_layers=4),
    "gopher": decoder(
        SerialBlock(attention=attention(TransformerXL(), bias=False), mlp=MLP(d_ff=96), norm=RMS), final_norm=RMS
    ),
    "glam": decoder(glam(EXPERTS), final_norm=RMS),
    "opt": decoder(
        SerialBlock(attention=attention(), mlp=MLP(d_ff=128, bias=True, activation=ReLU()), norm=LN),
        embedding=Embedding(positions=LearnedPositions(length=128, offset=2)),
    ),
    "opt_350m": decoder(
        PostNormBlock(attention=attention(), mlp=MLP(d_ff=128, bias=True, activation=ReLU()), norm=LN),
        embedding=Embedding(width=40, positions=LearnedPositions(length=128, offset=2)),
        final_norm=None,
    ),
    "bloom": decoder(SerialBlock(attention=attention(ALiBi()), mlp=MLP_B, norm=LN), embedding=Embedding(norm=LN)),
    "falcon_7b": decoder(
        ParallelBlock(attention=attention(RoPE(), bias=False, kv=1), mlp=MLP(d_ff=128, activation=GELU()), norm=LN)
    ),
    "falcon_40b": decoder(
        ParallelBlock(
            attention=attention(RoPE(), bias=False, kv=2), mlp=MLP(d_ff=128, activation=GELU()), norm=LN, mlp_norm=LN
        )
    ),
    "gpt_j": decoder(
        ParallelBlock(attention=attention(InterleavedRoPE(dims=8), bias=False), mlp=MLP_B, norm=LN),
        head=UntiedHead(bias=True),
    ),
    "gpt_neox": decoder(
        ParallelBlock(attention=attention(RoPE(dims=4)), mlp=MLP_B, norm=LN, mlp_norm=LN), head=UntiedHead()
    ),
    "llama": decoder(
        SerialBlock(attention=attention(RoPE(base=500.0), bias=False), mlp=SwiGLU(d_ff=88), norm=RMS),
        final_norm=RMS,
        head=UntiedHead(),
    ),
    "mistral": decoder(
        SerialBlock(attention=attention(RoPE(), bias=False, kv=2, window=6), mlp=SwiGLU(d_ff=88), norm=RMS),
        final_norm=RMS,
        head=UntiedHead(),
        vocab_multiple=40,
    ),
    "t5": decoder(
        SerialBlock(
            attention=attention(SharedRelativeBuckets(num_buckets=8, max_distance=16), bias=False, scale=1.0),
            mlp=GEGLU(d_ff=96),
            norm=RMS,
        ),
        final_norm=RMS,
        head=TiedHead(),
    ),
    "capped": decoder(
        SerialBlock(
            attention=attention(RoPE(), bias=False, soft_cap=2.0),
            mlp=MLP(d_ff=96, activation=SquaredReLU()),
            norm=RMS,
        ),
        final_norm=RMS,
        head=TiedHead(logit_scale=1.0, soft_cap=3.0),
        embedding=Embedding(scale=8.0),
    ),
    "gated_experts": decoder(
        SerialBlock(
            attention=attention(RoPE(), bias=False, qkv_bias=True),
            mlp=Experts(num_experts=4, expert=SwiGLU(d_ff=32), top_k=1, capacity_factor=4.0),
            norm=RMS,
        ),
        final_norm=RMS,
    ),
}
"""Decoders; experts have room for every token, so that a cache gives what whole rows give."""

BERT = decoder(
    PostNormBlock(attention=attention(causal=False), mlp=MLP(d_ff=128, bias=True, activation=GELU()), norm=LN),
    embedding=learned(types=TokenTypes(), norm=LN),
    final_norm=None,
    head=MaskedLMHead(),
)


def parameters(config: Decoder, seed: int = 0) -> Any:
    """Fresh parameters with every scale away from one and every bias away from zero, so that a forgotten one shows."""
    params = jax.jit(config.build().init)(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def moved(path: Any, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        away = rng.uniform(-0.5, 0.5, leaf.shape) if name == "scale" or name.endswith("bias") else 0.0
        return leaf + jnp.asarray(away, jnp.float32)

    return jax.tree_util.tree_map_with_path(moved, params)
