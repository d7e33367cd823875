"""Multiply-adds of a compiled module's matmuls, from their dimensions; each counts as two FLOPs.

XLA's own count visits a loop's body once; here the caller multiplies by the trips. The TPU compiler writes matmuls as
convolutions, batch dimensions as windows that slide over padding: only positions inside the data count.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from palmjax.plan import hlo


def flops(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """FLOPs of one run of an instruction: of a fusion, those of all matmuls in it."""
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called["calls"]]
        return sum(flops(module, inside, i) for i in inside.instructions)
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    return 0.0


def _dot(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    left = computation.by_name[instruction.operands[0]].result[0]
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
    size = 1
    for dim in contracting[1].split(",") if contracting and contracting[1] else []:
        size *= left.dims[int(dim)]
    return 2.0 * instruction.result[0].elements * size


def _convolution(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    left, right = (computation.by_name[name].result[0] for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    assert labels is not None, instruction.name
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    count = 1.0
    spatial = [c for c in labels[2] if c.isdigit()]
    for position, label in enumerate(sorted(spatial)):
        field = functools.partial(_field, fields, position)
        low, _, _high = field("pad", "0_0").partition("_")
        count *= _inside(
            data=left.dims[labels[1].index(label)],
            kernel=right.dims[labels[2].index(label)],
            output=instruction.result[0].dims[labels[3].index(label)],
            stride=int(field("stride", "1")),
            low=int(low),
            data_step=int(field("lhs_dilate", "1")),
            kernel_step=int(field("rhs_dilate", "1")),
        )
    batch = instruction.result[0].dims[labels[3].index("b")]
    features = instruction.result[0].dims[labels[3].index("f")]
    summed = right.dims[labels[2].index("i")]
    return 2.0 * count * batch * features * summed


def _field(fields: dict[str, str], position: int, name: str, default: str) -> str:
    return fields[name].split("x")[position] if name in fields else default


def _inside(*, data: int, kernel: int, output: int, stride: int, low: int, data_step: int, kernel_step: int) -> int:
    """Pairs of output and kernel positions along one dimension that meet a real element of the data."""
    place = np.arange(output)[:, None] * stride - low + np.arange(kernel)[None, :] * kernel_step
    return int(((place >= 0) & (place < (data - 1) * data_step + 1) & (place % data_step == 0)).sum())
