"""What the guard costs: the same step with and without its rules, in turn, and the host's part. `python -m
benchmarks.guard_cost`

Prints, for the job of gin/exp/palm_nano_stdlib.gin (or another file) on random tokens:
- CPU seconds a step, of all threads, with the rule for what is not finite and without, in short blocks that alternate,
  and the ratio of their sums with its standard error; beside it the same of two programs without the rule, which must
  come out at 1;
- the compiler's own count of FLOPs and of bytes that the step moves, with and without: no noise;
- CPU seconds of a save's digests and of its files' checksums, as a share of the steps between two saves;
- microseconds of the host's rules for a step, every rule on, as a share of the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from palmjax import configure, mesh
from palmjax.checkpoint import digest, seal
from palmjax.config import Experiment, GuardConfig, NonFiniteRule, SpikeRule
from palmjax.data import feed
from palmjax.data.batch import Batch
from palmjax.data.order import Skips, ramp_of
from palmjax.guard import Position, Watch
from palmjax.step import program, tensor_names

JOB = "exp/palm_nano_stdlib.gin"


class Side:
    """One program, its state and a batch."""

    def __init__(self, experiment: Experiment, rows: int, length: int):
        prog = program(experiment, mesh.build(experiment.mesh))
        self._state = prog.initial_state()
        self._batch = jax.device_put(random_batch(experiment, rows, length), prog.batch_sharding(rows, length))
        self.compiled: Any = prog.lower(rows, length).compile()
        self.tensors = tensor_names(prog.abstract_state.params)

    def seconds(self, steps: int) -> float:
        """CPU seconds of a step, in a block of `steps` that the host only launches."""
        began = time.process_time()
        for _ in range(steps):
            self._state, metrics = self.compiled(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return (time.process_time() - began) / steps

    def checksums(self) -> tuple[float, float]:
        """CPU seconds of a save's (digests, files' checksums), the second time."""
        with tempfile.TemporaryDirectory(prefix="guard-") as folder:
            path, found = Path(folder) / "state", (0.0, 0.0)
            path.write_bytes(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(self._state)))
            for _ in range(2):
                began = time.process_time()
                digest.digests(self._state)
                middle = time.process_time()
                seal.write(Path(folder))
                found = (middle - began, time.process_time() - middle)
        return found

    def count(self, name: str) -> float:
        """FLOPs or bytes of a step by the compiler's analysis."""
        return self.compiled.cost_analysis()[name]


def random_batch(experiment: Experiment, rows: int, length: int) -> Batch:
    """Tokens drawn anew: what they are makes no difference to the time."""
    size = getattr(experiment.model, "vocab_size", 256)
    tokens = np.random.default_rng(0).integers(3, size, (rows, length + 1), dtype=np.int32)
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)


def ratio(a: list[float], b: list[float]) -> str:
    """Of the sums, with the standard error of many such ratios of rounds drawn anew (bootstrap)."""
    pairs = np.array([a, b])
    drawn = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    sums = pairs[:, drawn].sum(axis=-1)
    return f"{sum(b) / sum(a):.4f} +- {np.std(sums[1] / sums[0]):.4f}, {np.median(pairs[1] / pairs[0]):.4f} by pairs"


def in_turn(calls: list[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Each call's results, the calls made round by round in an order drawn anew."""
    found: list[list[float]] = [[] for _ in calls]
    order, drawn = list(range(len(calls))), random.Random(0)
    for _ in range(rounds):
        drawn.shuffle(order)
        for i in order:
            found[i].append(calls[i]())
    return found


class _Order:
    """Where steps read, of one batch size."""

    def __init__(self, rows: int):
        self._ramp = ramp_of(rows)

    def first_row(self, step: int, skips: Skips = ()) -> int:
        return self._ramp.first_row(step, skips)

    def batch_size(self, step: int) -> int:
        return self._ramp.rows(step)


def host_seconds(tensors: tuple[str, ...], steps: int = 2000) -> float:
    """Of the watch for a step, with every rule on and its window full."""
    rules = GuardConfig(nonfinite=NonFiniteRule(), spike=SpikeRule())
    watch = Watch(rules, position=Position(order=_Order(8)), save_period=100, tensors=tensors)
    noise = np.random.default_rng(0).normal(3, 0.05, steps + 200)
    for step in range(1, 201):
        watch.observe(step, {"loss": noise[step - 1], "nonfinite": 0.0})
    began = time.perf_counter()
    for step in range(201, steps + 201):
        watch.observe(step, {"loss": noise[step - 1], "nonfinite": 0.0})
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default=JOB, help="a run file")
    parser.add_argument("--gin", action="append", default=[], metavar="KEY=VALUE", help="a binding; may be repeated")
    parser.add_argument("--rows", type=int, help="rows a step (the job's)")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2, help="steps of a block")
    options = parser.parse_args()
    experiment = configure.load([options.job], options.gin, placeholders=True).experiment
    length = feed.row_length(experiment.train_dataset)
    rows = options.rows or ramp_of(experiment.train_dataset.batch_size).rows(0)
    without = dataclasses.replace(experiment, guard=GuardConfig(nonfinite=None))
    guarded = dataclasses.replace(experiment, guard=GuardConfig(nonfinite=NonFiniteRule()))
    sides = [Side(one, rows, length) for one in (without, guarded, without)]
    for side in sides:
        side.seconds(2)
    plain, ours, again = in_turn([lambda side=side: side.seconds(options.steps) for side in sides], options.rounds)

    step = statistics.fmean(plain)
    print(f"{options.job}, {rows} rows of {length} on {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"step: {1e3 * step:.2f} ms of CPU without the guard, {1e3 * statistics.fmean(ours):.2f} ms with it")
    print(f"ratio with / without: {ratio(plain, ours)}")
    print(f"ratio without / without (noise): {ratio(plain, again)}")
    for name in ("flops", "bytes accessed"):
        a, b = sides[0].count(name), sides[1].count(name)
        print(f"{name}: {a:,.0f} without, {b:,.0f} with: x{b / a:.5f}")
    period, both = experiment.checkpoint.save.period, sides[1].checksums()
    print(
        f"a save's checksums: {1e3 * both[0]:.0f} ms of digests, {1e3 * both[1]:.0f} ms of files, "
        f"{100 * sum(both) / (period * step):.3f} % of the {period} steps between two saves"
    )
    host = host_seconds(sides[1].tensors)
    print(f"host: {1e6 * host:.0f} us a step, every rule on: {100 * host / step:.3f} % of the step", flush=True)


if __name__ == "__main__":
    main()
