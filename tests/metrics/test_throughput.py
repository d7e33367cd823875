"""MFU and HFU against the published figures, and the way rates are printed."""

import pytest

from palmjax.metrics import Throughput, mfu
from palmjax.metrics.throughput import clock, si


def per_token(n: float, layers: int, heads: int, head_dim: int, length: int) -> tuple[float, float]:
    """PaLM appendix B: (6N, 12LHQT), the FLOPs of a trained token outside and inside attention."""
    return 6 * n, 12 * layers * heads * head_dim * length


PALM = per_token(540e9, 118, 48, 256, 2048)


@pytest.mark.parametrize(
    ("tokens_per_second", "flops", "peak", "percent", "tolerance"),
    [
        (238_300, PALM, 6144 * 275e12, 46.20, 0.05),
        (1920 * 2048 / 60.1, per_token(530e9, 105, 128, 160, 2048), 2240 * 312e12, 30.26, 0.08),
        (0.0152 * 3072 * 2048, per_token(280e9, 80, 128, 128, 2048), 4096 * 123e12, 32.50, 0.05),
    ],
    ids=["PaLM 540B", "MT-NLG 530B", "Gopher 280B"],
)
def test_mfu_of_palm_table_3(
    tokens_per_second: float, flops: tuple[float, float], peak: float, percent: float, tolerance: float
) -> None:
    assert 100 * mfu(tokens_per_second, sum(flops), peak) == pytest.approx(percent, abs=tolerance)


def test_hfu_of_palm() -> None:
    """Three quarters of the forward pass outside attention, and all of it inside, are computed again: 57.8 %."""
    dense, attention = PALM
    hardware = dense + 0.75 * dense / 3 + attention * 4 / 3
    throughput = Throughput(model_flops=sum(PALM), hardware_flops=hardware, peak_flops=6144 * 275e12, devices=6144)
    rates = throughput.rates(tokens=238_300 * 17, seconds=17)
    assert rates["tokens_per_second"] == pytest.approx(238_300)
    assert rates["mfu"] == pytest.approx(0.4620, abs=5e-4)
    assert rates["hfu"] == pytest.approx(0.5779, abs=5e-4)
    assert throughput.describe(rates) == ["238k tok/s", "MFU 46.2%", "HFU 57.8%"]


def test_without_recomputation_hfu_is_mfu_and_is_not_printed_twice() -> None:
    throughput = Throughput(model_flops=1e9, peak_flops=1e14, devices=1)
    rates = throughput.rates(tokens=12_345, seconds=1)
    assert rates["mfu"] == rates["hfu"] == pytest.approx(0.12345)
    assert throughput.describe(rates) == ["12.3k tok/s", "MFU 12.3%"]


def test_without_a_known_peak_model_flops_are_printed_instead() -> None:
    throughput = Throughput(model_flops=2.85e6, peak_flops=None, devices=1)
    rates = throughput.rates(tokens=12_345, seconds=1)
    assert rates["mfu"] is None and rates["hfu"] is None
    assert throughput.describe(rates) == ["12.3k tok/s", "35.2 GFLOP/s"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (7, "7"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (1.5e6, "1.5M"), (2.35e15, "2.35P")],
)
def test_si(value: float, text: str) -> None:
    assert si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (83, "1:23"), (3723, "1:02:03"), (90_000, "1d 1:00:00"), (864_061, "10d 0:01:01")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
