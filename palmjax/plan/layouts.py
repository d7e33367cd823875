"""Layouts of a job: which meshes, remat policies, microbatches and residual layouts are legal, and a quick guess of
each.

The guess only decides what is worth compiling, in which order: bytes and seconds from a page of arithmetic. What a plan
reports comes from the compiler.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax

from palmjax import sharding
from palmjax.config import ConfigError, Experiment
from palmjax.models.account import account
from palmjax.models.decoder import KeepProjections, RecomputeAll, RecomputeAttention, RecomputeElementwise
from palmjax.plan import chips
from palmjax.plan.topology import Topology

KEEP_INNER = KeepProjections(names=("wi_0", "wi_1", "wi"))
"""Nothing of the feed-forward layer is computed twice, and attention keeps no memory."""
REMAT = (None, RecomputeAttention(), RecomputeElementwise(), KEEP_INNER, KeepProjections(), RecomputeAll())
MICROBATCHES = (1, 2, 4, 8, 16)
MATMUL_EFFICIENCY = 0.8
"""Of the peak, in the guess: about what the compiler's own cycles come to for large matmuls."""


def policy_name(remat: Any) -> str:
    """A remat policy's name in gin, "None" for none."""
    return "None" if remat is None else type(remat).__name__


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to run a job: mesh axis sizes, remat policy, microbatches, residual stream over the tensor axis, rows,
    and the compiler's flags.
    """

    data: int
    fsdp: int
    tensor: int
    remat: Any
    microbatches: int
    residual: bool
    rows: int
    options: str = ""

    def apply(self, experiment: Experiment) -> Experiment:
        """`experiment` in this layout."""
        model: Any = experiment.model
        return dataclasses.replace(
            experiment,
            mesh=dataclasses.replace(experiment.mesh, data=self.data, fsdp=self.fsdp, tensor=self.tensor),
            sharding=dataclasses.replace(experiment.sharding, residual=("tensor",) if self.residual else ()),
            model=dataclasses.replace(model, remat=self.remat),
            train=dataclasses.replace(experiment.train, microbatches=self.microbatches),
        )

    def bindings(self, given: Layout | None = None) -> list[str]:
        """gin bindings that set this layout; with `given`, only those that differ from it."""
        values = {
            "MeshConfig.data": self.data,
            "MeshConfig.fsdp": self.fsdp,
            "MeshConfig.tensor": self.tensor,
            "ShardingRules.residual": '("tensor",)' if self.residual else "()",
            "Decoder.remat": "None" if self.remat is None else f"@{policy_name(self.remat)}()",
            **{
                f"{policy_name(self.remat)}.{key}": repr(value).replace("'", '"')  # single quotes are the shell's
                for key, value in (vars(self.remat) if self.remat else {}).items()
            },
            "TrainConfig.microbatches": self.microbatches,
            "BATCH_SIZE": self.rows,
        }
        if given is not None:
            old = dict(text.split(" = ") for text in given.bindings())
            values = {key: value for key, value in values.items() if old.get(key) != str(value)}
        return [f"{key} = {value}" for key, value in values.items()]

    def __str__(self) -> str:
        residual = ", residual over tensor" if self.residual else ""
        policy = policy_name(self.remat)
        if isinstance(self.remat, KeepProjections):
            policy += f" ({' '.join(self.remat.names)})"
        return (
            f"data={self.data} fsdp={self.fsdp} tensor={self.tensor}, {policy}, "
            f"{self.microbatches} microbatch{'es' if self.microbatches > 1 else ''}{residual}, "
            f"{self.rows} rows{', flags' if self.options else ''}"
        )


FULL_MEMORY = (
    "--xla_tpu_scheduler_percent_shared_memory_limit=100 --xla_jf_rematerialization_percent_shared_memory_limit=100"
)
"""Let the scheduler fill a device's memory before it gives up overlap, and recomputes what it was told to keep; by
default it stops well short. PaLM 540B with both feed-forward products kept takes 17.6 s a step without and 13.3 s with,
at 30.5 GiB. paxml's launch scripts for v4 raise the second one in the same way."""
FAST = {
    "v4": f"--xla_enable_async_all_gather=true {FULL_MEMORY}",
    "v5e": "--xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    f"--xla_enable_async_all_gather=true {FULL_MEMORY}",
    "v5p": f"--xla_enable_async_all_gather=true --xla_enable_async_collective_permute=true {FULL_MEMORY}",
}
"""Flags (LIBTPU_INIT_ARGS) that let collectives run beside compute, off by default; as MaxText's launch scripts for
each chip set them (AI-Hypercomputer/maxtext, `src/maxtext/configs/tpu`)."""


