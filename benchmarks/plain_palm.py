"""A PaLM and its training step in plain jax, as one would write it for one device: the peer that palmjax is timed
beside.

The same model, initialisation scales, loss (z-loss included) and optimizer (Adafactor as PaLM uses it, global-norm
clip), with no
framework: params are a dict of stacked arrays and the layers are scanned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a PaLM: layers L, width d, query heads h, key/value heads k, head size n, MLP f, vocabulary v."""

    L: int = 4
    d: int = 256
    h: int = 8
    k: int = 1
    n: int = 32
    f: int = 1024
    v: int = 259
    remat: bool = False


def init(key: jax.Array, s: Shape) -> dict[str, jax.Array]:
    keys = iter(jax.random.split(key, 8))

    def normal(shape: tuple[int, ...], fan_in: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * fan_in**-0.5

    return {
        "embedding": normal((s.v, s.d), 1),
        "norm": jnp.ones((s.L, s.d)),
        "q": normal((s.L, s.d, s.h, s.n), s.d),
        "k": normal((s.L, s.d, s.k, s.n), s.d),
        "v": normal((s.L, s.d, s.k, s.n), s.d),
        "o": normal((s.L, s.h, s.n, s.d), s.h * s.n),
        "wi": normal((s.L, s.d, s.f), s.d),
        "wg": normal((s.L, s.d, s.f), s.d),
        "wo": normal((s.L, s.f, s.d), s.f),
        "final_norm": jnp.ones((s.d,)),
    }


def layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def rope(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def block(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    B, T, _ = x.shape
    h = layer_norm(x, w["norm"])
    q, k = rope(jnp.einsum("btd,dhn->bthn", h, w["q"])), rope(jnp.einsum("btd,dkn->btkn", h, w["k"]))
    v = jnp.einsum("btd,dkn->btkn", h, w["v"])
    K = k.shape[2]
    q = q.reshape(B, T, K, -1, q.shape[-1])
    scores = jnp.einsum("btkgn,bskn->bkgts", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -1e30)
    out = jnp.einsum("bkgts,bskn->btkgn", jax.nn.softmax(scores), v).reshape(B, T, -1, v.shape[-1])
    attention = jnp.einsum("bthn,hnd->btd", out, w["o"])
    mlp = (jax.nn.silu(h @ w["wi"]) * (h @ w["wg"])) @ w["wo"]
    return x + attention + mlp


def loss(params: dict[str, jax.Array], tokens: jax.Array, targets: jax.Array, s: Shape) -> jax.Array:
    stacked = {name: w for name, w in params.items() if name not in ("embedding", "final_norm")}
    body = jax.checkpoint(block) if s.remat else block
    x, _ = jax.lax.scan(lambda x, w: (body(x, w), None), params["embedding"][tokens], stacked)
    logits = layer_norm(x, params["final_norm"]) @ params["embedding"].T * s.d**-0.5
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(log_z - chosen + 1e-4 * jnp.square(log_z))


def init_optimizer(params: Any) -> dict[str, Any]:
    return {
        "m": jax.tree.map(jnp.zeros_like, params),
        "v": jax.tree.map(jnp.zeros_like, params),
        "k": jnp.zeros((), jnp.int32),
    }


def adafactor(params: Any, gradients: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    k = state["k"] + 1
    rate = jnp.minimum(1e-2, k.astype(jnp.float32) ** -0.5)
    decay = 1.0 - k.astype(jnp.float32) ** -0.8
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
    clip = jnp.minimum(1.0, 1.0 / norm)

    def update(p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        g = g * clip
        v = decay * v + (1.0 - decay) * (jnp.square(g) + 1e-30)
        axes = tuple(range(1, p.ndim)) if p.ndim != 1 and p.shape[0] == state["m"]["norm"].shape[0] else None
        scale = jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(p), axis=axes, keepdims=True)), 1e-3)
        m = 0.9 * m + 0.1 * (rate * scale * g * jax.lax.rsqrt(v))
        return (1.0 - rate**2) * p - m, m, v

    new = {name: update(params[name], gradients[name], state["m"][name], state["v"][name]) for name in params}
    p, m, v = ({name: triple[i] for name, triple in new.items()} for i in range(3))
    return p, {"m": m, "v": v, "k": k}


def train_step(params: Any, state: Any, tokens: jax.Array, targets: jax.Array, s: Shape) -> tuple[Any, Any, jax.Array]:
    value, gradients = jax.value_and_grad(loss)(params, tokens, targets, s)
    params, state = adafactor(params, gradients, state)
    return params, state, value
