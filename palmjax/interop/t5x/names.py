"""How T5X's trees of parameters spell palmjax's: names of layers and norms, scanned layers, flat kernels.

A tree is in one of the forms that `Form` says. `palmjax` is its own tree, what a run of `t5x.train` with the adapter
saves: layers scanned over axis 0, kernels with a dimension each for heads and their size. `t5x` is that of T5X's
decoder-only network (t5x/examples/decoder_only): everything below `decoder`, `layers_N`, flat kernels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from palmjax.config import ConfigError
from palmjax.interop.mapping import Path as TreePath
from palmjax.interop.mapping import Rule, rule
from palmjax.interop.t5x import configuration
from palmjax.models.attention import Attention
from palmjax.models.decoder import Decoder, ParallelBlock, SerialBlock
from palmjax.models.embeddings import TiedHead, UntiedHead
from palmjax.models.layers import (
    GEGLU,
    MLP,
    ActivationPart,
    FeedForwardPart,
    LayerNorm,
    NormPart,
    ReLU,
    RMSNorm,
    SiLU,
    SwiGLU,
    TanhGELU,
)
from palmjax.models.positions import PositionsPart, RelativeBuckets, RoPE, SharedRelativeBuckets

STACKS = ("layers", "decoder")
"""Names of a scanned stack below `decoder`."""
PRE_NORMS = ("pre_norm", "pre_self_attention_layer_norm", "pre_attention_layer_norm", "layer_norm")
MLP_NORMS = ("mlp_norm", "pre_mlp_layer_norm")

ENCODER = re.compile(r"^encoder/|/encoder_decoder_attention/")
"""In the names of T5X's encoders and encoder-decoders."""

JOINED: dict[TreePath, tuple[str, str]] = {
    **{("self_attention", name, "kernel"): ("d (h n)", "d h n") for name in ("query", "key", "value")},
    **{("self_attention", name, "bias"): ("(h n)", "h n") for name in ("query", "key", "value")},
    ("self_attention", "out", "kernel"): ("(h n) d", "h n d"),
}
"""Parameters with heads: axes of T5X's flat kernels, and palmjax's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a tree is spelt.

    pre_norm, mlp_norm, embedder: names in it. stack: name of the scanned stack, None for `layers_N`. scan_axis: of the
    stack's arrays. flat: whether heads and their size are one dimension.
    """

    embedder: str = "token_embedder"
    pre_norm: str = "pre_norm"
    mlp_norm: str = "mlp_norm"
    stack: str | None = "layers"
    scan_axis: int = 0
    flat: bool = False

    def rules(self, shapes: Mapping[TreePath, tuple[int, ...]]) -> list[Rule]:
        """The name map between this form and palmjax's parameters, which have `shapes`."""
        return [self._rule(path, len(shape)) for path, shape in shapes.items()]

    def _rule(self, path: TreePath, dimensions: int) -> Rule:
        parameter, in_layer = "/".join(path), path[:2] == ("decoder", "layers")
        axes = to = " ".join("abcdef"[: dimensions - in_layer])
        if self.flat:
            axes, to = JOINED.get(path[-3:], (axes, to))
        name = re.sub(r"^token_embedder/", f"{self.embedder}/", parameter)
        if not in_layer:
            return rule(name, parameter, f"{axes} -> {to}")
        for old, new in (("pre_norm", self.pre_norm), ("mlp_norm", self.mlp_norm)):
            name = name.replace(f"decoder/layers/{old}/", f"decoder/layers/{new}/")
        if self.stack is None:
            return rule(name.replace("decoder/layers/", "decoder/layers_{layer}/"), parameter, f"{axes} -> {to}")
        groups = re.findall(r"\([^)]*\)|\S+", axes)
        groups.insert(min(self.scan_axis, len(groups)), "l")
        return rule(
            name.replace("decoder/layers/", f"decoder/{self.stack}/"), parameter, f"{' '.join(groups)} -> l {to}"
        )


PALMJAX = Form()
T5X = Form(
    embedder="decoder/token_embedder",
    pre_norm="pre_self_attention_layer_norm",
    mlp_norm="pre_mlp_layer_norm",
    stack=None,
    flat=True,
)


