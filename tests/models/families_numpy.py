"""Every family's forward pass in float64 numpy, row by row, written from the papers: the tests' oracle.

It reads the configuration for sizes and for which part is present, and shares no code with the library.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def to_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: to_numpy(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def norm(part: Any, p: dict, x: np.ndarray) -> np.ndarray:
    if type(part).__name__ == "LayerNorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + part.epsilon) * p["scale"]
    return x + p["bias"] if "bias" in p else x


def activate(part: Any, x: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf)
    return {
        "GELU": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
        "TanhGELU": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "ReLU": lambda x: np.maximum(x, 0),
        "SquaredReLU": lambda x: np.maximum(x, 0) ** 2,
        "SiLU": lambda x: x / (1 + np.exp(-x)),
    }[type(part).__name__](x)


def dense(p: dict, x: np.ndarray, equation: str) -> np.ndarray:
    y = np.einsum(equation, x, p["kernel"])
    return y + p["bias"] if "bias" in p else y


def rope(part: Any, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [T, heads, N]; each pair is a complex number that is turned."""
    dims = part.dims or x.shape[-1]
    half = dims // 2
    turn = np.exp(1j * positions[:, None] * part.base ** (-2 * np.arange(half) / dims))[:, None, :]
    y = x.copy()
    if type(part).__name__ == "InterleavedRoPE":
        z = (x[..., 0:dims:2] + 1j * x[..., 1:dims:2]) * turn
        y[..., 0:dims:2], y[..., 1:dims:2] = z.real, z.imag
    else:
        z = (x[..., :half] + 1j * x[..., half:dims]) * turn
        y[..., :half], y[..., half:dims] = z.real, z.imag
    return y


