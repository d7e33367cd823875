"""Our TPU attention beside jax's flash and splash kernels, by the compiler's own schedule. Needs libtpu, no TPU.

    python -m benchmarks.kernel_schedule [--chips "TPU v4" "TPU v6 lite"]

One causal sequence, T=2048, 16 query heads and one key/value head of 256, bfloat16; the busiest core. Two yardsticks:

simulated: cycles by the compiler's static profiler, waits for memory and the matrix units included. It knows no TPU v4,
takes operands in scalar memory for zeros (splash's loops depend on such), and aborts on some of XLA's own operations
beside a kernel, which is why ours are compiled alone; what it gives below the matrix units' floor is not believed.
bundles: VLIW instructions of the final listing times how often each block of them runs. No wait is in it, so a figure
can lie below the floor. How often the peers' blocks run follows from their grids: every step its head, every tile that
the mask leaves its products, every row of tiles its ends.

Both rank kernels; neither is a time. The peers get the best of blocks 512 and 1024 (their default, 128, is several
times slower); tokamax's splash is beside where it is installed.

Then attention of one new token against full caches (8 rows of 8,192 entries, 16 heads of 256, one key/value head),
beside the same in plain XLA by XLA's own estimates, and the cycles that reading the caches takes at the chip's
bandwidth.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import jax

from benchmarks.linear_cross_entropy import cycles
from pallas_kernels import aot
from pallas_kernels.attention import Case, Mask, cost, others, table
from pallas_kernels.decode_attention import choice as decode_choice
from pallas_kernels.decode_attention import cost as decode_cost
from pallas_kernels.decode_attention import xla as decode_xla
from palmjax.plan import chips

LENGTH, HEADS, WIDTH = 2048, 16, 256
CASE = Case(rows=1, length=LENGTH, heads=HEADS, kv_heads=1, head_dim=WIDTH, dtype="bfloat16", mask=Mask())
SHAPE = table.Shape(length=LENGTH, heads=HEADS, head_dim=WIDTH, dtype="bfloat16")
PEERS = ("jax_flash", "jax_splash", "tokamax_splash")
END = 120
"""Bundles without a product above which a block of a peer's listing is the begin or the end of a row of tiles."""


def peer(chip: str, impl: str, block: int, backward: bool) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """A peer's attention, or its gradient, and operands: what `aot.listings` compiles."""
    del chip

    def forward(q: Any, k: Any, v: Any) -> Any:
        scale = WIDTH**-0.5
        if impl == "tokamax_splash":
            return tokamax_splash(q * scale, k, v, block)
        return others.run(impl, q, k, v, case=CASE, scale=scale, soft_cap=None, segments=None, block=block)

    def gradient(q: Any, k: Any, v: Any, do: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1](do)

    q, kv = (1, LENGTH, HEADS, WIDTH), (1, LENGTH, 1, WIDTH)
    operands = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in (q, kv, kv)]
    return (gradient, [*operands, operands[0]]) if backward else (forward, operands)


def asked(impl: str, block: int, backward: bool) -> aot.Question:
    """`peer`, to be compiled."""
    arguments = {"impl": impl, "block": block, "backward": backward}
    return aot.Question(target="benchmarks.kernel_schedule:peer", arguments=arguments, count=None, cycles=None)


def tokamax_splash(q: Any, k: Any, v: Any, block: int) -> Any:
    """tokamax's own splash kernel (its public call refuses TPU v4), backward in one pass; 0.0.12."""
    folder = "tokamax._src.ops.experimental.tpu.splash_attention"
    splash: Any = importlib.import_module(f"{folder}.splash_attention_kernel")
    masks: Any = importlib.import_module(f"{folder}.splash_attention_mask")
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute"
    config = splash.SplashConfig(**dict.fromkeys(names.split(), block))
    kernel = splash.make_splash_mqa_single_device(masks.CausalMask((LENGTH, LENGTH)), config=config)
    return jax.vmap(kernel)(q.swapaxes(1, 2), k[:, :, 0], v[:, :, 0]).swapaxes(1, 2)