def current(experiment: Experiment, topology: Topology, rows: int, options: str = "") -> Layout:
    """The layout that an experiment asks for. Raises ConfigError if its mesh does not match the topology."""
    from palmjax import mesh

    sizes = dict(zip(mesh.axes(experiment.mesh), mesh.shape(experiment.mesh, topology.devices), strict=True))
    return Layout(
        data=sizes["data"],
        fsdp=sizes["fsdp"],
        tensor=sizes["tensor"],
        remat=getattr(experiment.model, "remat", None),
        microbatches=experiment.train.microbatches,
        residual="tensor" in experiment.sharding.residual,
        rows=rows,
        options=options,
    )


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a layout would hold on a device, bytes, and take a step, seconds."""

    bytes: float
    seconds: float


class Guesser:
    """Legality and guesses for the layouts of one experiment on one topology."""

    def __init__(self, experiment: Experiment, topology: Topology, length: int) -> None:
        hardware = topology.hardware
        if hardware is None:
            raise ConfigError(
                "layouts are searched for accelerators; a CPU has no network and no peak to weigh them by"
            )
        self.experiment, self.topology, self.hardware, self.length = experiment, topology, hardware, length
        model: Any = experiment.model
        self.model = model
        built = model.build()
        self.params = [
            (leaf.shape, axes)
            for leaf, axes in zip(
                jax.tree.leaves(built.abstract_params()),
                jax.tree.leaves(built.axes, is_leaf=lambda x: isinstance(x, tuple)),
                strict=True,
            )
        ]
        self.flops = account(model, length).flops_per_token
        block = getattr(model.block, "blocks", (model.block,))[0]
        self.heads, self.head_dim = block.attention.num_heads, block.attention.head_dim
        self.kv_heads = block.attention.num_kv_heads
        inside = [shape for shape, axes in self.params if axes and axes[0] == "layers"]
        self.layer_values = sum(math.prod(shape) for shape in inside) / model.num_layers
        widths = [shape[axes.index("mlp")] for shape, axes in self.params if "mlp" in axes and axes[0] == "layers"]
        # Matmuls that a block does not end with, by module: values of a token.
        self.inner: dict[str, float] = {}
        for (path, leaf), (_, axes) in zip(
            jax.tree_util.tree_leaves_with_path(built.abstract_params()), self.params, strict=True
        ):
            if axes[:2] == ("layers", "embed") and leaf.ndim > 2:
                name = path[-2].key
                self.inner[name] = self.inner.get(name, 0.0) + math.prod(leaf.shape[2:])
        self.mlp_outputs = sum(widths) - (max(widths) if widths else 0)  # all but the last one's input

    def layouts(self, rows: tuple[int, ...], options_given: str = "") -> Iterator[Layout]:
        """Every legal layout: factorisations of the devices, policies, microbatches, residual layouts, batches,
        flags.
        """
        expert = self.experiment.mesh.expert
        devices = self.topology.devices // max(expert, 1)
        for tensor in _divisors(devices):
            for fsdp in _divisors(devices // tensor):
                data = devices // tensor // fsdp
                if data % self.topology.slices or self._shares(data, fsdp, tensor) is None:
                    continue
                for remat, parts, batch in itertools.product(REMAT, MICROBATCHES, rows):
                    if batch % (data * fsdp * max(expert, 1) * parts):
                        continue
                    for residual in (False, True) if tensor > 1 else (False,):
                        for options in dict.fromkeys((options_given, FAST.get(self.topology.key, options_given))):
                            yield Layout(data, fsdp, tensor, remat, parts, residual, batch, options)

    def _shares(self, data: int, fsdp: int, tensor: int) -> float | None:
        """Parameter values on a device; None if an axis does not divide a dimension."""
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": max(self.experiment.mesh.expert, 1)}
        total = 0.0
        for shape, axes in self.params:
            try:
                dims = sharding.mesh_axes(self.experiment.sharding, axes, shape, sizes, "parameter")
            except ConfigError:
                return None
            total += math.prod(shape) / math.prod(sizes[axis] for dim in dims for axis in dim)
        return total

    def guess(self, layout: Layout) -> Guess:
        """Bytes and seconds of a legal layout."""
        model, t = self.model, layout.tensor
        shares = self._shares(layout.data, layout.fsdp, t)
        assert shares is not None, layout
        tokens = layout.rows * self.length / (layout.data * layout.fsdp) / layout.microbatches
        d = model.d_model / (t if layout.residual else 1)
        hidden = self.mlp_outputs / t
        queries, keys = self.heads * self.head_dim / t, 2 * self.kv_heads * self.head_dim
        scores = self.heads / t * self.length
        products = queries + keys + hidden + 2 * d
        kept = {
            "None": 2 * products + 2 * hidden + 4 * scores,
            "RecomputeAttention": 2 * products + 2 * hidden,
            "RecomputeElementwise": products - 2 * d,  # what a block ends with no gradient needs
            "RecomputeAll": 0.0,
        }.get(policy_name(layout.remat), products)
        if isinstance(layout.remat, KeepProjections):
            kept = sum(width / t for name, width in self.inner.items() if name in layout.remat.names)
        vocab = model.padded_vocab_size
        accumulated = 4.0 * shares * (1 if layout.microbatches > 1 else 0.5)
        held = (
            12.0 * shares  # parameters and two moments, float32
            + accumulated
            + 2.0 * tokens * (d + kept) * model.num_layers
            + max(6.0 * tokens * vocab / t, 2.0 * tokens * (4 * model.d_model + 3 * hidden) + 6.0 * tokens * scores)
            + 8.0 * vocab * model.d_model / t
            + 4.0 * self.layer_values / t
        )
        return Guess(held, self._seconds(layout, tokens))

    def _seconds(self, layout: Layout, tokens: float) -> float:
        model, t = self.model, layout.tensor
        again = {
            "None": 0.0,
            "RecomputeAttention": 0.02,
            "RecomputeElementwise": 0.02,
            "RecomputeAll": 0.22,
        }
        extra = again.get(policy_name(layout.remat), 0.1)
        if isinstance(layout.remat, KeepProjections):
            lost = sum(width for name, width in self.inner.items() if name not in layout.remat.names)
            extra = 0.02 + 0.2 * lost / sum(self.inner.values())
        devices = self.topology.devices
        peak = self.hardware.chip.flops_per_device
        compute = self.flops * (1 + extra) * layout.rows * self.length / devices / peak / MATMUL_EFFICIENCY
        link = 2 * self.hardware.link_bandwidth * chips.ICI_EFFICIENCY
        dims = max(self.hardware.ici_dims, 1)
        overlap = 0.6 if layout.options else 1.0  # what asynchronous gathers leave exposed, about
        # The tensor axis takes whole dimensions of the torus; where it takes a part of one, it is a line and not a
        # ring, and the gathers over the rest share its links.
        whole = {math.prod(c) for n in range(dims + 1) for c in itertools.combinations(self.topology.shape, n)}
        apart = 1.0 if t in whole else 2.0
        gathered = 2.0 * self.layer_values / t * model.num_layers * 3 * layout.microbatches
        fsdp = apart**2 * gathered / (link * max(dims - (t > 1), 1)) if layout.fsdp > 1 else 0.0
        moved = 2.0 * tokens * model.d_model * layout.microbatches * model.num_layers * (5 + (extra > 0.1))
        tensor = apart * moved * (t - 1) / t / link
        return compute + fsdp * overlap + tensor


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
