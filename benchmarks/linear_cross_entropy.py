"""Cross-entropy of 16k tokens over 256k rows of width 4096: all logits at once, by parts of the vocabulary, and as a
total by parts of the tokens, in plain XLA and as TPU kernels.

    python -m benchmarks.linear_cross_entropy [--chips "TPU v4"]

All are compiled for the chip, forward and backward with a z-loss; needs libtpu, no TPU. Memory is the compiler's own
peak of temporaries; what is printed behind the + is in it: of a bfloat16 table, the float32 sum of its gradient, which
a total by tokens keeps beside what it returns; of a float32 one (`parameters`), its copy in bfloat16. Cycles are the
compiler's estimates of its fusions times the trips of their loops, and for the kernels what
`pallas_kernels.linear_cross_entropy.cost` finds (simulated, or bundles where the compiler does not simulate): what XLA
schedules by, not a measured time.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pallas_kernels.linear_cross_entropy import choice, cost, linear_cross_entropy, linear_cross_entropy_total

WIDTH, VOCABULARY = 4096, 256 * 1024
Z_LOSS = 1e-4


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


def compiled(chip: str, tokens: int, op: Callable[..., jax.Array], dtype: str) -> Any:
    """The gradient of `op(hidden, table, targets)` with a table in `dtype`, compiled. Raises CompileError where it does
    not fit.
    """
    hidden = jax.ShapeDtypeStruct((tokens, WIDTH), "bfloat16")
    table, targets = jax.ShapeDtypeStruct((VOCABULARY, WIDTH), dtype), jax.ShapeDtypeStruct((tokens,), "int32")
    return aot.compile_for(chip, jax.grad(op, argnums=(0, 1)), [hidden, table, targets])


def by_vocabulary(impl: str, part: int) -> Callable[..., jax.Array]:
    """The loss from each token's, differentiated by jax."""

    def op(hidden: Any, table: Any, targets: Any) -> jax.Array:
        table = table.astype(hidden.dtype)
        loss, log_z, _ = linear_cross_entropy(hidden, table, targets, scale=WIDTH**-0.5, impl=impl, part=part)
        return jnp.sum(loss + Z_LOSS * jnp.square(log_z))

    return op


def by_tokens(chip: str, impl: str, part: int) -> Callable[..., jax.Array]:
    """The loss as a total with its own gradient."""
    shared: dict[str, Any] = {"z_loss": Z_LOSS, "scale": WIDTH**-0.5, "impl": impl, "chip": chip, "tokens": part}

    def op(hidden: Any, table: Any, targets: Any) -> jax.Array:
        return linear_cross_entropy_total(hidden, table, targets, jnp.ones(targets.shape), **shared)[0]

    return op


def of_kernels(chip: str, tokens: int) -> int:
    """Cycles of the TPU kernels, by the table."""
    row = choice.find("bfloat16", chip)
    assert row is not None
    return sum(row.cost.values()) * VOCABULARY // cost.ROWS * tokens // row.tiles.tokens


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
        count = VOCABULARY * WIDTH
        summed, copied = ("bfloat16", 4 * count), ("float32", 2 * count)
        kernels = by_tokens(chip, "tpu", 1024), options.tokens // 1024
        for label, op, trips, (dtype, beside) in (
            ("all at once", by_vocabulary("reference", VOCABULARY), 1, ("bfloat16", 0)),
            ("vocabulary, parts of 16384", by_vocabulary("xla", 16384), VOCABULARY // 16384, ("bfloat16", 0)),
            ("vocabulary, parts of 8192", by_vocabulary("xla", 8192), VOCABULARY // 8192, ("bfloat16", 0)),
            ("tokens, parts of 512, XLA", by_tokens(chip, "xla", 512), options.tokens // 512, summed),
            ("tokens, parts of 1024, XLA", by_tokens(chip, "xla", 1024), options.tokens // 1024, summed),
            ("tokens, parts of 1024, kernels", *kernels, summed),
            ("parameters, all at once", by_vocabulary("reference", VOCABULARY), 1, ("float32", 0)),
            ("parameters, tokens, kernels", *kernels, copied),
        ):
            try:
                program = compiled(chip, options.tokens, op, dtype)
            except aot.CompileError as error:
                print(f"{chip:<12}{label:<32}does not compile: {str(error)[:150]}", flush=True)
                continue
            memory = program.memory_analysis().temp_size_in_bytes - beside
            estimate = cycles(program.as_text(), trips)
            if label.endswith("kernels"):
                estimate += of_kernels(chip, options.tokens)
            size = f"{memory / 2**30:8.2f} GiB" + (f" + {beside / 2**30:.0f} GiB" if beside else " " * 8)
            print(
                f"{chip:<12}{label:<32}{size} ({memory / logits:.3f} of the logits){estimate:>16,} cycles", flush=True
            )


if __name__ == "__main__":
    main()
