"""Cross-entropy of 16k tokens over 256k rows of width 4096: by parts of the vocabulary beside all logits at once.

    python -m benchmarks.linear_cross_entropy [--chips "TPU v4"]

Both are compiled for the chip, forward and backward with a z-loss; needs libtpu, no TPU. Memory is the compiler's own
peak of temporaries (the table's gradient is in it, and printed beside). Cycles are the compiler's estimates of its
fusions times the trips of their loops: what XLA schedules by, not a measured time.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

WIDTH, VOCABULARY = 4096, 256 * 1024


def cycles(text: str, trips: int) -> int:
    """Estimated cycles of scheduled HLO whose every loop runs `trips` times."""
    bodies = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
    total = 0
    for part in re.split(r"\n(?=\S)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", part)
        if name is None or not (part.startswith("ENTRY") or name[1] in bodies):
            continue
        found = sum(int(x) for x in re.findall(r'"estimated_cycles":"(\d+)"', part))
        total += found * (trips if name[1] in bodies else 1)
    return total


def compiled(chip: str, tokens: int, impl: str, part: int) -> Any:
    """The loss's gradient, compiled. Raises CompileError where it does not fit."""

    def total(hidden: Any, table: Any, targets: Any) -> Any:
        loss, log_z, _ = linear_cross_entropy(hidden, table, targets, scale=WIDTH**-0.5, impl=impl, part=part)
        return jnp.sum(loss + 1e-4 * jnp.square(log_z))

    operands = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((tokens, WIDTH), (VOCABULARY, WIDTH))]
    targets = jax.ShapeDtypeStruct((tokens,), "int32")
    return aot.compile_for(chip, jax.grad(total, argnums=(0, 1)), [*operands, targets])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["TPU v4", "TPU v5"], choices=list(aot.TOPOLOGIES))
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args(argv)
    logits = 4 * options.tokens * VOCABULARY
    print(
        f"{options.tokens} tokens, width {WIDTH}, vocabulary {VOCABULARY}: logits {logits / 2**30:.2f} GiB in float32"
    )
    for chip in options.chips:
        for label, impl, part in (
            ("all at once", "reference", VOCABULARY),
            ("parts of 16384", "xla", 16384),
            ("parts of 8192", "xla", 8192),
        ):
            try:
                program = compiled(chip, options.tokens, impl, part)
            except aot.CompileError as error:
                print(f"{chip:<12}{label:<18}does not compile: {str(error)[:150]}", flush=True)
                continue
            memory = program.memory_analysis().temp_size_in_bytes
            estimate = cycles(program.as_text(), VOCABULARY // part)
            share = memory / logits
            print(f"{chip:<12}{label:<18}{memory / 2**30:8.2f} GiB ({share:.3f} of the logits){estimate:>16,} cycles")


if __name__ == "__main__":
    main()
