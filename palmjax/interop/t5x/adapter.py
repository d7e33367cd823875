"""palmjax's decoder as the module of `t5x.models.DecoderOnlyModel`, so that `t5x.train` trains it.

In T5X's gin (its dynamic registration configures palmjax's dataclasses as they are):

    from palmjax.interop.t5x import adapter
    from palmjax.models import attention
    from palmjax.models import decoder
    from palmjax.models import layers
    MODEL = @models.DecoderOnlyModel()
    models.DecoderOnlyModel.module = @adapter.PalmjaxDecoder()
    adapter.PalmjaxDecoder.config = @decoder.Decoder()
    decoder.Decoder.block = @decoder.ParallelBlock()
    ...

T5X asks a module for `init` and `apply` only, so this is none of Linen's: it hands T5X's arguments to the same pure
functions that palmjax trains. Its parameters have palmjax's names, so `palmjax convert` reads what such a run saves.
Imports nothing of T5X; written against its interface of 2026 (t5x/models.py, t5x/decoding.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core
from flax.linen import partitioning

from palmjax.data.batch import Batch
from palmjax.models.api import Cache, LanguageModel
from palmjax.models.decoder import Decoder
from palmjax.sharding import Axes

AXES = {"vocab": "vocab", "embed": "embed", "mlp": "mlp", "heads": "heads", "layers": "layers", "head_dim": "kv"}
"""palmjax's logical axes that T5X's partitioning and Adafactor rules know, by T5X's names."""
STACKED, PLAIN = "stack", "relpos_buckets"
"""T5X's names for an axis that is never sharded: one of independent matrices, and one that is not factored."""


@dataclasses.dataclass(frozen=True)
class PalmjaxDecoder:
    """A module for T5X. config: of the model; its dropout is used where T5X enables dropout.

    The cache that T5X keeps is {"decoder": {"cached_key", "cached_value"}} [layers, B, S, K, N] and "cache_index"
    [1, B], tokens written so far: rows on axis 1, which `scan_layers` tells T5X's decoding.
    """

    config: Decoder
    scan_layers: bool = True

    @property
    def _model(self) -> LanguageModel:
        return self.config.build()

    def init(self, rng: jax.Array, *_: Any, **__: Any) -> dict[str, Any]:
        """{"params", "params_axes"}: fresh parameters, whose shapes depend on no input, and their logical axes."""
        model = self._model
        return {"params": model.init(rng), "params_axes": _axes(model.axes, model.abstract_params())}

    def apply(
        self,
        variables: Mapping[str, Any],
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array,
        decoder_segment_ids: jax.Array | None = None,
        decoder_positions: jax.Array | None = None,
        decoder_causal_attention: jax.Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        prefill: bool = False,
        prefill_lengths: jax.Array | None = None,
        rngs: Mapping[str, jax.Array] | None = None,
        mutable: Any = False,
    ) -> Any:
        """Float32 logits [B, T, V], or (logits, collections) where T5X asks for `mutable` ones.

        Without `decode` and `prefill`: a teacher-forced pass; tokens are int32 [B, T]. decode without a cache makes an
        empty one for rows as long as the tokens, and its logits are zeros. prefill reads the first `prefill_lengths`
        [B] tokens of each row into the cache. decode with a cache reads one token a row, [B, 1].
        """
        params = core.unfreeze(variables["params"])  # pyright: ignore[reportArgumentType]
        tokens = decoder_input_tokens.astype(jnp.int32)
        cache = variables.get("cache")
        if prefill or decode:
            if prefill:
                assert cache is not None and prefill_lengths is not None, "T5X makes the cache before it prefills it"
                logits, filled = self._prefill(params, tokens, prefill_lengths, _to_palmjax(cache))
            elif cache is None:
                filled = self._model.init_cache(*tokens.shape)
                logits = jnp.zeros((*tokens.shape, self.config.padded_vocab_size), jnp.float32)
            else:
                logits, filled = self._model.extend(params, tokens[:, 0], _to_palmjax(cache))
                logits = logits[:, None]
            return (logits, {"cache": _to_t5x(filled)}) if mutable else logits
        segments = decoder_segment_ids
        if segments is None:  # not packed: what has no target is padding
            segments = (decoder_target_tokens > 0).astype(jnp.int32)
        positions = decoder_positions
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        batch = Batch(
            tokens=tokens,
            targets=decoder_target_tokens,
            weights=None,
            segments=segments,
            positions=positions,
        )
        if decoder_causal_attention is not None:
            batch = batch.marked(prefix=decoder_causal_attention)
        key = rngs["dropout"] if enable_dropout and rngs and self.config.dropout else None
        model = self._model
        logits = model.logits(params, model.hidden(params, batch, key))
        return (logits, {}) if mutable else logits

    def _prefill(self, params: Any, tokens: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits, cache = self._model.prefill(params, tokens, lengths.astype(jnp.int32), cache)
        return logits[:, None], cache


def _to_palmjax(cache: Mapping[str, Any]) -> Cache:
    held = cache["decoder"]
    return {"key": held["cached_key"], "value": held["cached_value"], "length": held["cache_index"][0]}


def _to_t5x(cache: Cache) -> dict[str, Any]:
    held = {"cached_key": cache["key"], "cached_value": cache["value"], "cache_index": cache["length"][None]}
    return {"decoder": held}


def _axes(axes: Any, params: Any) -> dict[str, Any]:
    """T5X's `params_axes`: beside each parameter's place `NAME_axes` with its logical axes, in T5X's names."""

    def one(names: Axes, leaf: Any) -> partitioning.AxisMetadata:
        return partitioning.AxisMetadata(tuple(map(_name, names, leaf.shape)))  # pyright: ignore[reportCallIssue]

    return {
        f"{name}_axes" if isinstance(value, tuple) else name: one(value, params[name])
        if isinstance(value, tuple)
        else _axes(value, params[name])
        for name, value in axes.items()
    }


def _name(axis: str | None, size: int) -> str:
    if axis == "kv_heads":
        return "heads" if size > 1 else STACKED
    return STACKED if axis == "experts" else AXES.get(axis or "", PLAIN)
