"""NVIDIA's cards as XLA wants them described to compile for one that is not there.

What NVIDIA prints of each: CUDA C++ programming guide, table of compute capabilities; datasheets.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """capability: compute capability, (major, minor). shared_memory: bytes a multiprocessor. l2: bytes. clock: GHz."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    l2: int
    clock: float


A100 = Card(capability=(8, 0), multiprocessors=108, shared_memory=167936, l2=40 << 20, clock=1.41)
HOPPER = Card(capability=(9, 0), multiprocessors=132, shared_memory=233472, l2=50 << 20, clock=1.98)
CARDS = {"a100": A100, "h100": HOPPER, "h200": HOPPER}
"""The SXM ones. An H100 and an H200 differ in their memory alone."""

RESERVED = 1024
"""Bytes of a multiprocessor's shared memory that the system takes from every block."""


def target(card: Card, *, name: str, memory: int, bandwidth: int) -> str:
    """The card as a `GpuTargetConfigProto` in text form. memory: bytes. bandwidth: of the memory, bytes a second."""
    major, minor = card.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {card.shared_memory - RESERVED}
  shared_memory_per_core: {card.shared_memory} core_count: {card.multiprocessors} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {card.l2} clock_rate_ghz: {card.clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
