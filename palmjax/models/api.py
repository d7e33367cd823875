"""The seam between models and everything else: pure functions of (params, batch). Linen stays behind it.

Params are a plain nested dict named as T5X names them, so a checkpoint, an optimizer or a converter needs no Linen.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from palmjax import sharding
from palmjax.data.batch import Batch
from palmjax.models.attention import CACHE
from palmjax.models.decoder import RESIDUAL, Decoder, DecoderModule
from palmjax.models.layers import AxesBox
from palmjax.sharding import Axes

Cache = dict[str, Any]
"""{"key", "value"}: [layers, B, S, K, N] in the compute dtype; {"length"}: int32 [B], tokens written so far in each
row.
"""

MASKED_LOGIT = -1e30


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a module needs to know of its rows besides the tokens."""

    positions: jax.Array
    segments: jax.Array | None


jax.tree_util.register_dataclass(_Rows, data_fields=["positions", "segments"], meta_fields=[])


class LanguageModel:
    """A decoder as pure functions. Shapes: B rows, T tokens, D model width, V padded vocabulary."""

    def __init__(self, config: Decoder):
        self.config = config
        self._module = DecoderModule(config)

    @functools.cached_property
    def _boxed(self) -> Any:
        rows = jax.ShapeDtypeStruct((1, 2), jnp.int32)

        def init(key: jax.Array, ids: jax.Array) -> Any:
            return self._module.init(key, ids, _Rows(positions=ids, segments=None))["params"]

        # Shapes do not depend on the mesh that happens to be active; without one, no axis needs to divide anything.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return jax.eval_shape(init, jax.random.key(0), rows)

    @property
    def axes(self) -> Any:
        """Logical axes of every parameter, in the structure of params; a stack of layers leads with "layers"."""
        return jax.tree.map(lambda box: box.axes, self._boxed, is_leaf=lambda x: isinstance(x, AxesBox))

    def abstract_params(self) -> Any:
        """Shape and dtype of every parameter; nothing is computed."""
        return meta.unbox(self._boxed)

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters (float32). Under an active mesh each is born with its sharding; the values do not depend on
        the mesh.
        """
        batch = jax.sharding.get_abstract_mesh()
        rows = 1 if batch.empty else batch.size
        ids = jnp.zeros((rows, 2), jnp.int32, out_sharding=sharding.out_spec(("batch", "length"), (rows, 2)))
        return meta.unbox(self._module.init(key, ids, _Rows(positions=ids, segments=None))["params"])

    def hidden(self, params: Any, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """Final hidden states [B, T, D] in the compute dtype. Dropout is applied only with a key."""
        rows = _Rows(positions=batch.positions, segments=batch.segments)
        return self._module.apply({"params": params}, batch.tokens, rows, dropout_key=dropout_key)[0]

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] of hidden states [B, T, D]; the padding of the vocabulary is masked out."""
        out: Axes = ("batch", "length", "vocab")
        table = params["token_embedder"]["embedding"]
        # Not rounded to the compute dtype on the way: bfloat16 logits tie, and cost hundredths of a nat.
        logits = sharding.einsum("BTD,VD->BTV", hidden, table, out=out, dtype=jnp.float32) * self.config.d_model**-0.5
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits
        real = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
        return jnp.where(sharding.constrain(real, ("vocab",)), logits, MASKED_LOGIT)

    def init_cache(self, rows: int, length: int) -> Cache:
        """An empty key/value cache for `rows` rows of at most `length` tokens."""
        attention = self.config.block.attention
        shape = (self.config.num_layers, rows, length, attention.num_kv_heads, attention.head_dim)
        empty = functools.partial(
            jnp.zeros, shape, self.config.dtype, out_sharding=sharding.out_spec(CACHE, shape, "cache")
        )
        written = jnp.zeros((rows,), jnp.int32, out_sharding=sharding.out_spec(("batch",), (rows,), "cache"))
        return {"key": empty(), "value": empty(), "length": written}

    def prefill(self, params: Any, tokens: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads prompts into the cache. tokens: int32 [B, T], padded on the right; lengths: int32 [B], at least 1.

        Returns the float32 logits [B, V] that follow each row's last token, and the cache.
        """
        index = jnp.arange(tokens.shape[1])[None, :]
        # A position beyond the cache drops the write, so padding leaves no trace.
        positions = jnp.where(index < lengths[:, None], index, cache["key"].shape[2])
        hidden, cache = self._extend(params, tokens, positions, cache | {"length": lengths})

        def pick(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
            return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)

        last = sharding.local(pick, (RESIDUAL, ("batch",)), RESIDUAL, hidden, lengths)
        return self.logits(params, last)[:, 0], cache

    def extend(self, params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One token more in each row. tokens: int32 [B]. Returns float32 logits [B, V] of what follows, and the
        cache.
        """
        hidden, cache = self._extend(
            params, tokens[:, None], cache["length"][:, None], cache | {"length": cache["length"] + 1}
        )
        return self.logits(params, hidden)[:, 0], cache

    def _extend(self, params: Any, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        store = {"key": cache["key"], "value": cache["value"]}
        hidden, store = self._module.apply({"params": params}, tokens, _Rows(positions=positions, segments=None), store)
        return hidden, {**store, "length": cache["length"]}
