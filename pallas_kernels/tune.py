"""Block sizes for a chip: tries some, writes `attention/tuned/<chip>.json`.

    python -m pallas_kernels.tune                       # the TPU at hand: each candidate is timed; on an H100 or H200
                                                        # `tune_gpu.py` does it
    python -m pallas_kernels.tune --chip "TPU v5"       # any TPU, through libtpu's compiler: cycles are simulated, and
                                                        # bundles are counted where it does not simulate

A candidate counts only if it also compiles, at the longest row it claims, with segments, prefix, window, ALiBi and
soft-cap together, which is what takes most memory. Nothing else in the package runs or writes at import or in a kernel.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import aot, tune_gpu
from pallas_kernels.attention import bundles, table

VMEM_MIB: dict[str, int | None] = {"TPU v4": None, "TPU v5 lite": 64, "TPU v5": 64, "TPU v6 lite": 64, "TPU7x": 44}
"""What a kernel may take: v4 has 16 MiB a core, its compiler's own limit; the others 128 (TPU7x 64)."""

WIDE = "bfloat16"
SHAPES = (
    (2048, 16, 256, WIDE),
    (2048, 16, 128, WIDE),
    (2048, 16, 256, "float32"),
    # PaLM 540B's 48 heads, whole and a twelfth of them, 62B's 32, and rows four times as long.
    (2048, 4, 256, WIDE),
    (2048, 32, 256, WIDE),
    (2048, 48, 256, WIDE),
    (8192, 16, 256, WIDE),
)
"""(length, heads, head_dim, dtype) of the rows. Heads of 64 are padded to 128 lanes and take those rows."""

KEYS = {"TPU v4": 2048}
"""Most keys held at once: dK, dV, K and V are 3 KiB a key at 256 wide. Elsewhere LONG."""

LONG = 8192

ROWS = {"forward": (2048, 1024), "backward": (1024,)}
TILES = {"forward": (1024, 512, 256), "backward": (512, 256)}
"""Of a pass: query rows of a block, and keys of a tile, the first that was best on most chips first."""


def candidates(chip: str, width: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Tunings to try, of one chip."""
    small = 2 if dtype == "float32" else 1
    keys = KEYS.get(chip, LONG) // small * (2 if width < 256 else 1)
    limits = {"vmem_mib": VMEM_MIB[chip], "cores": aot.CORES.get(chip, 1)}
    tries = {which: [(rows // small, tile) for rows in ROWS[which] for tile in TILES[which]] for which in ROWS}
    for forward, backward in itertools.zip_longest(*tries.values(), fillvalue=tries["backward"][-1]):
        blocks = {
            which: {"rows": rows, "keys": tile, **limits}
            for which, (rows, tile) in (("forward", forward), ("backward", backward))
        }
        yield {**blocks, "forward_keys": keys, "backward_keys": keys}


def compiles(chip: str, heads: int, width: int, dtype: str, tuning: dict[str, Any]) -> bool:
    """Whether a tuning compiles where it takes most memory."""
    length = tuning["forward_keys"]
    function, operands = bundles.program(chip, length, heads, width, dtype, tuning, ranged=True)
    try:
        aot.compile_for(chip, function, operands)
    except aot.CompileError:
        return False
    return True


def timed(chip: str, length: int, heads: int, width: int, dtype: str, tuning: dict[str, Any]) -> dict[str, int]:
    """Pass to microseconds on the device at hand, medians of 20."""
    key = np.random.default_rng(0)
    found: dict[str, int] = {}
    for both in (False, True):
        function, operands = bundles.program(chip, length, heads, width, dtype, tuning, both=both)
        run = jax.jit(function)
        arrays = [jnp.asarray(key.standard_normal(x.shape), x.dtype) for x in operands]
        jax.block_until_ready(run(*arrays))
        seconds = []
        for _ in range(20):
            begun = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            seconds.append(time.perf_counter() - begun)
        found["both" if both else "forward"] = int(1e6 * statistics.median(seconds))
    return {"forward": found["forward"], "backward": max(found["both"] - found["forward"], 1)}


def best(
    chip: str, shape: tuple[int, int, int, str], at_hand: bool, tries: Iterable[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """One row: the best of `tries` (`candidates`) for each pass; of float32, whose products are loops of their own in
    the listing, the first that compiles. Raises ValueError if none does.
    """
    _, heads, width, dtype = shape
    costs: dict[str, list[tuple[int, str, dict[str, Any]]]] = {"forward": [], "backward": []}
    keys: list[int] = []
    for tuning in tries or candidates(chip, width, dtype):
        if not compiles(chip, heads, width, dtype, tuning):
            continue
        if not at_hand and dtype == "float32":
            return row(chip, shape, tuning, {which: (None, "compiled") for which in costs})
        if at_hand:
            cost = {which: (us, "measured") for which, us in timed(chip, *shape, tuning).items()}
        else:
            cost = bundles.cost(chip, *shape, tuning=tuning)
        print(f"{chip} {shape} forward {tuning['forward']} backward {tuning['backward']}: {cost}", flush=True)
        keys.append(tuning["forward_keys"])
        for which in costs:
            costs[which].append((*cost[which], tuning[which]))
    if not keys:
        raise ValueError(f"no candidate of {shape} compiles for {chip}")
    chosen = {which: min(costs[which], key=lambda found: found[0]) for which in costs}
    tuning = {which: found[2] for which, found in chosen.items()} | {f"{which}_keys": min(keys) for which in costs}
    return row(chip, shape, tuning, {which: found[:2] for which, found in chosen.items()})


def row(
    chip: str, shape: tuple[int, int, int, str], tuning: dict[str, Any], cost: Mapping[str, tuple[int | None, str]]
) -> dict[str, Any]:
    """A row of the table, as JSON. cost: pass to (cost, source)."""
    length, heads, width, dtype = shape
    return {
        "chip": chip,
        "length": length,
        "heads": heads,
        "head_dim": width,
        "dtype": dtype,
        "tuning": tuning,
        "forward_cost": cost["forward"][0],
        "backward_cost": cost["backward"][0],
        "source": cost["forward"][1],
        "backward_source": cost["backward"][1],
        "provenance": provenance(),
    }


def provenance() -> dict[str, str]:
    """Versions and date."""
    from importlib.metadata import version

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"jax": jax.__version__, "libtpu": version("libtpu"), "date": today}


def path_of(chip: str) -> Path:
    """The table's file of a chip."""
    return table.FOLDER / table.file_name(chip)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=sorted(aot.TOPOLOGIES), help="compile for it instead of timing")
    chosen = parser.parse_args(argv).chip
    chip = chosen or jax.devices()[0].device_kind
    if chip.startswith("NVIDIA"):
        tune_gpu.main(chip)
        return
    if chip not in aot.TOPOLOGIES:
        parser.error(
            f"the device at hand is {chip!r}, no TPU and no H100 or H200, which is timed on itself; a TPU may be named "
            f"with --chip: {', '.join(sorted(aot.TOPOLOGIES))}"
        )
    rows = [best(chip, shape, at_hand=chosen is None) for shape in SHAPES]
    path_of(chip).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {path_of(chip)}")


if __name__ == "__main__":
    main()
