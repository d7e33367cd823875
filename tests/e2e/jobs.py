"""Real runs of the tiny job as processes, and what they leave behind."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from palmjax import checkpoint, configure, mesh
from palmjax.config import MeshConfig
from palmjax.step import program

GIN = str(Path(__file__).parent / "tiny.gin")
ROOT = Path(__file__).parents[2]


def write_text(folder: Path, files: int = 40) -> str:
    """Files of words with some structure; returns a pattern that matches them."""
    rng = random.Random(0)
    words = ["the", "model", "reads", "a", "row", "of", "tokens", "and", "learns", "what", "follows", "from", "before"]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = [" ".join(rng.choices(words, k=rng.randint(4, 12))) for _ in range(60)]
        (folder / f"{i:03}.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "*.txt")


@dataclasses.dataclass(frozen=True)
class Job:
    """The tiny job over one text and one store folder; each run has its own MODEL_DIR."""

    text: str
    stores: str

    def flags(self, model_dir: Path, *bindings: str) -> list[str]:
        given = [f"MODEL_DIR={model_dir}", f"TRAIN_FILES={self.text}", f"STORE_DIR={self.stores}", *bindings]
        return [GIN, *(f"--gin.{binding}" for binding in given)]

    def start(self, model_dir: Path, *bindings: str, devices: int = 1) -> subprocess.Popen[str]:
        """`palmjax train` as a process that is still running."""
        return start("train", *self.flags(model_dir, *bindings), devices=devices)

    def run(self, model_dir: Path, *bindings: str, devices: int = 1, code: int = 0) -> str:
        """Runs to the end and returns the console; fails with it unless the exit code is `code`."""
        return finish(self.start(model_dir, *bindings, devices=devices), code)


def environment(devices: int = 1) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def start(name: str, *arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    """A verb of the command line as a process; standard output and error together."""
    return subprocess.Popen(
        [sys.executable, "-m", "palmjax", name, *arguments],
        env=environment(devices),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout: float = 300) -> str:
    text, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}, not {code}:\n{text[-4000:]}"
    return text


def verb(name: str, *arguments: str, devices: int = 1, code: int = 0) -> str:
    """A verb to its end: its console; fails with it unless the exit code is `code`."""
    return finish(start(name, *arguments, devices=devices), code)


def metrics(model_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl of one kind."""
    path = model_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if row["kind"] == kind]


def losses(model_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(model_dir)}


def wait_for_step(model_dir: Path, step: int, process: subprocess.Popen[str], timeout: float = 240) -> None:
    """Returns when the run has written the metrics of `step`."""
    deadline = time.monotonic() + timeout
    while max(losses(model_dir), default=0) < step:
        assert process.poll() is None, f"ended before step {step}:\n{process.communicate()[0][-4000:]}"
        assert time.monotonic() < deadline, f"step {step} did not come within {timeout} s"
        time.sleep(0.005)


def final_state(model_dir: Path, steps: int, bindings: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Every array of checkpoint_<steps>, by name, read onto one device."""
    experiment = configure.load([str(model_dir / "config.gin")], list(bindings)).experiment
    one = program(experiment, mesh.build(MeshConfig(), jax.devices()[:1]))
    state = checkpoint.restore_state(model_dir / f"checkpoint_{steps}", one.abstract_state)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        np.testing.assert_array_equal(value, b[name], err_msg=name)
        assert value.tobytes() == b[name].tobytes(), f"{name}: equal values, other bits"
