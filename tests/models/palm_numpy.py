"""PaLM's forward pass in float64 numpy, written from the paper and independent of the library: the tests' oracle."""

from __future__ import annotations

from typing import Any

import numpy as np


def layer_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def rope(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [T, heads, N], positions [T]: pairs (i, i + N/2) as complex numbers, turned by positions / 10000^(2i/N)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[:, None] / 10_000.0 ** (np.arange(half) / half))[:, None, :]
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def forward(params: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one row of token ids [T]."""
    p = _to_numpy(params)
    table = p["token_embedder"]["embedding"]
    x = layer_norm(residual(params, tokens), p["decoder"]["decoder_norm"]["scale"])
    return x @ table.T / np.sqrt(table.shape[1])


def residual(params: Any, tokens: np.ndarray) -> np.ndarray:
    """What the last block leaves, [T, D], before the final norm."""
    p = _to_numpy(params)
    layers = p["decoder"]["layers"]
    T, positions = len(tokens), np.arange(len(tokens))
    x = p["token_embedder"]["embedding"][tokens]
    for i in range(layers["pre_norm"]["scale"].shape[0]):
        attention = {name: w["kernel"][i] for name, w in layers["self_attention"].items()}
        mlp = {name: w["kernel"][i] for name, w in layers["mlp"].items()}
        h = layer_norm(x, layers["pre_norm"]["scale"][i])
        q, k = (rope(np.einsum("td,dhn->thn", h, attention[name]), positions) for name in ("query", "key"))
        v = np.einsum("td,dhn->thn", h, attention["value"])
        heads, kv_heads = q.shape[1], k.shape[1]
        mixed = np.zeros_like(q)
        for head in range(heads):
            source = head * kv_heads // heads
            scores = q[:, head] @ k[:, source].T / np.sqrt(q.shape[-1])
            scores[~np.tri(T, dtype=bool)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, source]
        gate = h @ mlp["wi_0"]
        feed_forward = (gate / (1.0 + np.exp(-gate)) * (h @ mlp["wi_1"])) @ mlp["wo"]
        x = x + feed_forward + np.einsum("thn,hnd->td", mixed, attention["out"])
    return x


def _to_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _to_numpy(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)