class Tree:
    """The shapes of a T5X tree, and what follows from them. Raises ConfigError for one that is no decoder's."""

    def __init__(self, shapes: Mapping[TreePath, tuple[int, ...]], where: str):
        self._shapes, self._where = {"/".join(path): shape for path, shape in shapes.items()}, where
        if encoder := next((name for name in self._shapes if ENCODER.search(name)), None):
            raise ConfigError(f"{where} is of a model with an encoder ({encoder}); palmjax has decoders only")
        self.form = self._form()

    def _form(self) -> Form:
        embedder = self._present(("token_embedder", "decoder/token_embedder"), "{}/embedding", "embedding table")
        width = self._shapes[f"{embedder}/embedding"][1]
        unscanned = any(name.startswith("decoder/layers_0/") for name in self._shapes)
        stack = None if unscanned else self._present(STACKS, "decoder/{}/self_attention/query/kernel", "stack")
        below = "decoder/layers_0" if unscanned else f"decoder/{stack}"
        pre_norm = self._present(PRE_NORMS, below + "/{}/scale", "norm before attention")
        mlp_norms = [name for name in MLP_NORMS if f"{below}/{name}/scale" in self._shapes]
        norm = self._shapes[f"{below}/{pre_norm}/scale"]
        dimensions = len(self._shapes.get(f"{below}/self_attention/query/kernel", ())) - (not unscanned)
        # T5X scans over axis 1; where both axes are equally long, its names tell.
        first = norm[-1] == width and (len(norm) < 2 or norm[0] != width or pre_norm == "pre_norm")
        return Form(
            embedder=embedder,
            pre_norm=pre_norm,
            mlp_norm=mlp_norms[0] if mlp_norms else "mlp_norm",
            stack=stack,
            scan_axis=0 if unscanned or first else 1,
            flat=dimensions == 2,
        )

    def _present(self, names: Iterable[str], path: str, what: str) -> str:
        for name in names:
            if path.format(name) in self._shapes:
                return name
        places = " or ".join(path.format(name) for name in names)
        raise ConfigError(f"{self._where} has no {what}: no {places}; give the model: palmjax convert ... MODEL.gin")

    def model(self, activation: ActivationPart | None = None) -> Decoder:
        """The model that the tree's shapes and names tell of: T5's where norms have T5X's names, else PaLM's.

        activation: of the feed-forward layers, None for what the run's config.gin says. Raises ConfigError if heads
        can't be told apart, with the way to say it.
        """
        form, t5 = self.form, self.form.pre_norm != "pre_norm"
        rows, width = self._shapes[f"{form.embedder}/embedding"]
        heads, kv_heads, head_dim = self._heads()
        norm: NormPart = RMSNorm() if t5 else LayerNorm(bias=self._has("pre_norm/bias"))
        attention = Attention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            positions=self._positions(),
            scale=1.0 if t5 else None,  # T5 folds 1/sqrt(head_dim) into the initializer
        )
        block = SerialBlock if self._has("mlp_norm/scale") else ParallelBlock
        return Decoder(
            vocab_size=rows,
            num_layers=self._layers(),
            d_model=width,
            block=block(attention=attention, mlp=self._mlp(t5, activation), norm=norm),
            final_norm=norm,
            head=UntiedHead() if "decoder/logits_dense/kernel" in self._shapes else TiedHead(),
            dtype="float32",
        )

    def _layer(self, name: str) -> tuple[int, ...] | None:
        """Shape of one layer's parameter, by palmjax's name below the stack; None if there is none."""
        form = self.form
        for old, new in (("pre_norm", form.pre_norm), ("mlp_norm", form.mlp_norm)):
            name = re.sub(f"^{old}/", f"{new}/", name)
        if form.stack is None:
            return self._shapes.get(f"decoder/layers_0/{name}")
        shape = self._shapes.get(f"decoder/{form.stack}/{name}")
        if shape is None:
            return None
        axis = min(form.scan_axis, len(shape) - 1)
        return (*shape[:axis], *shape[axis + 1 :])

    def _has(self, name: str) -> bool:
        return self._layer(name) is not None

    def _size(self, name: str) -> tuple[int, ...]:
        if (shape := self._layer(name)) is None:
            raise ConfigError(f"{self._where} has no layer's {name}; give the model: palmjax convert ... MODEL.gin")
        return shape

    def _layers(self) -> int:
        if self.form.stack is None:
            found = (re.match(r"decoder/layers_(\d+)/", name) for name in self._shapes)
            return 1 + max(int(match[1]) for match in found if match)
        norm = self._shapes[f"decoder/{self.form.stack}/{self.form.pre_norm}/scale"]
        return norm[self.form.scan_axis]

    def _heads(self) -> tuple[int, int, int]:
        query, key = self._size("self_attention/query/kernel"), self._size("self_attention/key/kernel")
        if not self.form.flat:
            return query[1], key[1], query[2]
        table = self._shapes.get("decoder/relpos_bias/rel_embedding") or self._layer(
            "self_attention/relpos_bias/rel_embedding"
        )
        if table is not None:
            return table[0], table[0] * key[1] // query[1], query[1] // table[0]
        if key[1] < query[1]:  # multi-query: the one key/value head tells the size of all
            return query[1] // key[1], 1, key[1]
        raise ConfigError(
            f"{self._where} does not tell how many heads its {query[1]} columns are; give the model: "
            "palmjax convert ... MODEL.gin"
        )

    def _positions(self) -> PositionsPart:
        if (shared := self._shapes.get("decoder/relpos_bias/rel_embedding")) is not None:
            return SharedRelativeBuckets(num_buckets=shared[1])
        if (table := self._layer("self_attention/relpos_bias/rel_embedding")) is not None:
            return RelativeBuckets(num_buckets=table[1])
        return RoPE()

    def _mlp(self, t5: bool, chosen: ActivationPart | None) -> FeedForwardPart:
        is_gated = not self._has("mlp/wi/kernel")
        usual = (TanhGELU() if t5 else SiLU()) if is_gated else ReLU()
        if chosen is None:
            # A tree with palmjax's names is of a run whose config.gin, if any, has palmjax's bindings.
            chosen = configuration.activation(Path(self._where), is_gated=is_gated, usual=usual) if t5 else usual
        if not is_gated:
            return MLP(d_ff=self._size("mlp/wi/kernel")[1], activation=chosen)
        width = self._size("mlp/wi_0/kernel")[1]
        return GEGLU(d_ff=width) if chosen == TanhGELU() else SwiGLU(d_ff=width, activation=chosen)