def alibi(heads: int) -> list[float]:
    """The paper's released code, in its own words: recursive for head counts that are no power of two."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_two(closest) + alibi(2 * closest)[0::2][: heads - closest]


def bucket(part: Any, distance: int) -> int:
    """Of key minus query (Raffel et al. 2020): half exact, half logarithmic."""
    count, first = part.num_buckets, 0
    if part.bidirectional:
        count //= 2
        first = count if distance > 0 else 0
        back = abs(distance)
    else:
        back = max(-distance, 0)
    exact = count // 2
    if back < exact:
        return first + back
    return first + min(
        count - 1, exact + int(math.log(back / exact) / math.log(part.max_distance / exact) * (count - exact))
    )


def attend(c: Any, p: dict, h: np.ndarray, positions: np.ndarray, sees: np.ndarray, shared: Any) -> np.ndarray:
    """h [T, D]; sees: bool [T, T], query by key."""
    part, kind = c.positions, type(c.positions).__name__
    q, k, v = (dense(p[name], h, "td,dhn->thn") for name in ("query", "key", "value"))
    if "RoPE" in kind:
        q, k = rope(part, q, positions), rope(part, k, positions)
    T, H, N = q.shape
    scale = N**-0.5 if c.scale is None else c.scale
    out = np.zeros_like(q)
    for head in range(H):
        keys, values = k[:, head * c.num_kv_heads // H], v[:, head * c.num_kv_heads // H]
        own: dict = p.get("relative", {})
        scores = scale * (q[:, head] + (own["content_bias"][head] if own else 0)) @ keys.T
        if c.soft_cap is not None:
            scores = c.soft_cap * np.tanh(scores / c.soft_cap)
        for i in range(T):
            for j in range(T):
                if kind == "ALiBi":
                    scores[i, j] -= alibi(H)[head] * abs(i - j)
                elif "Buckets" in kind:
                    table = shared if kind.startswith("Shared") else p["relpos_bias"]["rel_embedding"]
                    scores[i, j] += table[head, bucket(part, j - i)]
                elif kind == "TransformerXL" and j <= i:
                    D = h.shape[1]
                    angle = (i - j) * part.max_wavelength ** (-np.arange(0, D, 2) / D)
                    r = np.concatenate([np.sin(angle), np.cos(angle)])
                    w = own["projection"]["kernel"][:, head]
                    scores[i, j] += scale * (q[i, head] + own["position_bias"][head]) @ (r @ w)
        scores = np.where(sees, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ values
    return dense(p["out"], out, "thn,hnd->td")


def feed_forward(c: Any, p: dict, x: np.ndarray) -> np.ndarray:
    if "wi" in p:
        return dense(p["wo"], activate(c.activation, dense(p["wi"], x, "td,df->tf")), "tf,fd->td")
    gate, value = (dense(p[name], x, "td,df->tf") for name in ("wi_0", "wi_1"))
    return dense(p["wo"], activate(c.activation, gate) * value, "tf,fd->td")


def mixture(c: Any, p: dict, x: np.ndarray, report: dict[str, float]) -> np.ndarray:
    """One row through experts, token by token: first choices of all tokens, then second ones."""
    T, E = len(x), c.num_experts
    logits = x @ p["router"]
    gates = np.exp(logits - logits.max(-1, keepdims=True))
    gates /= gates.sum(-1, keepdims=True)
    order = np.argsort(-gates, axis=-1, kind="stable")[:, : c.top_k]
    room, y = np.full(E, math.ceil(c.capacity_factor * c.top_k * T / E)), np.zeros_like(x)
    for choice in range(c.top_k):
        for t in range(T):
            expert = order[t, choice]
            report["routed"] += 1
            if room[expert] == 0:
                report["dropped"] += 1
                continue
            room[expert] -= 1
            weight = gates[t, expert] / gates[t, order[t]].sum() if c.top_k > 1 else gates[t, expert]
            one = {name: {key: value[expert] for key, value in w.items()} for name, w in p["experts"].items()}
            y[t] += weight * feed_forward(c.expert, one, x[t : t + 1])[0]
    share = np.bincount(order[:, 0], minlength=E) / T
    report["aux_loss"] += c.aux_weight * T * E * float(share @ gates.mean(0))
    return y


def at(tree: Any, index: int) -> Any:
    return {k: at(v, index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


def forward(
    config: Any,
    params: Any,
    tokens: np.ndarray,
    *,
    prefix: np.ndarray | None = None,
    types: np.ndarray | None = None,
    report: dict[str, float] | None = None,
) -> np.ndarray:
    """Logits [T, V] of one row of token ids [T]."""
    p, T, D = to_numpy(params), len(tokens), config.d_model
    positions, part = np.arange(T), config.embedding
    report = {"aux_loss": 0.0, "dropped": 0.0, "routed": 0.0} if report is None else report
    x = p["token_embedder"]["embedding"][tokens]
    if "project_in" in p["token_embedder"]:
        x = x @ p["token_embedder"]["project_in"]["kernel"]
    x = x * (part.scale or 1.0)
    if part.positions is not None:
        x = x + p["position_embedder"]["embedding"][positions + part.positions.offset]
    if part.types is not None:
        x = x + p["type_embedder"]["embedding"][np.zeros(T, int) if types is None else types]
    x = x if part.norm is None else norm(part.norm, p["embedding_norm"], x)
    turn, layers = config.block.layers, p["decoder"]["layers"]
    shared = p["decoder"].get("relpos_bias", {}).get("rel_embedding")
    for number in range(config.num_layers):
        block = turn[number % len(turn)]
        w = layers if len(turn) == 1 else layers[f"block_{number % len(turn)}"]
        x = layer(block, at(w, number // len(turn)), x, positions, prefix, shared, report)
    x = x if config.final_norm is None else norm(config.final_norm, p["decoder"]["decoder_norm"], x)
    return head(config, p, x, D)


def layer(block: Any, w: dict, x: np.ndarray, positions: np.ndarray, prefix: Any, shared: Any, report: dict) -> Any:
    i, j = np.arange(len(x))[:, None], np.arange(len(x))[None, :]
    a = block.attention
    sees = (j <= i) if a.causal else np.ones((len(x), len(x)), bool)
    sees = sees if a.window is None else sees & (i - j < a.window)
    sees = sees if prefix is None else sees | (prefix[None, :] == 1)

    def attention(h: np.ndarray) -> np.ndarray:
        return attend(a, w["self_attention"], h, positions, sees, shared)

    def mlp(h: np.ndarray) -> np.ndarray:
        moe = "router" in w["mlp"]
        return mixture(block.mlp, w["mlp"], h, report) if moe else feed_forward(block.mlp, w["mlp"], h)

    kind = type(block).__name__
    if kind == "ParallelBlock":
        h = norm(block.norm, w["pre_norm"], x)
        other = h if block.mlp_norm is None else norm(block.mlp_norm, w["mlp_norm"], x)
        return x + attention(h) + mlp(other)
    if kind == "SerialBlock":
        x = x + attention(norm(block.norm, w["pre_norm"], x))
        return x + mlp(norm(block.norm, w["mlp_norm"], x))
    x = norm(block.norm, w["attention_norm"], x + attention(x))
    return norm(block.norm, w["mlp_norm"], x + mlp(x))


def head(config: Any, p: dict, x: np.ndarray, D: int) -> np.ndarray:
    h, table = p["decoder"].get("logits_dense", {}), p["token_embedder"]["embedding"]
    c, kind = config.head, type(config.head).__name__
    if kind == "MaskedLMHead":
        x = norm(c.norm, h["norm"], activate(c.activation, x @ h["transform"]["kernel"] + h["transform"]["bias"]))
        return x @ table.T + h["bias"]
    if kind == "UntiedHead":
        logits = dense(h, x, "td,dv->tv") * c.logit_scale
    else:
        x = x @ h["project_out"]["kernel"] if "project_out" in h else x
        logits = x @ table.T * (D**-0.5 if c.logit_scale is None else c.logit_scale)
    return logits if c.soft_cap is None else c.soft_cap * np.tanh(logits / c.soft_cap)
