"""Tiny random models of transformers, one for each variant of a family, and palmjax's view of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from palmjax import checkpoint, configure, model_dir, trained
from palmjax.data.batch import Batch
from palmjax.models.api import LanguageModel

VOCAB = 97
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 32, "n_layer": 2}
OPT: dict[str, Any] = SMALL | {"ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
NEOX = SMALL | {"intermediate_size": 48}
LLAMA: dict[str, Any] = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    """Rotary positions stretched four times."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, **settings}}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT | {"n_head": 4, "n_inner": 40}),
    "gpt2 untied, ReLU, scores not scaled": (
        "gpt2",
        GPT | {"n_head": 2, "tie_word_embeddings": False, "scale_attn_weights": False, "activation_function": "relu"},
    ),
    "opt": ("opt", OPT),
    "opt 350m: post-norm, narrow embeddings": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bloom, six heads": ("bloom", {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 3, "n_head": 6}),
    "falcon 7b: multi-query, one norm": ("falcon", SMALL),
    "falcon 40b: grouped queries, two norms": (
        "falcon",
        SMALL | {"num_kv_heads": 2, "new_decoder_architecture": True, "tie_word_embeddings": False},
    ),
    "falcon, serial, multi-head, biases": (
        "falcon",
        SMALL | {"multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "gptj: interleaved rotation of a part": ("gptj", GPT | {"n_head": 2, "rotary_dim": 8}),
    "gpt_neox: rotation of a part, two norms": ("gpt_neox", NEOX | {"num_attention_heads": 2}),
    "gpt_neox, serial, tied": ("gpt_neox", NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "llama": ("llama", LLAMA | {"num_key_value_heads": 4}),
    "llama 2: grouped queries": ("llama", LLAMA | {"rms_norm_eps": 1e-5}),
    "llama, tied, biases, wide heads, other base": (
        "llama",
        LLAMA
        | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama 3: stretched by wavelength": (
        "llama",
        LLAMA | rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama, stretched by YaRN, GELU gate": (
        "llama",
        LLAMA | {"hidden_act": "gelu"} | rope("yarn", original_max_position_embeddings=16),
    ),
    "mistral: window of 8": ("mistral", LLAMA | {"sliding_window": 8}),
    "qwen2: biases of three projections, stretched": ("qwen2", LLAMA | rope("linear")),
    "qwen2, window of 8, tied": (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "tie_word_embeddings": True},
    ),
    "cohere: PaLM's block, one K/V head": ("cohere", LLAMA | {"num_key_value_heads": 1, "logit_scale": 0.25}),
}
"""Name of a case -> (model_type, what its configuration sets)."""


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model: every parameter, norms and biases too, far enough from where initialisation leaves it."""
    model_type, settings = CONFIGS[name]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.8 + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model.to(dtype)


def load(folder: Path) -> Any:
    """The model that transformers finds in a folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def opened(folder: Path, *bindings: str) -> trained.Trained:
    """A converted folder as `generate` opens it."""
    path = model_dir.resolve(folder)
    info = checkpoint.read_info(path)
    with trained.config_file(path, info) as file:
        experiment = configure.load([file], bindings).experiment
    return trained.open_checkpoint(path, info, experiment)


def restored(folder: Path) -> tuple[LanguageModel, Any]:
    """The palmjax model of a converted folder, and its parameters on one device."""
    found = opened(folder)
    return found.model, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), found.params())


def ragged(lengths: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T], 0 behind each row's length, and the mask of what is real."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (len(lengths), max(lengths)))
    real = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    return (tokens * real).astype(np.int32), real


def batch(tokens: np.ndarray, real: np.ndarray) -> Batch:
    """Rows of inputs whose targets are what follows."""
    targets = np.where(real, np.roll(tokens, -1, axis=1), 0)
    return Batch(
        tokens=tokens,
        targets=targets.astype(np.int32),
        weights=real.astype(np.float32),
        segments=real.astype(np.int32),
        positions=(np.arange(tokens.shape[1], dtype=np.int32) * real).astype(np.int32),
    )


def torch_logits(model: Any, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of transformers; rows padded on the right."""
    with torch.no_grad():
        given = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(real).long()}
        return model(**given, use_cache=False).logits.float().numpy()


def relative(found: Any, wanted: Any) -> float:
    """|found - wanted| / |wanted|, by norm."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
