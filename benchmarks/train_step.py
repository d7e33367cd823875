"""Training speed beside the same model in plain jax, and what a run costs around its steps. `python -m
benchmarks.train_step`

Prints, for the job of gin/exp/palm_nano_stdlib.gin (4 layers, width 256, 8 heads, bytes, 8 rows of 512, float32):
- tokens/s of palmjax's step and of benchmarks/plain_palm.py, run in turn, and the ratio pair by pair;
- the same with nothing recomputed on either side, and with 8 key/value heads and rematerialisation on both;
- the host's share of a step: CPU time of the loop's thread and of the feed's, in a real run;
- steps beside an asynchronous save against the others;
- seconds from the command to the first finished step, with a cold and a warm compilation cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import plain_palm
from palmjax import configure, mesh
from palmjax.data import feed
from palmjax.step import program

JOB = "exp/palm_nano_stdlib.gin"
ROWS, LENGTH = 8, 512


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of the whole process for one call, finished."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def ours(bindings: list[str]) -> Callable[[], Any]:
    """One call is one step of palmjax on a real batch."""
    experiment = configure.load([JOB], bindings).experiment
    prog = program(experiment, mesh.build(experiment.mesh, jax.devices()[:1]))
    compiled = prog.lower(ROWS, LENGTH).compile()
    dataset = feed.open_dataset(experiment.train_dataset)
    batch = next(feed.Feed(dataset, prog.batch_sharding(ROWS, LENGTH), 0, 1))
    held = {"state": prog.initial_state()}

    def step() -> Any:
        held["state"], metrics = compiled(held["state"], batch)
        return metrics, held["state"]

    return step


def plain(shape: plain_palm.Shape) -> Callable[[], Any]:
    """One call is one step of the plain model on random bytes."""
    params = plain_palm.init(jax.random.key(0), shape)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH + 1), 0, shape.v)
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    jitted = jax.jit(plain_palm.train_step, static_argnums=4, donate_argnums=(0, 1))
    held = {"params": params, "state": plain_palm.init_optimizer(params)}

    def step() -> Any:
        held["params"], held["state"], loss = jitted(held["params"], held["state"], inputs, targets, shape)
        return loss, held["params"]

    return step


def compare(name: str, a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> None:
    """Times a and b in turn and prints medians and the ratio b/a of wall time, pair by pair."""
    for call in (a, b):
        timed(call)
    # Which of a pair goes first alternates, so that neither always runs on the other's warm caches.
    rows = [(timed(a), timed(b)) if i % 2 else (timed(b), timed(a))[::-1] for i in range(pairs)]
    wall = [(x[0], y[0]) for x, y in rows]
    ratios = [y / x for x, y in wall]
    speed = [ROWS * LENGTH / statistics.median(column) for column in zip(*wall, strict=True)]
    cpu = [statistics.median(column) for column in zip(*[(x[1], y[1]) for x, y in rows], strict=True)]
    for who, i in (("palmjax  ", 0), ("plain jax", 1)):
        print(f"{name}: {who} {speed[i]:,.0f} tok/s, {cpu[i]:.2f} CPU-s a step")
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"{name}: ratio palmjax / plain jax {middle:.3f} (from {low:.3f} to {high:.3f})", flush=True)


def run_command(folder: Path, steps: int, *bindings: str, cache: Path) -> tuple[str, list[dict[str, Any]]]:
    """`palmjax train` of the job as its own process: its console output and the lines of metrics.jsonl."""
    command = [sys.executable, "-m", "palmjax", "train", JOB]
    given = [
        f"MODEL_DIR='{folder}'",
        f"TRAIN_STEPS={steps}",
        "EVAL_PERIOD=0",
        "Experiment.train_eval_dataset=None",
        *bindings,
    ]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    done = subprocess.run(
        [*command, *(f"--gin.{b}" for b in given)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"palmjax train failed:\n{done.stderr[-3000:]}")
    return done.stderr, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def host_share(pairs: int) -> None:
    """CPU time that the loop's thread and the feed take for a step, as a share of the step, in a real run."""
    from palmjax import attempt, train

    marks: list[tuple[float, float]] = []

    class Marking(attempt.Recorder):
        """The run's own recorder, which also notes the wall and the loop's CPU clock at every step."""

        def record(self, *arguments: Any, **named: Any) -> dict[str, float] | None:
            marks.append((time.perf_counter(), time.thread_time()))
            return super().record(*arguments, **named)

    with tempfile.TemporaryDirectory() as folder:
        given = ["Experiment.train_eval_dataset=None", f"MODEL_DIR='{folder}'", f"TRAIN_STEPS={2 * pairs + 3}"]
        experiment = configure.load([JOB], given).experiment
        attempt.Recorder, original = Marking, attempt.Recorder
        try:
            train.train(experiment)
        finally:
            attempt.Recorder = original
    # From step 3 on: the first ones compile, and write what only a start writes.
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks[2:])]
    wall, cpu = (statistics.median(column) for column in zip(*steps, strict=True))
    dataset = feed.open_dataset(experiment.train_dataset)
    began = time.thread_time()
    for step in range(20):
        dataset.read(step)
    reading = (time.thread_time() - began) / 20
    share = 100 * (cpu + reading) / wall
    milliseconds = [1e3 * x for x in (cpu, reading, wall)]
    print("host: loop {:.2f} ms and feed {:.2f} ms of CPU a step of {:.0f} ms:".format(*milliseconds), f"{share:.2f} %")
    sys.stdout.flush()


def around_saves(folder: Path, cache: Path) -> None:
    """Steps that run beside an asynchronous save against those that do not."""
    _, lines = run_command(folder, 41, "SaveCheckpointConfig.period=8", cache=cache)
    seconds = {line["step"]: line["seconds"] for line in lines if line["kind"] == "train" and line["step"] > 2}
    beside = [s for step, s in seconds.items() if step % 8 in (1, 2)]
    apart = [s for step, s in seconds.items() if step % 8 not in (0, 1, 2)]
    a, b = statistics.median(beside), statistics.median(apart)
    print(f"save: the two steps after a save {a:.3f} s, the others {b:.3f} s: x{a / b:.3f}", flush=True)


def first_step(root: Path) -> None:
    """From the command to the first finished step, twice with one new compilation cache."""
    for name in ("cold", "warm"):
        text, _ = run_command(root / name, 2, cache=root / "cache")
        found = re.search(r"first step after .*", text)
        print(f"start, {name} compilation cache: {found[0] if found else text[-500:]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of steps to time")
    parser.add_argument("--only", choices=("step", "host", "start"), help="one part; all by default")
    options = parser.parse_args()
    pairs, only = options.pairs, options.only
    if only in (None, "step"):
        compare("as configured (palmjax recomputes blocks)", ours([]), plain(plain_palm.Shape()), pairs)
        compare("both keep everything", ours(["Decoder.remat=None"]), plain(plain_palm.Shape()), pairs)
        heads = ours(["Attention.num_kv_heads=8"])
        compare(
            "8 key/value heads, both recompute", heads, plain(plain_palm.Shape(k=8, remat=True)), max(pairs // 2, 3)
        )
    if only in (None, "host"):
        host_share(pairs)
    if only in (None, "start"):
        with tempfile.TemporaryDirectory() as folder:
            first_step(Path(folder))
            around_saves(Path(folder) / "saves", Path(folder) / "cache")


if __name__ == "__main__":
    main()
