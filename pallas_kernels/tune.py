"""Block sizes for a chip: tries some, writes `<op>/tuned/<chip>.json`.

    python -m pallas_kernels.tune                       # the TPU at hand: each candidate is timed; on an H100 or H200
                                                        # `tune_gpu.py` does it
    python -m pallas_kernels.tune --chip "TPU v5"       # any TPU, through libtpu's compiler: cycles are simulated, and
                                                        # bundles are counted where it does not simulate
    python -m pallas_kernels.tune --op attention        # one op's table only

A row is what was best of the candidates that also compile with what takes most memory. Nothing else in the package runs
or writes at import or in a kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import aot, tune_gpu
from pallas_kernels.attention import cost, table, tpu
from pallas_kernels.attention.case import MASKS
from pallas_kernels.attention.table import Shape
from pallas_kernels.attention.tpu_plan import Blocks
from pallas_kernels.decode_attention import choice as decode_choice
from pallas_kernels.decode_attention import cost as decode_cost
from pallas_kernels.linear_cross_entropy import choice as loss_choice
from pallas_kernels.linear_cross_entropy import cost as loss_cost
from pallas_kernels.linear_cross_entropy.tpu import NAMES, Tiles

T = TypeVar("T")

VMEM_MIB: dict[str, int | None] = {"TPU v4": None, "TPU v5 lite": 64, "TPU v5": 64, "TPU v6 lite": 64, "TPU7x": 44}
"""What a kernel may take: v4 has 16 MiB a core, its compiler's own limit; the others 128 (TPU7x 64)."""

WIDE = "bfloat16"
SHAPES = (
    *(Shape(length=2048, heads=16, head_dim=256, dtype=WIDE, mask=mask) for mask in MASKS),
    *(Shape(length=8192, heads=16, head_dim=256, dtype=WIDE, mask=mask) for mask in ("causal", "window", "packed")),
    Shape(length=2048, heads=16, head_dim=128, dtype=WIDE),
    Shape(length=2048, heads=16, head_dim=256, dtype="float32"),
    # PaLM 540B's 48 heads, whole and a twelfth of them, 62B's 32.
    *(Shape(length=2048, heads=heads, head_dim=256, dtype=WIDE) for heads in (4, 32, 48)),
)
"""Of attention's rows. Heads of 64 are padded to 128 lanes and take those rows."""

KEYS = {"TPU v4": 2048}
"""Most keys held at once: dK, dV, K and V are 3 KiB a key at 256 wide. Elsewhere LONG."""

LONG = 8192

ROWS = {"forward": (2048, 1024), "backward": (1024, 512)}
TILES = (1024, 512, 256)
"""Query rows of a block, and keys of a tile."""

WIDTHS = ((256, WIDE), (256, "float32"))
"""(head_dim, dtype) of attention against a cache."""

ENTRIES = (2048, 1024, 512)
"""Of one of its blocks. Full rows take less with larger ones, but a row's last block is read whole."""

TOKENS = 1024
"""Of a part of the loss, whose weights are then a thirty-second of the logits of 16k tokens."""

VOCABULARY = (256, 512)
"""Rows of its tiles."""

COLUMNS = (1024, 512, 2048)
"""Of the tiles of its gradients."""

MARGIN = 0.02
"""What a candidate must save for another to be left: rows of the same block sizes are the same program."""


def answers(
    chip: str, questions: Sequence[aot.Question], at_hand: bool, interpret: Any = False
) -> list[tuple[Any, str] | aot.CompileError]:
    """As `aot.costs`, or where the chip is at hand microseconds, "measured"."""
    if not at_hand:
        return aot.costs(chip, questions)
    return [timed(chip, question, interpret) for question in questions]


