"""Random cases of attention and their meaning: a float64 softmax over an explicit matrix of what is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """cuts: where a new segment begins, None for no segments. prefixes: how long each segment's prefix is (taken in
    turn), None for no prefix.
    """

    length: int
    heads: int
    kv_heads: int
    width: int = 8
    rows: int = 2
    mask: Mask = dataclasses.field(default_factory=Mask)
    cuts: tuple[int, ...] | None = None
    prefixes: tuple[int, ...] | None = None
    alibi: bool = False
    soft_cap: float | None = None

    @property
    def segments(self) -> Any:
        """Ids that come again, so that only a run of them can be a segment."""
        if self.cuts is None:
            return None
        ids = np.searchsorted(sorted(self.cuts), np.arange(self.length), side="right") % 2
        return np.tile(ids.astype(np.int32), (self.rows, 1))

    @property
    def runs(self) -> list[range]:
        """The segments' indices. Equal cuts leave an empty segment between them, which is none."""
        edges = sorted({0, self.length, *(cut for cut in self.cuts or () if 0 < cut < self.length)})
        # An even number of equal cuts changes no id: what is on their two sides is one run.
        ids = np.zeros(self.length, int) if self.segments is None else self.segments[0]
        starts = [edge for edge in edges[:-1] if edge == 0 or ids[edge] != ids[edge - 1]]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], self.length], strict=True)]

    @property
    def prefix(self) -> Any:
        """Marks of the first tokens of each segment."""
        if self.prefixes is None:
            return None
        marks = np.zeros((self.rows, self.length), bool)
        for number, run in enumerate(self.runs):
            marks[:, run.start : min(run.start + self.prefixes[number % len(self.prefixes)], run.stop)] = True
        return marks

    @property
    def seen(self) -> np.ndarray:
        """bool [T, S], from the definition."""
        i, j = np.arange(self.length)[:, None], np.arange(self.length)[None, :]
        allowed = (j <= i) if self.mask.causal else np.ones((self.length, self.length), bool)
        if self.prefix is not None:
            allowed = allowed | self.prefix[0][None, :]
        if self.mask.window is not None:
            allowed = allowed & (i - j < self.mask.window)
        together = np.zeros_like(allowed)
        for run in self.runs:
            together[run.start : run.stop, run.start : run.stop] = True
        return allowed & together

    @property
    def slopes(self) -> Any:
        return (2.0 ** -np.arange(1, self.heads + 1)).astype(np.float32) if self.alibi else None

    def arrays(self, seed: int = 0) -> list[Any]:
        """q, k, v, and weights of the sums that `gradients` differentiates: of out and of lse. Float64."""
        rng = np.random.default_rng(seed)
        q, kv = (self.rows, self.length, self.heads, self.width), (self.rows, self.length, self.kv_heads, self.width)
        return [rng.standard_normal(shape) for shape in (q, kv, kv, q, q[:3])]

    def keywords(self) -> dict[str, Any]:
        """What `attention` takes besides q, k and v."""
        return {
            "mask": self.mask,
            "segments": self.segments,
            "prefix": self.prefix,
            "alibi_slopes": self.slopes,
            "soft_cap": self.soft_cap,
        }

    def meaning(self, q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
        """(out, lse) in float64."""
        k, v = (jnp.repeat(x, self.heads // self.kv_heads, axis=2) for x in (k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(self.width)
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        if self.slopes is not None:
            i = np.arange(self.length)
            scores -= self.slopes.astype(np.float64)[:, None, None] * np.abs(i[:, None] - i[None, :])
        scores = jnp.where(self.seen, scores, -np.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        out = jnp.einsum("bhts,bshd->bthd", jnp.exp(scores - lse[..., None]), v)
        return out, jnp.swapaxes(lse, 1, 2)


def gradients(function: Any, arrays: list[Any], dtype: Any) -> list[Any]:
    """out, lse, dq, dk, dv of sum(w out) + sum(u lse), all computed in `dtype`."""
    q, k, v, w, u = (jnp.asarray(x, dtype) for x in arrays)

    def total(q: Any, k: Any, v: Any) -> Any:
        out, lse = function(q, k, v)
        return jnp.sum(w.astype(jnp.float32) * out) + jnp.sum(u.astype(jnp.float32) * lse), (out, lse)

    (_, found), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [*found, *grads]


def check(example: Example, function: Any, dtype: Any = np.float32, tolerance: float = 2e-6) -> None:
    """Result and all gradients of `function` against float64, by norm."""
    arrays = example.arrays()
    got = gradients(function, arrays, dtype)
    with jax.enable_x64(True):
        want = gradients(example.meaning, arrays, np.float64)
        assert want[0].dtype == np.float64
        for name, mine, true in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
            mine, true = np.asarray(mine, np.float64), np.asarray(true)
            assert np.all(np.isfinite(mine)), name
            # A log-sum-exp sums terms of size one and may cancel to nothing.
            error = np.linalg.norm(mine - true) / max(np.linalg.norm(true), 1.0 if name == "lse" else 1e-3)
            # Where one key takes all the weight, dP - delta cancels and leaves float32's rounding of terms of size ten.
            allowed = tolerance if name in ("out", "lse") else 3 * tolerance
            assert error < allowed, f"{name}: {error:.1e} of {example}"


def naive_decode(q: Any, k: Any, v: Any, positions: Any, window: int | None) -> np.ndarray:
    """Float64, one query and head at a time, over [B, S, K, D] caches."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        last = min(positions[b, t], k.shape[1] - 1)
        first = 0 if window is None else max(positions[b, t] - window + 1, 0)
        source = h * k.shape[2] // q.shape[2]
        if first <= last:
            scores = k[b, first : last + 1, source] @ q[b, t, h] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, first : last + 1, source]
    return out


def random_cache(
    rng: Any,
    *,
    queries: int,
    length: int,
    kv_heads: int = 1,
    layers: int = 3,
    rows: int = 2,
    heads: int = 4,
    width: int = 8,
) -> tuple[Any, Any, Any]:
    """q [B, Q, H, D], and k and v of all layers, [L, B, S, K, D]."""
    q = rng.standard_normal((rows, queries, heads, width), np.float32)
    k, v = rng.standard_normal((2, layers, rows, length, kv_heads, width), np.float32)
    return q, k, v
