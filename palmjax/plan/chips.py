"""What a plan must know of an accelerator, besides the peak and the memory of `palmjax.chips`: clock, memory and
network
bandwidth, power. Plain data, each figure with its source.

Bandwidths are the vendors' printed ones. `ICI_EFFICIENCY` and `DCN_EFFICIENCY` are the two places where a plan stays
below them, and say why.
"""

from __future__ import annotations

import dataclasses
import difflib

from palmjax import chips
from palmjax.config import ConfigError

ICI_EFFICIENCY = 0.9
"""What a link carries of its printed rate. "How to Scale Your Model" (jax-ml, chapter 2) lists 45 and 90 GB/s one way
where the printed rates are 50 and 100: packet headers."""

DCN_EFFICIENCY = 0.8
"""What a host's network card carries of its line rate over several TCP streams, ours: no vendor prints it."""

ICI_HOP_SECONDS = 1e-6
"""Latency of one hop between neighbouring chips: about a microsecond ("How to Scale Your Model", chapter 3)."""

DCN_SECONDS = 1e-4
"""Latency of one transfer between hosts of different slices, host work included; ours, of the order that Cloud TPU's
multislice guide shows in its traces."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of accelerator as a plan sees it.

    key: the name in `--topology`. chip: its row of `palmjax.chips`. macs_per_cycle: multiply-adds of all matrix units
    of a chip in one clock cycle. hbm_bandwidth: bytes/s of a chip. ici_dims: dimensions of the torus; 0 for none.
    link_bandwidth: bytes/s of one link in one direction (a TPU's ICI link; a GPU's NVLink altogether).
    dcn_bandwidth: bytes/s of a chip's share of its host's network card, one direction. watts: mean power of a chip in
    use, without the host; None where none is published. sources: where the figures were read.
    """

    key: str
    platform: str
    chip: chips.Chip
    macs_per_cycle: int | None
    hbm_bandwidth: float
    ici_dims: int
    link_bandwidth: float
    dcn_bandwidth: float
    watts: float | None
    sources: str

    @property
    def hbm_bandwidth_per_device(self) -> float:
        """Bytes/s of one JAX device's share of the chip's memory bandwidth."""
        return self.hbm_bandwidth / self.chip.devices

    @property
    def clock(self) -> float:
        """Cycles a second of the matrix units: what makes the printed peak."""
        if self.macs_per_cycle is None:
            raise ValueError(f"{self.key} has no published width of its matrix units")
        return self.chip.bf16_flops / (2.0 * self.macs_per_cycle)


def _chip(kind: str) -> chips.Chip:
    chip = chips.find(kind)
    assert chip is not None, kind
    return chip


GPUS_PER_NODE = 8
"""Of a DGX or HGX node, joined by NVSwitch."""

_GBIT = 1e9 / 8
_MXU = 128 * 128

