"""`python -m palmjax.plan.worker REQUEST ANSWER CACHE`: compiles one step, in a process of its own. See compiler.py."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import re
import sys
import tempfile
import time
from typing import Any

from palmjax.config import ConfigError
from palmjax.files import write_whole
from palmjax.plan import compiler, devices, memory
from palmjax.plan.topology import Topology

OUT_OF_MEMORY = ("CompileTimeHbmOom", "memory space hbm", "Ran out of memory on HBM")
"""Marks of a device whose memory is too small; a kernel that exceeds the chip's scratch memory is another error."""


def answer(request: compiler.Request, root: pathlib.Path, dump: str) -> dict[str, Any]:
    """Compiles `request` unless the cache has it. Returns {"entry": name}, or the error's kind and words."""
    import jax

    from palmjax import mesh
    from palmjax.step import program

    jax.config.update("jax_enable_compilation_cache", False)  # a program from jax's cache comes without its dumps
    built = mesh.build(request.experiment.mesh, devices.of(request.topology))
    prog = program(request.experiment, built)
    lowered = prog.lower(request.rows, request.length)
    version = _compiler(request.topology)
    options = os.environ.get("LIBTPU_INIT_ARGS", "")
    # Without the places in the source: an edit that moves a line leaves the step as it was.
    coords = [_coords(d) for d in built.devices.flat]
    name = compiler.key(lowered.as_text(), version, jax.__version__, options, str(request.topology), str(coords))
    if (root / name / "facts.json").exists():
        return {"entry": name}
    began = time.perf_counter()
    oom, text, code = "", "", 0
    try:
        compiled = lowered.compile()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # libtpu 0.0.51 can't hand out some v5p programs
            text = compiled.as_text() or ""
        analysis = compiled.memory_analysis()
        code = analysis.generated_code_size_in_bytes if analysis else 0
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if not any(mark in message for mark in OUT_OF_MEMORY):
            return {"compiler_error": message.strip()[:600]}
        oom = message.strip().splitlines()[0][:400]
    seconds = time.perf_counter() - began
    files = {path.name: path for path in pathlib.Path(dump).rglob("*jit_step*.txt")}
    if oom:
        text = _newest(files, "oom_intermediate_module.txt", "after_optimizations_before_buffer_assignment.txt")
    elif not text:
        text = _newest(files, "after_codegen.txt", "after_optimizations_after_buffer_assignment.txt")
    if not text:
        return {"compiler_error": oom or "the compiler handed out no program"}
    usage = memory.read(_newest(files, "buffer-assignment.txt"), _newest(files, "live-range.txt"), text, code)
    facts = {
        "compiler": version,
        "options": options,
        "jax": jax.__version__,
        "topology": str(request.topology),
        "mesh": dict(zip(built.axis_names, built.devices.shape, strict=True)),
        "coords": coords,
        "compile_seconds": seconds,
    }
    compiler.write(root, name, facts, usage, text, oom)
    return {"entry": name}


def _coords(device: Any) -> list[int]:
    """[slice, x, y, z, ...] of a device; GPUs and CPUs are numbered along one dimension."""
    place = list(getattr(device, "coords", None) or [device.id])
    return [getattr(device, "slice_index", 0) or 0, *place]


def _compiler(target: Topology) -> str:
    """The compiler's package and version."""
    platform = target.hardware.platform if target.hardware else "cpu"
    for package in {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin")}.get(platform, ("jaxlib",)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    raise ConfigError(f"no compiler for {target} is installed")


def _newest(files: dict[str, pathlib.Path], *endings: str) -> str:
    """The text of the last written dump with the first of these endings that exists; empty if none does."""
    for ending in endings:
        matching = sorted((p for n, p in files.items() if n.endswith(ending)), key=lambda p: p.stat().st_mtime_ns)
        if matching:
            return matching[-1].read_text()
    return ""


def main() -> int:
    given, to, root = sys.argv[1:]
    request: compiler.Request = pickle.loads(pathlib.Path(given).read_bytes())
    with tempfile.TemporaryDirectory(prefix="palmjax-plan-") as dump:
        flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text=true --xla_dump_hlo_module_re=^jit_step$"
        os.environ["XLA_FLAGS"] = re.sub(r"--xla_dump\S*", "", os.environ.get("XLA_FLAGS", "")) + " " + flags
        try:
            devices.prepare_environment(request.topology)
            result = answer(request, pathlib.Path(root), dump)
        except ConfigError as error:
            result = {"config_error": str(error)}
    write_whole(to, json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
