"""The seam between models and everything else: pure functions of (params, batch). Linen stays behind it.

Params are a plain nested dict named as T5X names them, so a checkpoint, an optimizer or a converter needs no Linen.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from palmjax import sharding
from palmjax.config import ConfigError, PackingPart
from palmjax.data.batch import Batch
from palmjax.models.attention import CACHE, PAGED_CACHE, Rows
from palmjax.models.decoder import Decoder, DecoderModule
from palmjax.models.embeddings import RESIDUAL, Readout
from palmjax.models.layers import Report
from palmjax.models.parameters import STACKED, AxesBox, declaring

Cache = dict[str, Any]
"""{"key", "value"}: [layers, B, S, K, N] in the compute dtype; {"length"}: int32 [B], tokens written so far in each
row.
"""

HEAD = "logits_dense"
"""Parameters of a head that has some, inside "decoder" as T5X has them."""

MASKED_LOGIT = -1e30


class LanguageModel:
    """A decoder as pure functions. Shapes: B rows, T tokens, D model width, V padded vocabulary."""

    def __init__(self, config: Decoder):
        self.config = config
        self._module = DecoderModule(config)
        self._head = config.head.build(config.context, config.padded_vocab_size)

    def _fresh(self, module: DecoderModule, key: jax.Array, ids: jax.Array) -> Any:
        """Boxed parameters; ids: int32 [B, T], any."""
        variables: Any = module.init(key, ids, Rows(positions=ids))
        params = variables["params"]
        hidden = jnp.zeros((*ids.shape, self.config.d_model), out_sharding=sharding.out_spec(RESIDUAL, (*ids.shape, 1)))
        table = params["token_embedder"]["embedding"].value
        head = self._head.init(jax.random.fold_in(key, 1), hidden, table)
        if "params" in head:
            params = params | {"decoder": params["decoder"] | {HEAD: head["params"]}}
        return params

    @functools.cached_property
    def _boxed(self) -> Any:
        def stacked(box: AxesBox) -> AxesBox:
            shape = (self.config.turns, *box.value.shape)
            return AxesBox(value=jax.ShapeDtypeStruct(shape, box.value.dtype), axes=(STACKED, *box.axes))

        def one_turn() -> Any:
            module = DecoderModule(self.config, one_turn=True)
            return self._fresh(module, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))

        # Shapes do not depend on the mesh that happens to be active; without one, no axis needs to divide anything.
        # One turn of the layers tells all of them, in a fifth of the time that tracing the scan takes.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), declaring():
            params = jax.eval_shape(one_turn)
        layers = jax.tree.map(stacked, params["decoder"]["layers"], is_leaf=lambda x: isinstance(x, AxesBox))
        return params | {"decoder": params["decoder"] | {"layers": layers}}

    def check_rows(self, length: int, packing: PackingPart) -> None:
        """Raises ConfigError if the model can't be trained or scored on rows of `length` tokens packed like this."""
        most = self.config.max_length
        if most is not None and length > most:
            raise ConfigError(
                f"rows of {length:,} tokens (TASK_FEATURE_LENGTHS), and the model learns {most:,} positions "
                "(LearnedPositions.length)"
            )
        causal = all(layer.attention.causal for layer in self.config.block.layers)
        if packing.shifted and not causal:
            raise ConfigError(
                f"Attention.causal = False with {type(packing).__name__}: its rows predict the next token, which the "
                "model sees; set PACKING = @PackPairs() and an objective such as @MaskedLM()"
            )

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
        return meta.unbox(self._fresh(self._module, key, ids))

    def in_compute_dtype(self, params: Any) -> Any:
        """Matrices in the dtype in which every product takes them: once, where they are read many times. Norm scales
        stay float32, and so do routers, whose products are.
        """

        def cast(leaf: jax.Array, axes: sharding.Axes) -> jax.Array:
            is_matrix = sum(axis != STACKED for axis in axes) > 1 and "router" not in axes
            return leaf.astype(self.config.dtype) if is_matrix else leaf

        return jax.tree.map(cast, params, self.axes)

    def hidden(self, params: Any, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """Final hidden states [B, T, D] in the compute dtype. Dropout is applied only with a key."""
        return self.forward(params, batch, dropout_key)[0]

    def forward(self, params: Any, batch: Batch, dropout_key: jax.Array | None = None) -> tuple[jax.Array, Report]:
        """`hidden`, and what the layers report besides, float32 scalars summed over tokens: of experts `aux_loss`
        (weighted, to be added to the loss), `dropped` and `routed`; of dense layers nothing.
        """
        rows = Rows(positions=batch.positions, segments=batch.segments, prefix=batch.prefix)
        out: Any = self._module.apply(
            {"params": params}, batch.tokens, rows, batch.token_types, dropout_key=dropout_key
        )
        hidden, _, report = out
        return hidden, report

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] of hidden states [B, T, D]; the padding of the vocabulary is masked out."""
        head = {"params": params["decoder"].get(HEAD, {})}
        logits: Any = self._head.apply(head, hidden, params["token_embedder"]["embedding"])
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits
        real = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
        return jnp.where(sharding.constrain(real, ("vocab",)), logits, MASKED_LOGIT)

    def readout(self, params: Any) -> Readout | None:
        """The head as a product with a table, whose padding is not masked out; None where it is more than that."""
        head, table = params["decoder"].get(HEAD, {}), params["token_embedder"]["embedding"]
        return self.config.head.readout(head, table, self.config.d_model)

    def init_cache(self, rows: int, length: int) -> Cache:
        """An empty key/value cache for `rows` rows of at most `length` tokens."""
        attention = self.config.attention
        shape = (self.config.num_layers, rows, length, attention.num_kv_heads, attention.head_dim)
        empty = functools.partial(
            jnp.zeros, shape, self.config.dtype, out_sharding=sharding.out_spec(CACHE, shape, "cache")
        )
        written = jnp.zeros((rows,), jnp.int32, out_sharding=sharding.out_spec(("batch",), (rows,), "cache"))
        return {"key": empty(), "value": empty(), "length": written}

    def prefill(
        self, params: Any, tokens: jax.Array, lengths: jax.Array, cache: Cache, *, as_prefix: bool = False
    ) -> tuple[jax.Array, Cache]:
        """Reads prompts into the cache. tokens: int32 [B, T], padded on the right; lengths: int32 [B], at least 1.

        as_prefix: each prompt's tokens see all of it, as a prefix language model was trained. Returns the float32
        logits [B, V] that follow each row's last token, and the cache.
        """
        index = jnp.arange(tokens.shape[1])[None, :]
        # A position beyond the cache drops the write, so padding leaves no trace.
        positions = jnp.where(index < lengths[:, None], index, cache["key"].shape[2])
        prefix = lengths if as_prefix else None
        hidden, cache = self.read(params, tokens, positions, cache | {"length": lengths}, prefix)

        def pick(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
            return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)

        last = sharding.local(pick, (RESIDUAL, ("batch",)), RESIDUAL, hidden, lengths)
        return self.logits(params, last)[:, 0], cache

    def extend(self, params: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One token more in each row. tokens: int32 [B]. Returns float32 logits [B, V] of what follows, and the
        cache.
        """
        hidden, cache = self.read(
            params, tokens[:, None], cache["length"][:, None], cache | {"length": cache["length"] + 1}
        )
        return self.logits(params, hidden)[:, 0], cache

    def init_pages(self, pages: int, size: int) -> dict[str, jax.Array]:
        """An empty paged cache: `pages` pages of `size` tokens over all devices, each with its share."""
        attention = self.config.attention
        shape = (self.config.num_layers, pages, attention.num_kv_heads, size, attention.head_dim)
        spec = sharding.out_spec(PAGED_CACHE, shape, "cache")
        return {name: jnp.zeros(shape, self.config.dtype, out_sharding=spec) for name in ("key", "value")}

    def read_pages(
        self, params: Any, tokens: jax.Array, positions: jax.Array, pages: jax.Array, cache: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reads one page more of each row into a paged cache (Kwon et al. 2023), in which rows may share pages.

        tokens, positions: int32 [B, C], each row a whole page, padded behind its last token. pages: int32 [B, n], where
        each row's pages lie among its device's own, the page read now included. A token's keys lie at its position
        whatever is read beside it. Returns hidden states [B, C, D] in the compute dtype, and the cache.
        """
        rows = Rows(positions=positions, pages=pages)
        out: Any = self._module.apply({"params": params}, tokens, rows, cache=cache)
        hidden, cache, _ = out
        return hidden, cache

    def read(
        self, params: Any, tokens: jax.Array, positions: jax.Array, cache: Cache, prefix: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] of tokens [B, T] at `positions` [B, T], which are written into the cache there; each
        sees what the cache holds up to its own position, and the row's first prefix[b] tokens (int32 [B]).

        What lies behind a row's end is not seen before it is written again. "length" of the cache stays as it is.
        """
        store = {"key": cache["key"], "value": cache["value"]}
        rows = Rows(positions=positions, prefix=prefix)
        out: Any = self._module.apply({"params": params}, tokens, rows, cache=store)
        hidden, store, _ = out
        return hidden, {**store, "length": cache["length"]}
