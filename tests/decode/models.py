"""Models whose greedy text varies, and what they say by full forward passes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palmjax import decode, mesh, sharding
from palmjax.config import MeshConfig, ShardingRules
from palmjax.data.batch import Batch
from palmjax.sampling import Temperature
from tests.models.builders import tiny_palm

PROMPTS = [[5, 6, 7], [], [9, 90, 33, 41] * 8, [20] * 17, [3], [60, 61], [8, 7, 6, 5, 4], [95]]
NEW = 64
MIX = Temperature(temperature=0.9, top_k=30, top_p=0.95)


@functools.cache
def built(kv_heads: int = 1, dtype: str = "float32") -> tuple[Any, Any]:
    """A model and parameters whose greedy text varies. A fresh model repeats its last token: its embeddings are tied,
    and large beside what the blocks add.
    """
    model = tiny_palm(kv_heads=kv_heads, vocab_size=96, vocab_multiple=40, dtype=dtype).build()
    params = jax.jit(model.init)(jax.random.key(0))
    params["token_embedder"]["embedding"] *= 0.05
    params["decoder"]["layers"]["self_attention"]["query"]["kernel"] *= 3.0
    return model, params


@functools.cache
def greedy(kv_heads: int = 1) -> list[decode.Continuation]:
    return decode.generate(*built(kv_heads), PROMPTS, NEW, stop=None)


def spread(model: Any, params: Any, **axes: int) -> tuple[Any, Any]:
    """Parameters laid out over a mesh of these axes, and the mesh."""
    placed = mesh.build(MeshConfig(**axes))
    with sharding.activate(placed, ShardingRules()):
        abstract = sharding.concrete(jax.eval_shape(model.init, jax.random.key(0)), placed)
    return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract)), placed


def texts(found: list[decode.Continuation]) -> list[list[int]]:
    return [one.tokens.tolist() for one in found]


def by_full_forward_passes(model, params, prompts, count, as_prefix=False):
    """Greedy tokens and their log-probabilities with no cache: every row is computed again as a whole at each step."""

    @jax.jit
    def following(tokens, lengths):
        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        batch = Batch(tokens=tokens, targets=tokens, weights=ones, segments=ones, positions=positions)
        if as_prefix:
            batch = batch.marked(prefix=(positions < first[:, None]).astype(jnp.int32))
        logits = model.logits(params, model.hidden(params, batch))
        return jax.nn.log_softmax(logits[jnp.arange(len(prompts)), lengths - 1])

    first = lengths = np.array([len(prompt) + 1 for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + count), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, 1 : lengths[row]] = prompt
    chosen, log_probs = [], []
    for _ in range(count):
        found = np.asarray(following(tokens, lengths))
        chosen.append(found.argmax(-1))
        log_probs.append(found.max(-1))
        tokens[np.arange(len(prompts)), lengths] = chosen[-1]
        lengths = lengths + 1
    return np.stack(chosen, 1), np.stack(log_probs, 1)
