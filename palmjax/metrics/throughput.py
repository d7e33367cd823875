"""Tokens and seconds into rates: tokens/s, MFU and HFU, for programs and for people. Imports only Python's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation (PaLM appendix B), a fraction: tokens/s over the tokens/s of all chips at their peak.

    flops_per_token: 6 N + 12 L H Q T for training. peak_flops: FLOP/s of all devices together. With the FLOPs that
    the hardware executes, recomputed ones included, the same quotient is the hardware FLOPs utilisation (HFU).
    """
    return tokens_per_second * flops_per_token / peak_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """What turns tokens and seconds into rates.

    model_flops: FLOPs a token by PaLM appendix B. hardware_flops: with what rematerialisation computes again; None
    when nothing is. peak_flops: of all devices together, FLOP/s; None when unknown. devices: JAX devices of the run.
    """

    model_flops: float
    hardware_flops: float | None = None
    peak_flops: float | None
    devices: int

    def rates(self, tokens: float, seconds: float) -> dict[str, float | None]:
        """tokens_per_second; mfu and hfu as fractions, None with no known peak."""
        speed = tokens / seconds
        hardware = self.model_flops if self.hardware_flops is None else self.hardware_flops
        mfu_, hfu = (
            None if self.peak_flops is None else mfu(speed, flops, self.peak_flops)
            for flops in (self.model_flops, hardware)
        )
        return {"tokens_per_second": speed, "mfu": mfu_, "hfu": hfu}

    def describe(self, rates: Mapping[str, float | None]) -> list[str]:
        """`rates` for people: tokens/s, then MFU (and HFU where it differs), or model FLOP/s with no known peak."""
        speed = rates["tokens_per_second"]
        if speed is None:
            return []
        text = [f"{si(speed)} tok/s"]
        if rates["mfu"] is None:
            return [*text, f"{si(speed * self.model_flops, ' ')}FLOP/s"]
        names = ("mfu",) if rates["hfu"] == rates["mfu"] else ("mfu", "hfu")
        return text + [f"{name.upper()} {100 * (rates[name] or 0.0):.1f}%" for name in names]


def si(value: float, space: str = "") -> str:
    """Three significant digits and a decimal prefix: 12345 -> '12.3k'; `space` goes before the prefix."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    return f"{value:.3g}{space}{prefixes[0]}"


def clock(seconds: float) -> str:
    """83 -> '1:23', 3723 -> '1:02:03', 90000 -> '1d 1:00:00'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"
