"""Kernels compiled for TPUs that are not at hand, what the compiler's final listing says of them, and how many cycles
its static profiler simulates. Needs libtpu.

    python -m pallas_kernels.aot '{"chip": "TPU v4", "target": "module:function", "arguments": {...}}'

compiles what `function(chip=, **arguments)` returns (a function and its abstract operands). The compiler reads its
flags once per process, so `listings` has a process of its own compile.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Without megacore a v4 chip is two devices.
    "TPU v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "TPU v5 lite": ("v5e:2x2", {}),
    "TPU v5": ("v5p:2x2x1", {}),
    "TPU v6 lite": ("v6e:2x2", {}),
    "TPU7x": ("tpu7x:2x2x1", {}),
}
"""Device kind, as jax names it, to a smallest topology of such chips."""

CORES = {"TPU v4": 2, "TPU v5": 2}
"""Cores of a device, where there are two."""

FLOPS_PER_CYCLE = {
    "TPU v4": 131072,
    "TPU v5 lite": 131072,
    "TPU v5": 131072,
    "TPU v6 lite": 524288,
    "TPU7x": 524288,
}
"""Of a core's matrix units, bfloat16, as the compiler's own cycles for a large product show (one of 4096^3 is within
6 %). TPU7x: taken as v6e's, its matrix units are not published.
"""


class CompileError(Exception):
    """The compiler refused; the message is its own, shortened."""


def mesh(chip: str) -> Mesh:
    """One device of `chip` that need not exist."""
    name, extra = TOPOLOGIES[chip]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **extra)
    return Mesh(np.array(topology.devices[:1]), ("device",))


def compile_for(chip: str, function: Callable[..., Any], operands: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """`jax.jit(function)` compiled for one device of `chip`. Raises CompileError."""
    target = mesh(chip)
    placed = NamedSharding(target, PartitionSpec())
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in operands]
    try:
        with jax.set_mesh(target):
            return jax.jit(function).lower(*structs).compile()
    except jax.errors.JaxRuntimeError as error:
        raise CompileError(str(error).splitlines()[0][:300]) from error


Block = dict[str, int]
"""A straight run of a kernel's listing: `bundles`, `products` (matrix unit instructions), `spills`, `depth` (of loops:
1 is the grid's), `loop` (number of the inner loop it is the body of, from 1; else 0).
"""

_LINE = re.compile(r"\s*(0x[0-9a-f]+|0)\s*(LH|LB|LE|PB|PF|CT)?\s*:\s*((?:> ?)*)\{(.*)")


def blocks(listing: str) -> list[Block]:
    """The blocks of one `*final_bundles.txt`, in order. They end at branches and where control flow joins."""
    found: list[Block] = []
    loop, previous, cut = 0, -1, True
    for line in listing.splitlines():
        if not (matched := _LINE.match(line)):
            continue
        depth, tag, body = matched[3].count(">"), matched[2], matched[4]
        inner = depth > 1 and (depth > previous or tag == "LB")
        loop += inner
        if cut or inner or tag or depth != previous:
            found.append({"bundles": 0, "products": 0, "spills": 0, "depth": depth, "loop": loop if depth > 1 else 0})
        block = found[-1]
        block["bundles"] += 1
        block["products"] += body.count("vmatmul")
        block["spills"] += body.count("spill")
        previous, cut = depth, "sbr.rel" in body
    return found


def listings(chip: str, target: str, **arguments: Any) -> dict[str, list[Block]]:
    """Kernel name to its blocks, of what `target` ("module:function") returns for `arguments`, compiled for `chip`.

    Raises CompileError.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false "
            "--xla_jf_emit_annotations=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
        )
        _compile_apart(flags, {"chip": chip, "target": target, "arguments": arguments})
        kernels = {}
        for path in sorted(Path(folder).glob("*-final_bundles.txt")):
            name = re.fullmatch(r"\d+-(.*?)(\.\d+)?-\d+-final_bundles", path.stem)
            if name and "schedule-analysis" not in name[1] and "gap_analysis" not in name[1]:
                kernels[name[1]] = blocks(path.read_text())
        return kernels


SIMULATED = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
"""Chips that the compiler's static profiler knows: it aborts on TPU v4, whose DMA it has no model of."""


def simulated(chip: str, target: str, **arguments: Any) -> dict[str, int]:
    """Kernel name to cycles of one core, of what `target` returns for `arguments`, by the compiler's static profiler:
    it runs the scalar program, unrolls the loops and models waits for memory and for the matrix units.

    It takes operands in scalar memory for zeros: of a kernel whose loops depend on such data it knows nothing. Callers
    check a result against `FLOPS_PER_CYCLE`. Raises CompileError, and ValueError for a chip that it does not know.
    """
    if chip not in SIMULATED:
        raise ValueError(f"aot: the compiler does not simulate {chip!r}; it does {', '.join(SIMULATED)}")
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}"
        text = _compile_apart(flags, {"chip": chip, "target": target, "arguments": arguments})
    return {name: int(found) for name, found in json.loads(text.strip().splitlines()[-1]).items()}


def _compile_apart(flags: str, job: dict[str, Any]) -> str:
    """What a process of its own says that compiled `job` with the compiler's `flags`. Raises CompileError."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    # A compiled program from the cache would leave no listing.
    environment |= {"LIBTPU_INIT_ARGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-m", "pallas_kernels.aot", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if re.match(r"\S*Error: |F\d{4} ", line)]
        raise CompileError((said or [f"the compiler ended with exit code {done.returncode}"])[-1][:400])
    return done.stdout


def _main(job: str) -> None:
    """Compiles, and prints the estimated cycles of each kernel that has them, as JSON."""
    request = json.loads(job)
    module, _, name = request["target"].partition(":")
    function, operands = getattr(importlib.import_module(module), name)(chip=request["chip"], **request["arguments"])
    program = compile_for(request["chip"], function, operands)
    found = {}
    if "static_llo_profile" in os.environ.get("LIBTPU_INIT_ARGS", ""):
        for line in program.as_text().splitlines():
            name, cycles = (
                re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line),
                re.search(r'estimated_cycles":"?(\d+)', line),
            )
            if name and cycles and "tpu_custom_call" in line:
                found[name[1]] = cycles[1]
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