def timed(chip: str, question: aot.Question, interpret: Any) -> tuple[Any, str] | aot.CompileError:
    """(microseconds, "measured") of a question's whole program on the device at hand; kernels are not told apart."""
    arguments = {**question.arguments, **question.at_hand, "interpret": interpret}
    function, operands = aot.named(question.target)(chip=chip, **arguments)
    run, random = jax.jit(function), np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal(x.shape, np.float32), x.dtype) for x in operands]
    try:
        seconds = tune_gpu.seconds(lambda: run(*arrays), tune_gpu.Setting())
    except jax.errors.JaxRuntimeError as error:
        return aot.CompileError(str(error).splitlines()[0])
    return round(1e6 * seconds), "measured"


def choose(
    name: str,
    chip: str,
    tries: Sequence[T],
    found: Sequence[tuple[Any, str] | aot.CompileError],
    largest: Callable[[T], aot.Question],
) -> tuple[T, Any, str]:
    """(candidate, cost, source): the cheapest of `tries` whose `largest` program compiles, or one before it that costs
    no more than MARGIN above it. Where a cost cannot be told, the first that compiles, as "compiled".

    found: the costs. Raises ValueError if none compiles.
    """

    def fits(candidate: T) -> bool:
        [report] = aot.listings(chip, [largest(candidate)])
        if isinstance(report, aot.CompileError):
            print(f"{name} {candidate} with what takes most memory: {report}", flush=True)
        return not isinstance(report, aot.CompileError)

    told: list[tuple[T, Any, str]] = []
    untold: list[T] = []
    for candidate, answer in zip(tries, found, strict=True):
        print(f"{name} {candidate}: {answer}", flush=True)
        if not isinstance(answer, aot.CompileError):
            told.append((candidate, *answer))
        elif isinstance(answer, aot.ProfileError):
            untold.append(candidate)
    if untold:
        told = [(candidate, None, "compiled") for candidate in tries if candidate in {*untold, *(x for x, *_ in told)}]
        best = next((entry for entry in told if fits(entry[0])), None)
    else:
        best = next((entry for entry in sorted(told, key=lambda entry: total(entry[1])) if fits(entry[0])), None)
    if best is None:
        raise ValueError(f"tune: no candidate of {name} compiles with what takes most memory: {found[0]}")
    if untold:
        return best
    least, before = total(best[1]), told[: told.index(best)]
    near = [entry for entry in before if 0 <= total(entry[1]) - least <= MARGIN * least]
    return next((entry for entry in near if fits(entry[0])), best)


def total(taken: Any) -> int:
    """Of a cost, or of the costs of several kernels."""
    return sum(taken.values()) if isinstance(taken, dict) else taken


def compiled(target: str, **arguments: Any) -> aot.Question:
    """Whether a program compiles, no more."""
    return aot.Question(target=target, arguments=arguments, count=None, cycles=None)


