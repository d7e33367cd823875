"""Accounts of the published PaLM sizes, to the last digit where the paper's arithmetic gives one."""

from __future__ import annotations

import dataclasses

import pytest

from palmjax.models import decoder
from palmjax.models.account import account, training_flops
from palmjax.models.attention import Attention
from palmjax.models.embeddings import UntiedHead
from palmjax.models.layers import SwiGLU
from palmjax.models.moe import Experts

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


def test_a_window_bounds_the_keys_that_are_counted():
    """Layers in turn: one sees all of a row's 2,048 tokens, the other 256."""
    config, banded = (
        decoder.Decoder(
            vocab_size=512, num_layers=4, d_model=64, block=decoder.BlockCycle(blocks=(block(), block(window)))
        )
        for window in (None, 256)
    )
    plain, less = account(config, 2048), account(banded, 2048)
    assert plain.parameters == less.parameters
    assert plain.flops_per_token - 6 * plain.parameters == 12 * 4 * 64 * 2048
    assert less.flops_per_token - 6 * less.parameters == 12 * 2 * 64 * (2048 + 256)
    assert account(banded, 128) == account(config, 128)


def block(window: int | None = None) -> decoder.SerialBlock:
    return decoder.SerialBlock(
        attention=Attention(num_heads=4, num_kv_heads=4, head_dim=16, window=window), mlp=SwiGLU(d_ff=64)
    )


def test_a_token_meets_the_experts_that_it_goes_to():
    dense = block()
    sparse = decoder.SerialBlock(attention=dense.attention, mlp=Experts(num_experts=8, top_k=2, expert=SwiGLU(d_ff=64)))
    config = decoder.Decoder(vocab_size=512, num_layers=4, d_model=64, block=decoder.BlockCycle(blocks=(dense, sparse)))
    cost = account(config, 256)
    expert = 3 * 64 * 64
    assert cost.parameters - cost.active_parameters == 2 * (8 - 2) * expert
    assert cost.flops_per_token == 6 * cost.active_parameters + 12 * 4 * 64 * 256
    everything = account(dataclasses.replace(config, remat=decoder.RecomputeAll()), 256)
    blocks = cost.active_parameters - 512 * 64
    assert everything.hardware_flops_per_token - cost.flops_per_token == 2 * blocks + 4 * 4 * 64 * 256


def test_an_untied_head_is_padded_like_the_table_and_not_computed_again():
    config = decoder.Decoder(
        vocab_size=500, num_layers=2, d_model=64, block=block(), head=UntiedHead(bias=True), vocab_multiple=128
    )
    cost = account(config, 256)
    assert cost.vocabulary_padding == 12 * (64 + 64 + 1)
    plain = account(dataclasses.replace(config, vocab_multiple=1), 256)
    assert (plain.parameters, plain.vocabulary_padding) == (cost.parameters, 0)
    again = account(dataclasses.replace(config, remat=decoder.RecomputeAll()), 256).hardware_flops_per_token
    blocks = cost.parameters - 2 * 500 * 64 - 500
    assert again - cost.flops_per_token == 2 * blocks + 4 * 2 * 64 * 256


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
