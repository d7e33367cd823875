"""Our TPU attention beside jax's flash and splash kernels, by the compiler's own schedule. Needs libtpu, no TPU.

    python -m benchmarks.kernel_schedule [--chips "TPU v4" "TPU v6 lite"]

One causal sequence, T=2048, 16 query heads and one key/value head of 256, bfloat16; the busiest core. Two yardsticks:

simulated: cycles by the compiler's static profiler, waits for memory and the matrix units included. It knows no TPU v4,
takes operands in scalar memory for zeros (splash's loops depend on such), and aborts on some kernels (v5p's backward
pass); what it gives below the matrix units' floor is not believed.
bundles: VLIW instructions of the final listing times how often each block of them runs. No wait is in it, so a figure
can lie below the floor. How often the peers' blocks run follows from their grids: every step its head, every tile that
the mask leaves its products, every row of tiles its ends.

Both rank kernels; neither is a time. The peers get the best of blocks 512 and 1024 (their default, 128, is several
times slower).
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax

from pallas_kernels import aot
from pallas_kernels.attention import Case, Mask, bundles, others, table

LENGTH, HEADS, WIDTH = 2048, 16, 256
CASE = Case(rows=1, length=LENGTH, heads=HEADS, kv_heads=1, head_dim=WIDTH, dtype="bfloat16", mask=Mask())
END = 120
"""Bundles without a product above which a block of a peer's listing is the begin or the end of a row of tiles."""


def peer(chip: str, impl: str, block: int, backward: bool) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """A peer's attention, or its gradient, and operands: what `aot.listings` compiles."""
    del chip

    def forward(q: Any, k: Any, v: Any) -> Any:
        scale = WIDTH**-0.5
        return others.run(impl, q, k, v, case=CASE, scale=scale, soft_cap=None, segments=None, block=block)

    def gradient(q: Any, k: Any, v: Any, do: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1](do)

    q, kv = (1, LENGTH, HEADS, WIDTH), (1, LENGTH, 1, WIDTH)
    operands = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in (q, kv, kv)]
    return (gradient, [*operands, operands[0]]) if backward else (forward, operands)


def of_peer(chip: str, impl: str, block: int, backward: bool) -> int | None:
    """Bundles of a peer's kernels on the busiest core; None where it does not compile.

    Splash's backward grids are all "arbitrary": with one sequence a second core idles.
    """
    try:
        found = aot.listings(chip, "benchmarks.kernel_schedule:peer", impl=impl, block=block, backward=backward)
    except aot.CompileError:
        return None
    side = LENGTH // block
    total = 0.0
    for name, listing in found.items():
        if not any(part["products"] for part in listing) or (backward and "fwd" in name):
            continue
        cores = 1 if backward and impl == "jax_splash" else aot.CORES.get(chip, 1)
        runs = {"step": HEADS * side**2, "tile": HEADS * side * (side + 1) // 2, "end": HEADS * side}
        head = True
        for part in listing:
            if part["depth"] == 0:
                continue
            kind = "tile" if part["products"] else "end" if part["bundles"] > END and not head else "step"
            head = False
            total += part["bundles"] * runs[kind] / cores
    return round(total) or None


def simulated_peer(chip: str, impl: str, block: int, backward: bool) -> int | None:
    """Simulated cycles of a peer's attention kernels; None where it is not simulated or below the floor."""
    if chip not in aot.SIMULATED:
        return None
    arguments: dict[str, Any] = {"impl": impl, "block": block, "backward": backward}
    try:
        found = aot.simulated(chip, "benchmarks.kernel_schedule:peer", **arguments)
    except aot.CompileError:
        return None
    total = sum(cycles for name, cycles in found.items() if not (backward and "fwd" in name))
    return total if total >= floor_of(chip, backward) else None


def floor_of(chip: str, backward: bool) -> float:
    """Cycles that a core's matrix units need for the pairs that the mask leaves."""
    return (2.5 if backward else 1.0) * CASE.forward_flops / aot.FLOPS_PER_CYCLE[chip] / aot.CORES.get(chip, 1)


def of_ours(chip: str) -> dict[tuple[str, str], int]:
    """(yardstick, pass) to the cost of our kernels with the block sizes of the table."""
    row = table.find(CASE, chip)
    assert row is not None
    shape: Any = (chip, LENGTH, HEADS, WIDTH, "bfloat16", dataclasses.asdict(row.tuning))
    found = {("bundles", which): count for which, count in bundles.measure(*shape).items()}
    if chip in aot.SIMULATED:
        try:
            cycles = bundles.simulate(*shape)
        except aot.CompileError:
            cycles = bundles.simulate(*shape, both=False)
        found |= {("simulated", which): count for which, count in cycles.items()}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["TPU v4", "TPU v5", "TPU v6 lite"], choices=list(aot.TOPOLOGIES))
    print(f"busiest core, {CASE}")
    print(f"{'':34}{'floor':>12}{'ours':>12}{'jax flash':>14}{'jax splash':>14}{'best peer / ours':>18}")
    for chip in parser.parse_args(argv).chips:
        for (yardstick, which), cost in sorted(of_ours(chip).items(), reverse=True):
            backward = which == "backward"
            of = simulated_peer if yardstick == "simulated" else of_peer
            peers = []
            for impl in ("jax_flash", "jax_splash"):
                found = [of(chip, impl, block, backward) for block in (512, 1024)]
                peers.append(min((x for x in found if x is not None), default=None))
            shown = "".join(f"{x:>14,}" if x else f"{'-':>14}" for x in peers)
            ratio = min(x for x in peers if x) / cost if any(peers) else float("nan")
            head = f"{chip:<12}{which:<10}{yardstick:<12}{floor_of(chip, backward):>12,.0f}"
            print(f"{head}{cost:>12,}{shown}{ratio:>17.2f}x", flush=True)


if __name__ == "__main__":
    main()
