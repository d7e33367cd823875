"""NVIDIA GPUs without one: XLA compiles for a description of the card. Needs the CUDA plugin, no driver and no GPU.

What a plan takes from it is whether the step compiles and how much memory it needs; its time is a roofline (`cost.py`).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from pallas_kernels import gpu_cards
from palmjax.config import ConfigError
from palmjax.plan.chips import GPUS_PER_NODE
from palmjax.plan.topology import Topology


def installed() -> bool:
    """Whether the CUDA compiler can be loaded."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") is not None for n in (13, 12))


def prepare_environment() -> None:
    """Autotuning would need the card. Call before jax starts. Raises ConfigError without the plugin."""
    if not installed():
        raise ConfigError("planning for GPUs needs the CUDA compiler: pip install 'palmjax[cuda]'")
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"


def devices(topology: Topology) -> list[Any]:
    """The JAX devices of a number of GPUs. Raises ConfigError if they fill no whole nodes."""
    from jax.experimental import topologies

    count = topology.chips
    hosts, rest = divmod(count, GPUS_PER_NODE)
    if count > GPUS_PER_NODE and rest:
        raise ConfigError(f"--topology={topology}: more than {GPUS_PER_NODE} GPUs are whole nodes of {GPUS_PER_NODE}")
    shape = f"1x{hosts}x{GPUS_PER_NODE}" if hosts else f"1x1x{count}"
    return list(topologies.get_topology_desc(platform="cuda", target_config=target(topology), topology=shape).devices)


def target(topology: Topology) -> str:
    """The card's description, a `GpuTargetConfigProto` in text form."""
    hardware = topology.hardware
    assert hardware is not None
    return gpu_cards.target(
        gpu_cards.CARDS[topology.key],
        name=hardware.chip.kinds[0],
        memory=hardware.chip.hbm_bytes,
        bandwidth=int(hardware.hbm_bandwidth),
    )
