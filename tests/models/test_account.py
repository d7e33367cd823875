"""Accounts of the published PaLM sizes, to the last digit where the paper's arithmetic gives one."""

from __future__ import annotations

import pytest

from palmjax.models import decoder
from palmjax.models.account import account, training_flops
from palmjax.models.attention import Attention
from palmjax.models.layers import SwiGLU

SIZES = {  # layers, heads, width -> parameters (PaLM table 1; the totals recomputed exactly)
    "8B": (32, 16, 4096, 8_632_012_800),
    "62B": (64, 32, 8192, 62_495_662_080),
    "540B": (118, 48, 18432, 540_356_474_880),
}


def palm(layers: int, heads: int, width: int, **changes) -> decoder.Decoder:
    block = decoder.ParallelBlock(attention=Attention(num_heads=heads, head_dim=256), mlp=SwiGLU(d_ff=4 * width))
    return decoder.Decoder(vocab_size=256_000, num_layers=layers, d_model=width, block=block, **changes)


@pytest.mark.parametrize("size", SIZES)
def test_totals_are_exact_and_padding_is_counted_apart(size):
    layers, heads, width, total = SIZES[size]
    assert account(palm(layers, heads, width), 2048).parameters == total
    padded = account(palm(layers, heads, width, vocab_multiple=1536), 2048)
    assert padded.parameters == total
    assert padded.vocabulary_padding == 512 * width


def test_flops_and_cache_bytes_of_540b():
    layers, heads, width, _ = SIZES["540B"]
    cost = account(palm(layers, heads, width), 2048)
    # PaLM table 22 prints 3.28 TFLOP a token; 540.35e9 parameters give 3.2777.
    assert training_flops(540.35e9, 118, 48, 256, 2048) == pytest.approx(3.2777e12, rel=1e-4)
    assert cost.flops_per_token == pytest.approx(6 * cost.parameters + 12 * 118 * 48 * 256 * 2048)
    assert cost.kv_bytes_per_token == 120_832


def test_rematerialisation_costs_what_it_computes_again():
    layers, heads, width, _ = SIZES["8B"]
    model = account(palm(layers, heads, width), 2048)
    assert model.hardware_flops_per_token == model.flops_per_token
    attention_again = 4 * layers * heads * 256 * 2048
    only_attention = account(palm(layers, heads, width, remat=decoder.RecomputeAttention()), 2048)
    # PaLM table 22, hardware TFLOP a token of 8B: 0.0561.
    assert only_attention.hardware_flops_per_token / 1e12 == pytest.approx(0.0561, abs=1e-4)
    everything = account(palm(layers, heads, width, remat=decoder.RecomputeAll()), 2048)
    blocks = model.parameters - 256_000 * width
    assert everything.hardware_flops_per_token - model.flops_per_token == pytest.approx(2 * blocks + attention_again)