def blocks_of(chip: str, which: str, dtype: str) -> Iterator[Blocks]:
    """Block sizes to try, of one pass of attention."""
    small = 2 if dtype == "float32" else 1
    for rows, keys in itertools.product(ROWS[which], TILES):
        # Float32 is multiplied in passes, which makes large tiles long code.
        if keys <= TILES[0] // small**2 and (which == "forward" or keys < TILES[0]):
            yield Blocks(rows=rows // small, keys=keys, vmem_mib=VMEM_MIB[chip], cores=aot.CORES.get(chip, 1))


def tuning_of(chip: str, shape: Shape, blocks: Blocks) -> tpu.Tuning:
    """Of both passes, so that one may be tried."""
    small = 2 if shape.dtype == "float32" else 1
    keys = KEYS.get(chip, LONG) // small * (2 if shape.head_dim < 256 else 1)
    return tpu.Tuning(forward=blocks, backward=blocks, forward_keys=keys, backward_keys=keys)


def attention_row(chip: str, shape: Shape, at_hand: bool, prefer: Sequence[Blocks] = ()) -> dict[str, Any]:
    """The row of `attention/tuned` for a shape; prefer: block sizes to try first. Raises ValueError if no candidate
    compiles.
    """
    found: dict[str, tuple[Blocks, int | None, str]] = {}
    least = Blocks.smallest(shape.heads) * shape.heads
    for which in cost.PASSES:
        tries = [blocks for blocks in blocks_of(chip, which, shape.dtype) if blocks.rows >= least]
        tries.sort(key=lambda blocks: blocks not in prefer)

        def ask(blocks: Blocks, which: str = which) -> aot.Question:
            return cost.question(chip, which, shape, tuning_of(chip, shape, blocks))

        def largest(blocks: Blocks, which: str = which) -> aot.Question:
            arguments = cost.question(chip, which, shape, tuning_of(chip, shape, blocks)).arguments
            return compiled("pallas_kernels.attention.cost:program", **arguments, everything=True)

        costs = answers(chip, [ask(blocks) for blocks in tries], at_hand)
        found[which] = choose(f"{chip} {shape} {which}", chip, tries, costs, largest)
    (forward, forward_cost, source), (backward, backward_cost, backward_source) = found.values()
    tuning = dataclasses.replace(tuning_of(chip, shape, forward), backward=backward)
    row = table.Row(
        **dataclasses.asdict(shape),
        chip=chip,
        tuning=tuning,
        forward_cost=forward_cost,
        backward_cost=backward_cost,
        source=source,
        backward_source=backward_source,
        provenance=provenance(),
    )
    return in_order(row, "chip", *(field.name for field in dataclasses.fields(Shape)))


def attention_rows(chip: str, at_hand: bool) -> Iterator[dict[str, Any]]:
    """Of all SHAPES. The first keeps the block sizes that the table has for it, and the others take its own, where they
    are as good.
    """
    prefer = [
        getattr(row.tuning, which)
        for row in table.rows()
        for which in cost.PASSES
        if row.chip == chip and row.shape == SHAPES[0]
    ]
    for number, shape in enumerate(SHAPES):
        row = attention_row(chip, shape, at_hand, prefer)
        yield row
        if number == 0:
            prefer = [Blocks(**row["tuning"][which]) for which in cost.PASSES]


def decode_row(chip: str, head_dim: int, dtype: str, at_hand: bool) -> dict[str, Any]:
    """The row of `decode_attention/tuned`. Raises ValueError if no candidate compiles."""
    asked = [decode_cost.question(chip, size, head_dim, dtype) for size in ENTRIES]

    def largest(size: int) -> aot.Question:
        target = "pallas_kernels.decode_attention.cost:most"
        return compiled(target, size=size, head_dim=head_dim, dtype=dtype)

    costs = answers(chip, asked, at_hand)
    size, taken, source = choose(f"{chip} cache of {head_dim} {dtype}", chip, ENTRIES, costs, largest)
    row = decode_choice.Row(
        chip=chip,
        head_dim=head_dim,
        dtype=dtype,
        size=size,
        cores=aot.CORES.get(chip, 1),
        cost=taken,
        source=source,
        provenance=provenance(),
    )
    return in_order(row)


def tiles_of(chip: str) -> Iterator[Tiles]:
    """Tiles to try, of the loss: each of its kernels in turn has all of its own."""
    for rows in VOCABULARY:
        scores = COLUMNS[::-1] if chip == "TPU v4" else (4096, *COLUMNS[::-1])
        of_gradients = [(rows * more, width) for more in (1, 2) for width in COLUMNS]
        for index, (height, width) in enumerate(of_gradients):
            yield Tiles(
                tokens=TOKENS,
                rows=rows,
                width=scores[index % len(scores)],
                hidden_rows=height,
                hidden_width=width,
                table_rows=height,
                table_width=width,
                vmem_mib=VMEM_MIB[chip],
            )


def loss_row(chip: str, at_hand: bool) -> dict[str, Any]:
    """The row of `linear_cross_entropy/tuned`. Raises ValueError if no candidate compiles."""
    tries = list(tiles_of(chip))
    found = answers(chip, [loss_cost.question(chip, tiles) for tiles in tries], at_hand)
    if not at_hand:
        for tiles, answer in zip(tries, found, strict=True):
            print(f"{chip} loss {tiles}: {answer}", flush=True)
        tries, found = together(tries, found)

    def largest(tiles: Tiles) -> aot.Question:
        # Columns that do not fit in one tile, which need a second buffer.
        arguments: dict[str, Any] = {"tiles": dataclasses.asdict(tiles), "width": 2 * loss_cost.WIDTH, "soft_cap": 30.0}
        return compiled("pallas_kernels.linear_cross_entropy.cost:program", **arguments)

    tiles, taken, source = choose(f"{chip} loss", chip, tries, found, largest)
    row = loss_choice.Row(
        chip=chip,
        dtype=WIDE,
        tiles=tiles,
        cost={"part": taken} if at_hand else taken,
        source=source,
        provenance=provenance(),
    )
    return in_order(row)


def together(
    tries: Sequence[Tiles], found: Sequence[tuple[Any, str] | aot.CompileError]
) -> tuple[list[Tiles], list[tuple[Any, str] | aot.CompileError]]:
    """For each number of `rows`, tiles of which each kernel has the best that was tried, and their costs."""
    fields = dict(zip(NAMES, (("width",), ("hidden_rows", "hidden_width"), ("table_rows", "table_width")), strict=True))
    alike: dict[int, dict[Tiles, tuple[dict[str, int], str]]] = {}
    for tiles, answer in zip(tries, found, strict=True):
        if not isinstance(answer, aot.CompileError):
            alike.setdefault(tiles.rows, {})[tiles] = answer
    if not alike:
        return list(tries), list(found)
    result: dict[Tiles, tuple[Any, str] | aot.CompileError] = {}
    for costs in alike.values():
        best = {name: min(costs, key=lambda tiles: costs[tiles][0][name]) for name in NAMES}
        changes = {field: getattr(best[name], field) for name in NAMES for field in fields[name]}
        first, (_, source) = next(iter(costs.items()))
        taken = {name: costs[best[name]][0][name] for name in NAMES}
        result[dataclasses.replace(first, **changes)] = taken, source
    return list(result), list(result.values())


def in_order(row: Any, *first: str) -> dict[str, Any]:
    """A row as JSON, these fields before the others."""
    entry = dataclasses.asdict(row)
    return {name: entry[name] for name in dict.fromkeys((*first, *entry))}


def provenance() -> dict[str, str]:
    """Versions and date."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"jax": jax.__version__, "libtpu": version("libtpu"), "date": today}


def tables(chip: str, ops: Iterable[str], at_hand: bool) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """(file, rows) of each op."""
    name = table.file_name(chip)
    for op in ops:
        if op == "attention":
            yield table.FOLDER / name, list(attention_rows(chip, at_hand))
        elif op == "decode_attention":
            yield decode_choice.FOLDER / name, [decode_row(chip, *of, at_hand) for of in WIDTHS]
        else:
            yield loss_choice.FOLDER / name, [loss_row(chip, at_hand)]


OPS = ("decode_attention", "linear_cross_entropy", "attention")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=sorted(aot.TOPOLOGIES), help="compile for it instead of timing")
    parser.add_argument("--op", choices=OPS, help="only this op's table")
    options = parser.parse_args(argv)
    chip = options.chip or jax.devices()[0].device_kind
    if chip.startswith("NVIDIA"):
        if options.op:
            parser.error("--op: on a GPU all tables are made")
        tune_gpu.main(chip)
        return
    if chip not in aot.TOPOLOGIES:
        parser.error(
            f"the device at hand is {chip!r}, no TPU and no H100 or H200, which is timed on itself; a TPU may be named "
            f"with --chip: {', '.join(sorted(aot.TOPOLOGIES))}"
        )
    for path, rows in tables(chip, [options.op] if options.op else OPS, at_hand=options.chip is None):
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