HARDWARE = {
    h.key: h
    for h in (
        Hardware(
            key="v4",
            platform="tpu",
            chip=_chip("TPU v4"),
            macs_per_cycle=8 * _MXU,
            hbm_bandwidth=1200e9,
            ici_dims=3,
            link_bandwidth=50e9,
            dcn_bandwidth=25 * _GBIT,
            watts=170.0,
            sources="cloud.google.com/tpu/docs/v4 (two cores of four 128x128 MXUs; HBM; mean power). ICI: 2400 Gbit/s "
            "over six links (arXiv:2304.01433, table 4). DCN: PaLM (arXiv:2204.02311, section 4) moves 81 Tbit/s over "
            "768 pairs of four-chip hosts, a 100 Gbit/s card each.",
        ),
        Hardware(
            key="v5e",
            platform="tpu",
            chip=_chip("TPU v5e"),
            macs_per_cycle=4 * _MXU,
            hbm_bandwidth=819e9,
            ici_dims=2,
            link_bandwidth=50e9,
            dcn_bandwidth=25 * _GBIT,
            watts=None,
            sources="cloud.google.com/tpu/docs/v5e: four MXUs, 819 GB/s, 400 GB/s both ways over four ports, "
            "2 x 100 Gbit/s a host of eight.",
        ),
        Hardware(
            key="v5p",
            platform="tpu",
            chip=_chip("TPU v5p"),
            macs_per_cycle=8 * _MXU,
            hbm_bandwidth=2765e9,
            ici_dims=3,
            link_bandwidth=100e9,
            dcn_bandwidth=50 * _GBIT,
            watts=None,
            sources="cloud.google.com/tpu/docs/v5p: two cores of four MXUs, 2765 GB/s, 1200 GB/s both ways "
            "(six links), 50 Gbit/s a chip.",
        ),
        Hardware(
            key="v6e",
            platform="tpu",
            chip=_chip("TPU v6e"),
            macs_per_cycle=4 * 4 * _MXU,
            hbm_bandwidth=1638e9,
            ici_dims=2,
            link_bandwidth=100e9,
            dcn_bandwidth=100 * _GBIT,
            watts=None,
            sources="cloud.google.com/tpu/docs/v6e: 256x256 MXUs, 1638 GB/s, 800 GB/s both ways over four "
            "ports, 25.6 Tbit/s a pod of 256. Its page counts two MXUs; four at 1.75 GHz make the printed peak, as the "
            "compiler's cycles do.",
        ),
        Hardware(
            key="tpu7x",
            platform="tpu",
            chip=_chip("TPU7x"),
            macs_per_cycle=8 * 4 * _MXU,
            hbm_bandwidth=7380e9,
            ici_dims=3,
            link_bandwidth=100e9,
            dcn_bandwidth=100 * _GBIT,
            watts=None,
            sources="cloud.google.com/tpu/docs/tpu7x: 7380 GB/s, 1200 GB/s both ways. Width of the matrix units: "
            "unpublished, taken as v6e's for each core, as the compiler's cycles do.",
        ),
        Hardware(
            key="h200",
            platform="cuda",
            chip=_chip("NVIDIA H200"),
            macs_per_cycle=None,
            hbm_bandwidth=4.8e12,
            ici_dims=0,
            link_bandwidth=450e9,
            dcn_bandwidth=400 * _GBIT,
            watts=700.0,
            sources="NVIDIA H200 datasheet: 4.8 TB/s, NVLink 900 GB/s both ways, 700 W at most; "
            "DGX H200: 400 Gbit/s a GPU.",
        ),
        Hardware(
            key="h100",
            platform="cuda",
            chip=_chip("NVIDIA H100 80GB HBM3"),
            macs_per_cycle=None,
            hbm_bandwidth=3.35e12,
            ici_dims=0,
            link_bandwidth=450e9,
            dcn_bandwidth=400 * _GBIT,
            watts=700.0,
            sources="NVIDIA H100 SXM datasheet: 3.35 TB/s, NVLink 900 GB/s both ways, 700 W at "
            "most; DGX H100: 400 Gbit/s a GPU.",
        ),
        Hardware(
            key="a100",
            platform="cuda",
            chip=_chip("NVIDIA A100-SXM4-80GB"),
            macs_per_cycle=None,
            hbm_bandwidth=2.039e12,
            ici_dims=0,
            link_bandwidth=300e9,
            dcn_bandwidth=200 * _GBIT,
            watts=400.0,
            sources="NVIDIA A100 80 GB SXM datasheet: 2.039 TB/s, NVLink 600 GB/s both ways, 400 W at "
            "most; DGX A100: 200 Gbit/s a GPU.",
        ),
    )
}  # fmt: skip
"""Hardware by the name that `--topology` starts with."""

KEYS = (*HARDWARE, "cpu")


def find(key: str) -> Hardware:
    """The hardware called `key`. Raises ConfigError, listing the known ones, if there is none."""
    if key not in HARDWARE:
        close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"no chip is called {key!r}; known are {', '.join(KEYS)}{hint}")
    return HARDWARE[key]
