"""A decoder: embeddings, a stack of equal blocks scanned over layers, a final norm and logits."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from palmjax import sharding
from palmjax.config import ConfigError, ModelPart, Part, section
from palmjax.models.attention import AttentionPart
from palmjax.models.layers import STACKED, FeedForwardPart, LayerNorm, NormPart, dropout, normal, parameter
from palmjax.sharding import Axes

RESIDUAL: Axes = ("batch", "length", "residual")


def keep_all_but_gathers(primitive: Any, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: keep everything but weights gathered over fsdp (and casts, which lead up to them).

    The scan over layers would stack what is kept: the whole unsharded model on every device.
    """
    return primitive.name not in ("reshard", "convert_element_type")


class RematPart(Part):
    """What a block keeps from its forward pass for its backward pass.

    `build()` returns the `jax.checkpoint` policy of a block. `matmuls_again` and `attention_again` are the shares of a
    block's forward FLOPs that the backward pass computes once more.
    """

    attention_only: ClassVar[bool] = False
    matmuls_again: ClassVar[float] = 0.0
    attention_again: ClassVar[float] = 1.0

    def build(self) -> Any:
        return keep_all_but_gathers


@section
class RecomputeAll(RematPart):
    """Keep only each block's input and recompute the rest (PaLM section 4: 540B keeps one activation a layer)."""

    matmuls_again = 1.0

    def build(self) -> Any:
        return jax.checkpoint_policies.nothing_saveable


@section
class RecomputeElementwise(RematPart):
    """Keep the results of the weight matmuls; recompute norms, activations and attention."""

    def build(self) -> Any:
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@section
class RecomputeAttention(RematPart):
    """Keep all but the inside of attention (PaLM appendix B: 8B and 62B recompute attention only)."""

    attention_only = True


class BlockPart(Part):
    """One layer. `build()` returns a Linen module class, made with (config, recompute_attention, dropout_rate).

    The module is the body of the scan over layers: (carry, layer, rows, dropout_key) -> (carry, None), with carry (x,
    cache). The cache is carried, so that a token's write touches only its own entries.
    """

    attention: AttentionPart
    mlp: FeedForwardPart


@section
class ParallelBlock(BlockPart):
    """y = x + MLP(Norm(x)) + Attention(Norm(x)), one norm for both (PaLM section 2)."""

    attention: AttentionPart
    mlp: FeedForwardPart
    norm: NormPart = LayerNorm()

    def build(self) -> type[nn.Module]:
        return ParallelBlockModule


class ParallelBlockModule(nn.Module):
    """The parallel block."""

    config: ParallelBlock
    recompute_attention: bool
    dropout_rate: float

    @nn.compact
    def __call__(self, carry: tuple, layer: jax.Array, rows: Any, dropout_key: jax.Array | None) -> tuple[tuple, None]:
        x, cache = carry
        h = self.config.norm.build("pre_norm")(x)
        attended, cache = self.config.attention.build("self_attention", self.recompute_attention)(h, rows, cache, layer)
        update = attended + self.config.mlp.build("mlp")(h)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer)
        return (x + dropout(update, self.dropout_rate, key, RESIDUAL), cache), None


@section
class Decoder(ModelPart):
    """A decoder-only language model with tied embeddings and logits scaled by 1/sqrt(d_model) (PaLM sections 2 and 5).

    vocab_size: ids the model knows; vocab_multiple: the table is padded to a multiple of this, so that a mesh axis
    divides it (padding never gets probability and is counted apart). dtype: of activations; parameters are float32.
    remat: None keeps everything. unroll: layers a loop iteration of the scan over layers (num_layers: no loop; compiles
    longer).
    dropout: PaLM trains with 0 and finetunes mostly with 0.1.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    block: BlockPart
    final_norm: NormPart = LayerNorm()
    vocab_multiple: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: RematPart | None = None
    unroll: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in ("vocab_size", "num_layers", "d_model", "vocab_multiple", "unroll"):
            if getattr(self, field) < 1:
                raise ConfigError(f"Decoder.{field} = {getattr(self, field)}: must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"Decoder.dropout = {self.dropout}: must be in [0, 1)")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def build(self) -> Any:
        from palmjax.models.api import LanguageModel

        return LanguageModel(self)


class DecoderModule(nn.Module):
    """Token ids to the final hidden states."""

    config: Decoder

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        rows: Any,
        cache: dict[str, jax.Array] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """tokens: int32 [B, T]; rows: with `positions`, `segments` [B, T]. Returns hidden [B, T, D] in the compute
        dtype, cache.
        """
        c = self.config
        x = Embedder(c, name="token_embedder")(tokens)
        if dropout_key is not None:
            x = dropout(x, c.dropout, jax.random.fold_in(dropout_key, c.num_layers), RESIDUAL)
        return Stack(c, name="decoder")(x, rows, cache, dropout_key)


class Embedder(nn.Module):
    """The embedding table [V padded, D], N(0, 1), not scaled (PaLM section 5)."""

    config: Decoder

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        shape = (self.config.padded_vocab_size, self.config.d_model)
        table = parameter(self, "embedding", shape, ("vocab", "embed"), normal(1.0))
        return sharding.take(table, tokens, RESIDUAL, self.config.dtype)


class Stack(nn.Module):
    """The scanned layers and the final norm."""

    config: Decoder

    @nn.compact
    def __call__(self, x: jax.Array, rows: Any, cache: Any, dropout_key: jax.Array | None) -> tuple[jax.Array, Any]:
        c = self.config
        policy = keep_all_but_gathers if c.remat is None else c.remat.build()
        block = nn.remat(c.block.build(), policy=policy, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            unroll=min(c.unroll, c.num_layers),
            metadata_params={nn.PARTITION_NAME: STACKED},
        )
        attention_only = c.remat is not None and c.remat.attention_only
        stack = layers(c.block, attention_only, c.dropout, name="layers")
        (x, cache), _ = stack((x, cache), jnp.arange(c.num_layers), rows, dropout_key)
        return c.final_norm.build("decoder_norm")(x), cache
