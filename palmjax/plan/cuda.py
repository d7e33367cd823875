"""NVIDIA GPUs without one: XLA compiles for a description of the card. Needs the CUDA plugin, no driver and no GPU.

What a plan takes from it is whether the step compiles and how much memory it needs; its time is a roofline (`cost.py`).
The descriptions hold what NVIDIA prints of each card (CUDA C++ programming guide, compute capabilities; datasheets).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from palmjax.config import ConfigError
from palmjax.plan.network import PER_NODE
from palmjax.plan.topology import Topology

_CARDS = {
    # key: compute capability, multiprocessors, shared memory a multiprocessor, L2 bytes, GHz
    "a100": ((8, 0), 108, 167936, 40 * 2**20, 1.41),
    "h100": ((9, 0), 132, 233472, 50 * 2**20, 1.98),
    "h200": ((9, 0), 132, 233472, 50 * 2**20, 1.98),
}

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {optin} shared_memory_per_core: {shared}
  core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


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
    hosts, rest = divmod(count, PER_NODE)
    if count > PER_NODE and rest:
        raise ConfigError(f"--topology={topology}: more than {PER_NODE} GPUs are whole nodes of {PER_NODE}")
    shape = f"1x{hosts}x{PER_NODE}" if hosts else f"1x1x{count}"
    return list(topologies.get_topology_desc(platform="cuda", target_config=target(topology), topology=shape).devices)


def target(topology: Topology) -> str:
    """The card's description, a `GpuTargetConfigProto` in text form."""
    hardware = topology.hardware
    assert hardware is not None
    (major, minor), cores, shared, l2, clock = _CARDS[topology.key]
    return _TARGET.format(
        optin=shared - 1024,
        shared=shared,
        cores=cores,
        bandwidth=int(hardware.hbm_bandwidth),
        l2=l2,
        clock=clock,
        memory=hardware.chip.hbm_bytes,
        major=major,
        minor=minor,
        name=hardware.chip.kinds[0],
    )
