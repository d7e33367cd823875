"""Accelerator chips by the name that JAX reports: peak FLOP/s and memory. Plain data, imports nothing.

MFU divides by these peaks, so each row names where its numbers were read. Peaks are dense (without 2:4 sparsity)
16-bit matrix multiplication. Memory is what the vendor prints, read as GiB; a program can use a few per cent less.
"""

from __future__ import annotations

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator.

    name: the vendor's. kinds: every `jax.Device.device_kind` that it goes by.
    bf16_flops: peak FLOP/s of a chip; of float16 where there is no bfloat16 (V100). hbm_bytes: memory of a chip.
    devices: JAX devices of a chip. TPU v2, v3 and TPU7x show each TensorCore as a device; v4 and v5p fuse their two.
    source: where peak and memory were read.
    """

    name: str
    kinds: tuple[str, ...]
    bf16_flops: float
    hbm_bytes: int
    devices: int = 1
    source: str

    @property
    def flops_per_device(self) -> float:
        """Peak dense bf16 FLOP/s of one JAX device."""
        return self.bf16_flops / self.devices

    @property
    def hbm_bytes_per_device(self) -> int:
        """Memory of one JAX device, bytes."""
        return self.hbm_bytes // self.devices


CHIPS: tuple[Chip, ...] = (
    Chip(
        name="TPU v3",
        kinds=("TPU v3",),
        bf16_flops=123e12,
        hbm_bytes=32 * _GIB,
        devices=2,
        source="cloud.google.com/tpu/docs/v3",
    ),
    Chip(
        name="TPU v4",
        kinds=("TPU v4",),
        bf16_flops=275e12,
        hbm_bytes=32 * _GIB,
        source="cloud.google.com/tpu/docs/v4; PaLM (arXiv:2204.02311) appendix B",
    ),
    Chip(
        name="TPU v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        bf16_flops=197e12,
        hbm_bytes=16 * _GIB,
        source="cloud.google.com/tpu/docs/v5e",
    ),
    Chip(
        name="TPU v5p",
        kinds=("TPU v5p", "TPU v5"),
        bf16_flops=459e12,
        hbm_bytes=95 * _GIB,
        source="cloud.google.com/tpu/docs/v5p",
    ),
    Chip(
        name="TPU v6e (Trillium)",
        kinds=("TPU v6 lite", "TPU v6e"),
        bf16_flops=918e12,
        hbm_bytes=32 * _GIB,
        source="cloud.google.com/tpu/docs/v6e",
    ),
    Chip(
        name="TPU7x (Ironwood)",
        kinds=("TPU7x",),
        bf16_flops=2307e12,
        hbm_bytes=192 * _GIB,
        devices=2,
        source="cloud.google.com/tpu/docs/tpu7x",
    ),
    Chip(
        name="NVIDIA V100 SXM2 16 GB",
        kinds=("Tesla V100-SXM2-16GB",),
        bf16_flops=125e12,
        hbm_bytes=16 * _GIB,
        source="NVIDIA V100 datasheet (float16)",
    ),
    Chip(
        name="NVIDIA V100 SXM2 32 GB",
        kinds=("Tesla V100-SXM2-32GB",),
        bf16_flops=125e12,
        hbm_bytes=32 * _GIB,
        source="NVIDIA V100 datasheet (float16)",
    ),
    Chip(
        name="NVIDIA A100 40 GB",
        kinds=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
        bf16_flops=312e12,
        hbm_bytes=40 * _GIB,
        source="NVIDIA A100 datasheet",
    ),
    Chip(
        name="NVIDIA A100 80 GB",
        kinds=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        bf16_flops=312e12,
        hbm_bytes=80 * _GIB,
        source="NVIDIA A100 datasheet",
    ),
    Chip(
        name="NVIDIA H100 SXM",
        kinds=("NVIDIA H100 80GB HBM3",),
        bf16_flops=989e12,
        hbm_bytes=80 * _GIB,
        source="NVIDIA H100 datasheet: 1979 TFLOP/s with sparsity, halved",
    ),
    Chip(
        name="NVIDIA H100 PCIe",
        kinds=("NVIDIA H100 PCIe",),
        bf16_flops=756e12,
        hbm_bytes=80 * _GIB,
        source="NVIDIA H100 datasheet: 1513 TFLOP/s with sparsity, halved",
    ),
    Chip(
        name="NVIDIA H200 SXM",
        kinds=("NVIDIA H200",),
        bf16_flops=989e12,
        hbm_bytes=141 * _GIB,
        source="NVIDIA H200 datasheet: 1979 TFLOP/s with sparsity, halved",
    ),
    Chip(
        name="NVIDIA B200",
        kinds=("NVIDIA B200",),
        bf16_flops=2250e12,
        hbm_bytes=180 * _GIB,
        source="glennklockwood.com/garden/processors/B200 (HGX, 1000 W) and DGX B200's 1440 GB over 8: unconfirmed",
    ),
)

_BY_KIND = {kind: chip for chip in CHIPS for kind in chip.kinds}


def find(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None when it is not in the table (a CPU, a MIG slice, a new chip).

    The match is exact: part of a GPU reports the whole GPU's name and a suffix, and has not the whole GPU's peak.
    """
    return _BY_KIND.get(device_kind)
