"""The train step of an experiment compiled for a topology: what the compiler made of it, kept in a cache.

    artifact = compile_step(Request(experiment, topology, rows, length))      # seconds to minutes, or from the cache
    artifact.module, artifact.usage, artifact.oom

The compiler runs in a child process: its flags (a dump of the buffer assignment) are read once per process, it may be
killed or abort without harm, and several run side by side. What it returns is kept under the hash of the lowered step,
the compiler's version and its options, and put in place whole by one rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

import zstandard

from palmjax.config import ConfigError, Experiment
from palmjax.plan import hlo, memory
from palmjax.plan.topology import Topology

CACHE = "~/.cache/palmjax/plan"
FORMAT = 1
"""Raised when what an artifact holds changes, so that older ones are compiled again."""


class CompilerError(Exception):
    """The compiler failed, and not for lack of memory; the message is its own, shortened."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile: `rows` x `length` tokens a step on `topology`.

    options: the TPU compiler's flags (LIBTPU_INIT_ARGS); None takes the environment's.
    """

    experiment: Experiment
    topology: Topology
    rows: int
    length: int
    options: str | None = None


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What the compiler made of a step.

    facts: as `worker.py` writes them: mesh axes, device coordinates, versions, seconds. usage: memory of a device.
    text: the scheduled HLO. oom: the compiler's message if the step does not fit a device's memory.
    """

    facts: dict[str, Any]
    usage: memory.Usage
    text: str
    oom: str

    @functools.cached_property
    def module(self) -> hlo.Module:
        return hlo.parse(self.text)


def compile_step(request: Request, cache: str | os.PathLike[str] | None = None, timeout: float = 3600) -> Artifact:
    """The artifact of `request`, from the cache or a new compilation.

    Raises ConfigError for what the user asked wrongly (a mesh that does not divide, a missing compiler), CompilerError
    if the compiler fails or takes longer than `timeout` seconds. A step that does not fit is not an error.
    """
    root = pathlib.Path(os.path.expanduser(cache or CACHE))
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".request-") as scratch:
        given, answer = pathlib.Path(scratch, "request"), pathlib.Path(scratch, "answer.json")
        given.write_bytes(pickle.dumps(request))
        command = [sys.executable, "-m", "palmjax.plan.worker", str(given), str(answer), str(root)]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
        if request.options is not None:
            environment["LIBTPU_INIT_ARGS"] = request.options
        with open(pathlib.Path(scratch, "log"), "w+") as log:
            status = _run(command, environment, log, timeout)
            if not answer.exists():
                log.seek(0)
                raise CompilerError(_reason(log.read(), status))
        result = json.loads(answer.read_text())
    if "config_error" in result:
        raise ConfigError(result["config_error"])
    if "compiler_error" in result:
        raise CompilerError(result["compiler_error"])
    return read(root / result["entry"])


def read(entry: pathlib.Path) -> Artifact:
    """A cached artifact."""
    facts = json.loads((entry / "facts.json").read_text())
    text = zstandard.ZstdDecompressor().decompress((entry / "step.hlo.zst").read_bytes(), 2**31).decode()
    usage = memory.Usage.from_json(facts.pop("usage"))
    return Artifact(facts, usage, text, facts.pop("oom"))


def write(root: pathlib.Path, name: str, facts: dict[str, Any], usage: memory.Usage, text: str, oom: str) -> None:
    """Puts an artifact in the cache, whole or not at all."""
    scratch = pathlib.Path(tempfile.mkdtemp(dir=root, prefix=".entry-"))
    (scratch / "facts.json").write_text(json.dumps({**facts, "usage": usage.to_json(), "oom": oom}))
    (scratch / "step.hlo.zst").write_bytes(zstandard.ZstdCompressor(level=6).compress(text.encode()))
    try:
        scratch.rename(root / name)
    except OSError:  # the name is taken: by another process that was first, or by a folder without facts
        if (root / name / "facts.json").exists():
            shutil.rmtree(scratch)
            return
        shutil.rmtree(root / name)
        scratch.rename(root / name)


def key(*parts: str) -> str:
    """The cache's name for a step: the hash of all that decides it: lowered text, versions, options, places."""
    digest = hashlib.sha256()
    for part in (str(FORMAT), *parts):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


_running: set[subprocess.Popen[bytes]] = set()


def stop_all() -> None:
    """Ends every compiler that this process started: what a search does when it is interrupted."""
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _run(command: list[str], environment: dict[str, str], log: Any, timeout: float) -> int:
    """Runs the worker, and ends it and its children with the wait (an interrupt, a timeout)."""
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )
    _running.add(process)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise CompilerError(f"the compiler took longer than {timeout:.0f} s") from None
    finally:
        _running.discard(process)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _reason(log: str, status: int) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    last = next((line for line in reversed(lines) if "Error" in line or "Check failed" in line), lines[-1:] or [""])
    return f"the compiler's process ended ({how}): {str(last)[:400]}"
