"""Kernels compiled for TPUs that are not at hand, what the compiler's final listing says of them, and how many cycles
its static profiler simulates. Needs libtpu.

What a kernel costs is a `Question`, which `costs` answers. The compiler reads its flags once per process and may take
the process down, so one of its own (`python -m pallas_kernels.aot`) compiles; starting it takes as long as a kernel, so
it compiles all that is asked at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

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


class ProfileError(CompileError):
    """What was compiled costs cannot be told."""


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


T = TypeVar("T")


def named(target: str) -> Callable[..., Any]:
    """The function that "module:function" means."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def of_kernel(found: Mapping[str, T], name: str) -> T:
    """What was found of the kernel called `name`, which jax's transformations add to (`jvp_name_`).

    Raises ProfileError if there is none.
    """
    for full, value in found.items():
        if name in full:
            return value
    raise ProfileError(f"no kernel {name} among {', '.join(found) or 'none'}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What something costs on the busiest core of a chip, before it has run on one.

    target: "module:function", which returns a function and its abstract operands for `chip` and the `arguments`, plain
    values. count: bundles, from the kernels' listings (`listings`); None where the listing does not say how often its
    blocks run. cycles: from the simulation (`simulated`); None where it knows nothing, since loops depend on data.
    Both give a number, or one for each of several kernels. at_hand: more arguments where the program is run.
    """

    target: str
    arguments: dict[str, Any]
    count: Callable[[dict[str, list[Block]]], Any] | None
    cycles: Callable[[dict[str, int]], Any] | None
    at_hand: dict[str, Any] = dataclasses.field(default_factory=dict)


def costs(chip: str, questions: Sequence[Question]) -> list[tuple[Any, str] | CompileError]:
    """Of each question (its cost, "simulated" or "bundles"), all by one yardstick so that they compare: simulated
    cycles, waits included, if the compiler simulates all that it compiles, else bundles, where a listing tells.
    Those that the compiler refuses have its error.
    """
    if chip in SIMULATED and all(question.cycles for question in questions):
        found = _answers(simulated(chip, questions), [question.cycles for question in questions], "simulated")
        if not any(isinstance(answer, ProfileError) for answer in found) or not all(x.count for x in questions):
            return found
    return _answers(listings(chip, questions), [question.count for question in questions], "bundles")


def _answers(
    reports: Iterable[Any], readers: Sequence[Callable[[Any], Any] | None], source: str
) -> list[tuple[Any, str] | CompileError]:
    found: list[tuple[Any, str] | CompileError] = []
    for report, read in zip(reports, readers, strict=True):
        try:
            if isinstance(report, CompileError):
                raise report
            if read is None:
                raise ProfileError("its listing does not say how often each block runs")
            found.append((read(report), source))
        except CompileError as error:
            found.append(error)
    return found


def listings(chip: str, questions: Sequence[Question]) -> Iterator[dict[str, list[Block]] | CompileError]:
    """Of each question's program, compiled for `chip`: kernel name to the blocks of its listing, or CompileError."""
    return _compile_apart(chip, questions, simulate=False)


SIMULATED = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
"""Chips that the compiler's static profiler knows: it aborts on TPU v4, whose DMA it has no model of."""


def simulated(chip: str, questions: Sequence[Question]) -> Iterator[dict[str, int] | CompileError]:
    """Of each question's program: kernel name to cycles of one core by the compiler's static profiler, which runs the
    scalar program, unrolls the loops and models waits for memory and for the matrix units. Or CompileError;
    ProfileError where the profiler aborts, as it does on some fusions of XLA's: kernels are compiled alone.

    It takes operands in scalar memory for zeros: of a kernel whose loops depend on such data it knows nothing. Callers
    check a result against `FLOPS_PER_CYCLE`. Raises ValueError for a chip that it does not know.
    """
    if chip not in SIMULATED:
        raise ValueError(f"aot: the compiler does not simulate {chip!r}; it does {', '.join(SIMULATED)}")
    return _compile_apart(chip, questions, simulate=True)


def _compile_apart(chip: str, questions: Sequence[Question], simulate: bool) -> Iterator[Any]:
    """Reports of a process of its own, one for all questions: another where the compiler takes it down with it."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    # A compiled program from the cache would leave no listing.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    jobs = [{"target": question.target, "arguments": question.arguments} for question in questions]
    while jobs:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
            flags = f"--xla_jf_dump_static_llo_profile_to={folder}"
            if not simulate:
                flags = (
                    f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false "
                    "--xla_jf_emit_annotations=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
                )
            request = json.dumps({"chip": chip, "jobs": jobs, "folder": folder, "simulate": simulate})
            with subprocess.Popen(
                [sys.executable, "-m", "pallas_kernels.aot", request],
                env={**environment, "LIBTPU_INIT_ARGS": flags},
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if not line.startswith(REPORT):
                        continue
                    report = json.loads(line[len(REPORT) :])
                    jobs = jobs[1:]
                    yield CompileError(report["error"]) if "error" in report else report["found"]
            if jobs:  # one is without an answer
                said.seek(0)
                errors = [line.strip() for line in said if re.match(r"\S*Error: |F\d{4} ", line)]
                jobs = jobs[1:]
                yield ProfileError((errors or [f"the compiler ended with exit code {process.returncode}"])[-1][:400])


REPORT = "report: "
"""What a line that answers begins with: the compiler prints too."""


def _main(given: str) -> None:
    """Compiles job after job, and prints of each what its kernels cost as a line of JSON."""
    request = json.loads(given)
    for job in request["jobs"]:
        try:
            program = compile_for(request["chip"], *named(job["target"])(chip=request["chip"], **job["arguments"]))
        except CompileError as error:
            answer: dict[str, Any] = {"error": str(error)}
        else:
            answer = {"found": _estimates(program) if request["simulate"] else _read(Path(request["folder"]))}
        print(REPORT + json.dumps(answer), flush=True)
        for path in Path(request["folder"]).iterdir():
            path.unlink()


def _estimates(program: Any) -> dict[str, int]:
    """Kernel name to the cycles that the profiler wrote beside it."""
    found = {}
    for line in program.as_text().splitlines():
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        cycles = re.search(r'estimated_cycles":"?(\d+)', line)
        if name and cycles and "tpu_custom_call" in line:
            found[name[1]] = int(cycles[1])
    return found


def _read(folder: Path) -> dict[str, list[Block]]:
    """Kernel name to blocks, of the listings in a folder."""
    kernels = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        name = re.fullmatch(r"\d+-(.*?)(\.\d+)?-\d+-final_bundles", path.stem)
        if name and "schedule-analysis" not in name[1] and "gap_analysis" not in name[1]:
            kernels[name[1]] = blocks(path.read_text())
    return kernels


if __name__ == "__main__":
    _main(sys.argv[1])
