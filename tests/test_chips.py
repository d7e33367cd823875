"""Peaks of chips: the published figures, per chip and per JAX device, and no guessing."""

import subprocess
import sys

import pytest

from palmjax import chips


@pytest.mark.parametrize(
    ("kind", "peak", "gib"),
    [
        ("TPU v4", 275e12, 32),
        ("TPU v5 lite", 197e12, 16),
        ("TPU v5e", 197e12, 16),
        ("TPU v5p", 459e12, 95),
        ("TPU v5", 459e12, 95),
        ("TPU v6 lite", 918e12, 32),
        ("NVIDIA H200", 989e12, 141),
        ("NVIDIA H100 80GB HBM3", 989e12, 80),
        ("NVIDIA A100-SXM4-80GB", 312e12, 80),
        # Two JAX devices a chip: each has half.
        ("TPU v3", 61.5e12, 16),
        ("TPU7x", 1153.5e12, 96),
    ],
)
def test_peak_and_memory_of_a_device(kind: str, peak: float, gib: int) -> None:
    chip = chips.find(kind)
    assert chip is not None
    assert chip.flops_per_device == peak
    assert chip.hbm_bytes_per_device == gib * 2**30


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v9", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H200 NVL"])
def test_an_unknown_or_partial_device_has_no_chip(kind: str) -> None:
    assert chips.find(kind) is None


def test_no_kind_belongs_to_two_chips_and_every_row_has_a_source() -> None:
    kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert all(chip.source for chip in chips.CHIPS)


def test_imports_nothing_heavy() -> None:
    program = "import sys, palmjax.chips; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
