"""PaLM's block against an implementation of somebody else's: transformers' Cohere with one key/value head is that block
(attention and SwiGLU in parallel behind one LayerNorm without bias, multi-query, rotary positions, tied embeddings).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from palmjax.evaluation.run import Scorer
from palmjax.evaluation.schedule import Request
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, ParallelBlock
from palmjax.models.embeddings import TiedHead
from palmjax.models.layers import LayerNorm, SwiGLU
from palmjax.models.positions import InterleavedRoPE

VOCAB, LAYERS, D, H, F = 97, 3, 64, 4, 96


def theirs() -> Any:
    config = transformers.CohereConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=H,
        num_key_value_heads=1,
        logit_scale=D**-0.5,
        layer_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = transformers.CohereForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.2 * noise)
        model.model.embed_tokens.weight.mul_(5)
    return model


def ours(model: Any) -> tuple[Any, Any]:
    """PaLM as palmjax composes it, with Cohere's weights."""
    base = model.config.rope_parameters["rope_theta"]
    attention = Attention(num_heads=H, num_kv_heads=1, head_dim=D // H, positions=InterleavedRoPE(base=base))
    block = ParallelBlock(attention=attention, mlp=SwiGLU(d_ff=F), norm=LayerNorm(epsilon=1e-5))
    config = Decoder(
        vocab_size=VOCAB,
        num_layers=LAYERS,
        d_model=D,
        dtype="float32",
        block=block,
        final_norm=LayerNorm(epsilon=1e-5),
        head=TiedHead(),
    )
    state = {name: value.numpy() for name, value in model.state_dict().items()}

    def stacked(name: str, shape: tuple[int, ...] | None = None) -> Any:
        """Of all layers; matrices transposed to (in, out)."""
        layers = [state[f"model.layers.{layer}.{name}.weight"] for layer in range(LAYERS)]
        return jnp.asarray(np.stack([x.T.reshape(shape or x.T.shape) for x in layers]))

    def kernel(name: str, shape: tuple[int, ...] | None = None) -> Any:
        return {"kernel": stacked(name, shape)}

    layers = {
        "pre_norm": {"scale": stacked("input_layernorm")},
        "self_attention": {
            "query": kernel("self_attn.q_proj", (D, H, D // H)),
            "key": kernel("self_attn.k_proj", (D, 1, D // H)),
            "value": kernel("self_attn.v_proj", (D, 1, D // H)),
            "out": kernel("self_attn.o_proj", (H, D // H, D)),
        },
        "mlp": {"wi_0": kernel("mlp.gate_proj"), "wi_1": kernel("mlp.up_proj"), "wo": kernel("mlp.down_proj")},
    }
    norm = {"scale": jnp.asarray(state["model.norm.weight"])}
    table = {"embedding": jnp.asarray(state["model.embed_tokens.weight"])}
    return config.build(), {"decoder": {"layers": layers, "decoder_norm": norm}, "token_embedder": table}


def test_log_likelihoods_are_those_of_cohere() -> None:
    model = theirs()
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (5, 3), (40, 9), (60, 60)]
    requests = [Request(*(tuple(rng.integers(0, VOCAB, n).tolist()) for n in both)) for both in lengths]
    answers = Scorer(*ours(model)).score(requests)
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([[*request.context, *request.continuation]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0]
        want = sum(log_probs[place - 1, ids[0, place]] for place in range(len(request.context), ids.shape[1]))
        assert answer.log_likelihood == pytest.approx(float(want), abs=1e-4), request
    assert min(answer.log_likelihood for answer in answers) < -100, "far from where errors could hide"
