"""Block sizes for a chip: tries some, writes `attention/tuned/<chip>.json`.

    python -m pallas_kernels.tune                       # the TPU at hand: each candidate is timed
    python -m pallas_kernels.tune --chip "TPU v4"       # any TPU, through libtpu's compiler: bundles are counted

A candidate counts only if it also compiles, at the longest row it claims, with segments, prefix, window, ALiBi and
soft-cap together, which is what takes most memory. Nothing else in the package runs or writes at import or in a kernel.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import aot
from pallas_kernels.attention import bundles, table

VMEM_MIB: dict[str, int | None] = {"TPU v4": None, "TPU v5 lite": 64, "TPU v5": 64, "TPU v6 lite": 64, "TPU7x": 44}
"""What a kernel may take: v4 has 16 MiB a core, its compiler's own limit; the others 128 (TPU7x 64)."""

SHAPES = ((2048, 16, 256, "bfloat16"), (2048, 16, 128, "bfloat16"), (2048, 16, 256, "float32"))
"""(length, heads, head_dim, dtype) of the rows."""

KEYS = {"TPU v4": 2048}
"""Most keys held at once: dK, dV, K and V are 3 KiB a key at 256 wide. Elsewhere LONG."""

LONG = 8192


def candidates(chip: str, width: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Tunings to try, of one chip."""
    small = 2 if dtype == "float32" else 1
    keys = KEYS.get(chip, LONG) // small * (2 if width < 256 else 1)
    for rows in (1024, 2048, 512):
        for size in (256, 512, 1024):
            block = {
                "rows": rows // small,
                "keys": size,
                "vmem_mib": VMEM_MIB[chip],
                "cores": aot.CORES.get(chip, 1),
            }
            yield {"forward": block, "backward": block, "forward_keys": keys, "backward_keys": keys}


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


def best(chip: str, shape: tuple[int, int, int, str], at_hand: bool) -> dict[str, Any]:
    """One row: the best candidate of each pass; of float32, whose products are loops of their own in the listing, the
    first that compiles. Raises ValueError if none does.
    """
    length, heads, width, dtype = shape
    costs: dict[str, list[tuple[int, dict[str, Any]]]] = {"forward": [], "backward": []}
    keys: list[int] = []
    for tuning in candidates(chip, width, dtype):
        if not compiles(chip, heads, width, dtype, tuning):
            continue
        if dtype == "float32" and not at_hand:
            return row(chip, shape, tuning, None, None, "compiled")
        cost = (timed if at_hand else bundles.measure)(chip, length, heads, width, dtype, tuning)
        print(f"{chip} {shape} rows {tuning['forward']['rows']} keys {tuning['forward']['keys']}: {cost}", flush=True)
        keys.append(tuning["forward_keys"])
        for which in costs:
            costs[which].append((cost[which], tuning[which]))
    if not keys:
        raise ValueError(f"no candidate of {shape} compiles for {chip}")
    chosen = {which: min(costs[which], key=lambda pair: pair[0]) for which in costs}
    tuning = {which: pair[1] for which, pair in chosen.items()} | {f"{which}_keys": min(keys) for which in costs}
    return row(
        chip,
        shape,
        tuning,
        chosen["forward"][0],
        chosen["backward"][0],
        "measured" if at_hand else "bundles",
    )


def row(
    chip: str,
    shape: tuple[int, int, int, str],
    tuning: dict[str, Any],
    forward: int | None,
    backward: int | None,
    source: str,
) -> dict[str, Any]:
    """A row of the table, as JSON."""
    length, heads, width, dtype = shape
    return {
        "chip": chip,
        "length": length,
        "heads": heads,
        "head_dim": width,
        "dtype": dtype,
        "tuning": tuning,
        "forward_cost": forward,
        "backward_cost": backward,
        "source": source,
        "provenance": provenance(),
    }


def provenance() -> dict[str, str]:
    """Versions and date."""
    from importlib.metadata import version

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"jax": jax.__version__, "libtpu": version("libtpu"), "date": today}


def path_of(chip: str) -> Path:
    """The table's file of a chip."""
    return table.FOLDER / f"{chip.lower().replace(' ', '_')}.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=sorted(aot.TOPOLOGIES), help="compile for it instead of timing")
    chosen = parser.parse_args(argv).chip
    chip = chosen or jax.devices()[0].device_kind
    if chip not in aot.TOPOLOGIES:
        parser.error(f"the device at hand is {chip!r}; name one with --chip: {', '.join(sorted(aot.TOPOLOGIES))}")
    rows = [best(chip, shape, at_hand=chosen is None) for shape in SHAPES]
    path_of(chip).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {path_of(chip)}")


if __name__ == "__main__":
    main()
