"""The Hopper kernels without a GPU: interpreted against float64 with every mask, with races looked for and NaN in what
nobody wrote; compiled for sm_90a, with no register in memory; and what is chosen.

Interpreted, they take float32 too, in which a wrong mask or sum shows far above the rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from pallas_kernels.attention import gpu
from pallas_kernels.attention.gpu_plan import Ring, Stream, Tuning
from pallas_kernels.attention.masks import ranges
from tests.kernels.cases import Example, check

SMALL = Tuning(forward=Ring(keys=16, slots=3), dq=Ring(keys=32, slots=2), dkv=Stream(queries=32, stages=2))


def kernels(example: Example, tuning: Tuning = SMALL, interpret: Any = True) -> Any:
    """(q, k, v) -> (out, lse) of the kernels."""
    first, stop = ranges(example.mask, example.rows, example.length, example.segments, example.prefix)
    return functools.partial(
        gpu.attention,
        first=first,
        stop=stop,
        scale=example.width**-0.5,
        tuning=tuning,
        ranged=bool(np.any(np.asarray(first) > 0)),
        alibi_slopes=example.slopes,
        soft_cap=example.soft_cap,
        interpret=interpret,
    )


EXAMPLES = [
    # One key/value head, lengths that no block divides, more tiles than slots.
    Example(length=53, heads=5, kv_heads=1, width=24, rows=1, alibi=True),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_kernels_equal_float64_forward_and_backward(example):
    check(example, kernels(example))
