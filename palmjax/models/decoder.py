"""A decoder: embeddings, a stack of blocks scanned over layers, a final norm and logits."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from palmjax import sharding
from palmjax.config import ConfigError, ModelPart, Part, require, section
from palmjax.models.attention import AttentionPart, Rows
from palmjax.models.embeddings import RESIDUAL, Embedding, HeadPart, TiedHead, TokenEmbedder, VectorEmbedder
from palmjax.models.layers import FeedForwardPart, LayerNorm, NormPart, Report
from palmjax.models.parameters import STACKED, Context, FanIn, InitPart, dropout

Carry = tuple[jax.Array, dict[str, jax.Array] | None]
"""Hidden states and the cache. The cache is carried, so that a token's write touches only its own entries."""


UPDATE = "update"
"""Name, for remat policies, of what a block adds to the residual stream."""


def keep_all_but_gathers(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """A `jax.checkpoint` policy: keep everything but weights gathered over fsdp (and casts, which lead up to them).

    The scan over layers would stack what is kept: the whole unsharded model on every device. Partial sums are not kept
    either: the sum is, by its name.
    """
    return primitive.name not in ("reshard", "convert_element_type") and not sharding.is_partial(inputs, params)


def keep_matmuls(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """A `jax.checkpoint` policy: keep the results of the weight matmuls, of partial sums the sum."""
    if primitive.name == "name":
        return params["name"] == UPDATE
    matmul = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *inputs, **params)
    return bool(matmul) and not sharding.is_partial(inputs, params)


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
        return keep_matmuls


@section
class KeepProjections(RematPart):
    """Keep each block's input and the results of the weight matmuls named, recompute the rest: between RecomputeAll and
    RecomputeElementwise, as memory allows.

    names: of the modules; `wi_0` and `wi_1` are a gated layer's, `wi` another's. Those of a block's last matmuls
    (`out`, `wo`) are of no use: no gradient needs them.
    """

    names: tuple[str, ...] = ("query", "wi_1", "wi")

    matmuls_again = 0.5

    def __post_init__(self) -> None:
        require(len(self.names) > 0, self, "names", "one matmul or more; RecomputeAll keeps none")

    def build(self) -> Any:
        return jax.checkpoint_policies.save_only_these_names(*self.names)


@section
class RecomputeAttention(RematPart):
    """Keep all but the inside of attention (PaLM appendix B: 8B and 62B recompute attention only)."""

    attention_only = True


class BlockPart(Part):
    """One layer, or several that repeat together.

    `build(context)` returns the Linen module class of the scan's body, made with (config, context):
    (carry, layer, rows, dropout_key) -> (carry, Report), with `layer` the number of the turn.
    """

    module: ClassVar[type[nn.Module]]

    def build(self, context: Context) -> type[nn.Module]:
        return nn.remat(self.module, policy=context.policy, prevent_cse=False) if context.policy else self.module

    @property
    def layers(self) -> tuple[LayerPart, ...]:
        """The layers of one turn."""
        raise NotImplementedError


class LayerPart(BlockPart):
    """One layer: attention and a feed-forward layer around the residual stream."""

    attention: AttentionPart
    mlp: FeedForwardPart

    @property
    def layers(self) -> tuple[LayerPart, ...]:
        return (self,)


class LayerModule(nn.Module):
    """What the layers' modules have in common."""

    config: Any
    context: Context

    def attend(self, h: jax.Array, rows: Rows, cache: Any, layer: jax.Array) -> tuple[jax.Array, Any]:
        return self.config.attention.build("self_attention", self.context)(h, rows, cache, layer)

    def feed_forward(self, h: jax.Array, rows: Rows, cache: Any) -> tuple[jax.Array, Report]:
        # Against a cache a token must not depend on which others are read with it: experts drop none.
        return self.config.mlp.build("mlp", self.context)(h, rows, dropless=cache is not None)

    def drop(self, update: jax.Array, key: jax.Array | None, number: jax.Array) -> jax.Array:
        """What a block adds to the residual stream, laid out like it, with dropout."""
        update = checkpoint_name(sharding.total((update,), RESIDUAL), UPDATE)
        key = None if key is None else jax.random.fold_in(key, number)
        return dropout(update, self.context.dropout, key, RESIDUAL)


class ParallelBlockModule(LayerModule):
    """The parallel block."""

    @nn.compact
    def __call__(self, carry: Carry, layer: jax.Array, rows: Rows, dropout_key: Any) -> tuple[Carry, Report]:
        x, cache = carry
        h = self.config.norm.build("pre_norm")(x)
        mlp_h = h if self.config.mlp_norm is None else self.config.mlp_norm.build("mlp_norm")(x)
        attended, cache = self.attend(h, rows, cache, layer)
        fed, report = self.feed_forward(mlp_h, rows, cache)
        return (x + self.drop(sharding.total((attended, fed), RESIDUAL), dropout_key, layer), cache), report


@section
class ParallelBlock(LayerPart):
    """y = x + MLP(Norm(x)) + Attention(Norm(x)), one norm for both (PaLM section 2, GPT-J).

    mlp_norm: a norm of the feed-forward layer's own; None for the one norm (GPT-NeoX and Falcon-40B have two).
    """

    attention: AttentionPart
    mlp: FeedForwardPart
    norm: NormPart = LayerNorm()
    mlp_norm: NormPart | None = None

    module = ParallelBlockModule


class SerialBlockModule(LayerModule):
    """The serial block."""

    @nn.compact
    def __call__(self, carry: Carry, layer: jax.Array, rows: Rows, dropout_key: Any) -> tuple[Carry, Report]:
        x, cache = carry
        attended, cache = self.attend(self.config.norm.build("pre_norm")(x), rows, cache, layer)
        x = x + self.drop(attended, dropout_key, 2 * layer)
        fed, report = self.feed_forward(self.config.norm.build("mlp_norm")(x), rows, cache)
        return (x + self.drop(fed, dropout_key, 2 * layer + 1), cache), report


@section
class SerialBlock(LayerPart):
    """x = x + Attention(Norm(x)), then x + MLP(Norm(x)) (GPT-2, LLaMA): each sublayer behind a norm of its own."""

    attention: AttentionPart
    mlp: FeedForwardPart
    norm: NormPart = LayerNorm()

    module = SerialBlockModule


class PostNormBlockModule(LayerModule):
    """The block of the original Transformer."""

    @nn.compact
    def __call__(self, carry: Carry, layer: jax.Array, rows: Rows, dropout_key: Any) -> tuple[Carry, Report]:
        x, cache = carry
        attended, cache = self.attend(x, rows, cache, layer)
        x = self.config.norm.build("attention_norm")(x + self.drop(attended, dropout_key, 2 * layer))
        fed, report = self.feed_forward(x, rows, cache)
        x = self.config.norm.build("mlp_norm")(x + self.drop(fed, dropout_key, 2 * layer + 1))
        return (x, cache), report


@section
class PostNormBlock(LayerPart):
    """x = Norm(x + Attention(x)), then Norm(x + MLP(x)) (Vaswani et al. 2017; BERT, OPT-350M)."""

    attention: AttentionPart
    mlp: FeedForwardPart
    norm: NormPart = LayerNorm()

    module = PostNormBlockModule


class BlockCycleModule(nn.Module):
    """One turn of a cycle; its layers are `block_0`, `block_1` and so on."""

    config: BlockCycle
    context: Context

    @nn.compact
    def __call__(self, carry: Carry, layer: jax.Array, rows: Rows, dropout_key: Any) -> tuple[Carry, Report]:
        report: Report = {}
        for number, block in enumerate(self.config.blocks):
            module = block.build(self.context)(block, self.context, name=f"block_{number}")
            index = layer * len(self.config.blocks) + number
            carry, more = module(carry, index, rows, dropout_key)
            report = report | {name: report.get(name, 0.0) + value for name, value in more.items()}
        return carry, report


@section
class BlockCycle(BlockPart):
    """Layers that differ in turn: layer i is blocks[i mod n] (GPT-3's dense and banded layers, GLaM's experts in every
    second one). The scan goes over turns.
    """

    blocks: tuple[LayerPart, ...]

    def __post_init__(self) -> None:
        require(len(self.blocks) >= 1, self, "blocks", "one block or more")

    def build(self, context: Context) -> type[nn.Module]:
        return BlockCycleModule  # its blocks are rematerialised one by one

    @property
    def layers(self) -> tuple[LayerPart, ...]:
        return self.blocks


@section
class Decoder(ModelPart):
    """A decoder-only language model, or, with attention that is not causal, an encoder.

    vocab_size: ids the model knows; vocab_multiple: the table is padded to a multiple of this, so that a mesh axis
    divides it (padding never gets probability and is counted apart). block: of every layer; see BlockCycle.
    final_norm: None for none (post-norm blocks). init: of fresh parameters. dtype: of activations; parameters are
    float32, and training in float16 needs Experiment.loss_scale. remat: None keeps everything. unroll: layers a loop
    iteration of the scan over layers (num_layers: no loop; compiles longer). dropout: PaLM trains with 0 and finetunes
    mostly with 0.1.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    block: BlockPart
    embedding: Embedding = Embedding()
    final_norm: NormPart | None = LayerNorm()
    head: HeadPart = TiedHead()
    init: InitPart = FanIn()
    vocab_multiple: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    remat: RematPart | None = None
    unroll: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in ("vocab_size", "num_layers", "d_model", "vocab_multiple", "unroll"):
            if getattr(self, field) < 1:
                raise ConfigError(f"Decoder.{field} = {getattr(self, field)}: must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"Decoder.dropout = {self.dropout}: must be in [0, 1)")
        turn = self.block.layers
        require(self.num_layers % len(turn) == 0, self, "num_layers", f"a multiple of BlockCycle's {len(turn)} blocks")
        heads = {(layer.attention.num_kv_heads, layer.attention.head_dim) for layer in turn}
        if len(heads) > 1:
            raise ConfigError(
                "BlockCycle.blocks: all layers share one key/value cache, so num_kv_heads and head_dim must be equal; "
                f"there are (num_kv_heads, head_dim) = {', '.join(map(str, sorted(heads)))}"
            )
        if not self.head.tied and self.embedding.width not in (None, self.d_model):
            raise ConfigError(
                f"Embedding.width = {self.embedding.width}: an untied head reads d_model = {self.d_model}"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def turns(self) -> int:
        """Steps of the scan over layers: num_layers, or fewer where several layers repeat together."""
        return self.num_layers // len(self.block.layers)

    @property
    def attention(self) -> AttentionPart:
        """The first layer's attention; heads and their size are every layer's."""
        return self.block.layers[0].attention

    @property
    def max_length(self) -> int | None:
        """The longest row the model has positions for; None for any."""
        return None if self.embedding.positions is None else self.embedding.positions.length

    @property
    def context(self) -> Context:
        """What the parts need to know of the decoder."""
        return Context(
            d_model=self.d_model,
            num_layers=self.num_layers,
            init=self.init,
            recompute_attention=self.remat is not None and self.remat.attention_only,
            dropout=self.dropout,
            policy=keep_all_but_gathers if self.remat is None else self.remat.build(),
        )

    def build(self) -> Any:
        from palmjax.models.api import LanguageModel

        return LanguageModel(self)


class DecoderModule(nn.Module):
    """Token ids to the final hidden states. one_turn: a single turn of the layers, not stacked, for its shapes."""

    config: Decoder
    one_turn: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        rows: Rows,
        types: jax.Array | None = None,
        cache: dict[str, jax.Array] | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None, Report]:
        """tokens: int32 [B, T]; types: kinds of tokens, int32 [B, T], None for all 0.

        Returns hidden [B, T, D] in the compute dtype, the cache, and what the layers report, summed over layers.
        """
        c = self.config
        x = self._embed(tokens, rows.positions, types)
        if dropout_key is not None:
            x = dropout(x, c.dropout, jax.random.fold_in(dropout_key, 2 * c.num_layers), RESIDUAL)
        return Stack(c, self.one_turn, name="decoder")(x, rows, cache, dropout_key)

    def _embed(self, tokens: jax.Array, positions: jax.Array, types: jax.Array | None) -> jax.Array:
        c, part, context = self.config, self.config.embedding, self.config.context
        x = TokenEmbedder(part, context, c.padded_vocab_size, c.dtype, name="token_embedder")(tokens)
        if (learned := part.positions) is not None:
            count = learned.length + learned.offset
            embedder = VectorEmbedder(count, "positions", context, c.dtype, name="position_embedder")
            x = x + embedder(positions + learned.offset)
        if part.types is not None:
            embedder = VectorEmbedder(part.types.count, "token_types", context, c.dtype, name="type_embedder")
            x = x + embedder(jnp.zeros_like(tokens) if types is None else types)
        return x if part.norm is None else part.norm.build("embedding_norm")(x)


class Stack(nn.Module):
    """The scanned layers and the final norm."""

    config: Decoder
    one_turn: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, rows: Rows, cache: Any, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, Any, Report]:
        c, context = self.config, self.config.context
        shared = c.attention.positions.shared(c.attention.num_heads, context, x.dtype)
        rows = dataclasses.replace(rows, shared=shared)
        if self.one_turn:
            context = dataclasses.replace(context, policy=None)
            turn = c.block.build(context)(c.block, context, name="layers")
            (x, cache), report = turn((x, cache), jnp.int32(0), rows, dropout_key)
        else:
            layers = nn.scan(
                c.block.build(context),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=c.turns,
                unroll=min(c.unroll, c.turns),
                metadata_params={nn.PARTITION_NAME: STACKED},
            )(c.block, context, name="layers")
            (x, cache), report = layers((x, cache), jnp.arange(c.turns), rows, dropout_key)
        x = x if c.final_norm is None else c.final_norm.build("decoder_norm")(x)
        return x, cache, {name: jnp.sum(value) for name, value in report.items()}