def of_peer(chip: str, impl: str, block: int, backward: bool) -> int | None:
    """Bundles of a peer's kernels on the busiest core; None where it does not compile.

    The splash kernels' backward grids are all "arbitrary": with one sequence a second core idles. tokamax's steps are
    the tiles that the mask leaves, and those on the diagonal are code of their own; the sum of its partial dQ, which
    XLA makes, is not in the figure.
    """
    [found] = aot.listings(chip, [asked(impl, block, backward)])
    if isinstance(found, aot.CompileError):
        return None
    side = LENGTH // block
    total = 0.0
    for name, listing in found.items():
        if not any(part["products"] for part in listing) or (backward and "fwd" in name):
            continue
        cores = 1 if backward and impl != "jax_flash" else aot.CORES.get(chip, 1)
        tiles = HEADS * side * (side + 1) // 2
        runs = {"step": HEADS * side**2, "tile": tiles, "end": HEADS * side}
        if impl == "tokamax_splash":
            runs["step"] = tiles
            whole, diagonal = sorted(part["bundles"] for part in listing if part["products"])
            total += ((tiles - HEADS * side) * whole + HEADS * side * diagonal) / cores
            listing = [part for part in listing if not part["products"]]
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
    # Loops over data in scalar memory, which the profiler takes for zeros.
    if chip not in aot.SIMULATED or impl == "tokamax_splash":
        return None
    [found] = aot.simulated(chip, [asked(impl, block, backward)])
    if isinstance(found, aot.CompileError):
        return None
    total = sum(cycles for name, cycles in found.items() if not (backward and "fwd" in name))
    return total if total >= cost.floor(chip, "backward" if backward else "forward", SHAPE) else None


def of_ours(chip: str) -> dict[tuple[str, str], int]:
    """(yardstick, pass) to the cost of our kernels with the block sizes of the table."""
    row = table.find(CASE, chip)
    assert row is not None
    ours = [cost.question(chip, which, row.shape, row.tuning) for which in cost.PASSES]
    found: dict[tuple[str, str], int] = {}
    for source, reports in (("bundles", aot.listings), ("simulated", aot.simulated)):
        if source == "bundles" or chip in aot.SIMULATED:
            for which, question, report in zip(cost.PASSES, ours, reports(chip, ours), strict=True):
                read: Any = question.count if source == "bundles" else question.cycles
                if not isinstance(report, aot.CompileError):
                    found[source, which] = read(report)
    return found


def read_of(chip: str) -> float:
    """Cycles in which a chip reads the caches of `decode_cost.program` at its memory's bandwidth."""
    hardware = next(x for x in chips.HARDWARE.values() if chip in x.chip.kinds)
    return decode_cost.bytes_read() / hardware.hbm_bandwidth * hardware.clock


def plain_decode(chip: str) -> int:
    """XLA's estimate of its own decode attention: a first block, then a loop over the others."""
    program = aot.compile_for(chip, *decode_cost.program(chip, size=0, impl="xla"))
    return cycles(program.as_text(), decode_cost.ENTRIES // decode_xla.BLOCK - 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["TPU v4", "TPU v5", "TPU v6 lite"], choices=list(aot.TOPOLOGIES))
    print(f"busiest core, {CASE}")
    print(f"{'':34}{'floor':>12}{'ours':>12}{''.join(f'{name:>16}' for name in PEERS)}{'best peer / ours':>18}")
    selected = parser.parse_args(argv).chips
    for chip in selected:
        for (yardstick, which), taken in sorted(of_ours(chip).items(), reverse=True):
            backward = which == "backward"
            of = simulated_peer if yardstick == "simulated" else of_peer
            peers = []
            for impl in PEERS:
                found = [of(chip, impl, block, backward) for block in (512, 1024)]
                peers.append(min((x for x in found if x is not None), default=None))
            shown = "".join(f"{x:>16,}" if x else f"{'-':>16}" for x in peers)
            ratio = f"{min(x for x in peers if x) / taken:.2f}x" if any(peers) else "-"
            head = f"{chip:<12}{which:<10}{yardstick:<12}{cost.floor(chip, which, SHAPE):>12,.0f}"
            print(f"{head}{taken:>12,}{shown}{ratio:>18}", flush=True)
    print(f"{'one new token, full caches, a chip':46}{'memory':>12}{'ours':>12}{'plain XLA':>14}")
    for chip in selected:
        row = next(row for row in decode_choice.rows() if row.chip == chip)
        [answer] = aot.costs(chip, [decode_cost.question(chip, row.size, row.head_dim, row.dtype)])
        if isinstance(answer, aot.CompileError):
            raise answer
        taken, source = answer
        print(
            f"{chip:<12}{'decode':<10}{source:<12}{read_of(chip):>24,.0f}{taken:>12,}{plain_decode(chip):>14,}",
            flush=True,
        )


if __name__ == "__main__":
    main()
