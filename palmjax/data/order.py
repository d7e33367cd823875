"""Which rows a step reads: batch sizes, mixture shares, shuffling and skipped ranges as integer arithmetic.

Imports config and numpy only. Everything is a pure function of (config, step), the same on any number of hosts and
O(1) to resume or rewind: nothing is saved but the step and the skips. The chain is

    step -> global rows (batch ramp, skips) -> (source, n-th row of that source) (mixture) -> (epoch, row) (shuffle)

This is ours; that a batch must be a function of the step is PaLM's (section 5, "Training setup", determinism).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from palmjax.config import BatchSizePart, ConfigError, section

Skips = tuple[tuple[int, int], ...]
"""Pairs (from_step, rows): from that step on, this many global rows are passed over."""

WEIGHT_TOTAL = 1 << 20
"""Mixture weights are integers of this sum: shares are exact to one part in a million."""

MAX_ROW = 1 << 42
"""Global row numbers stay below this, so that their product with a weight fits int64."""


class Ramp:
    """Rows a step, piecewise constant: `stages` are (first step, rows), ascending from step 0. Exact, O(log stages)."""

    def __init__(self, stages: Sequence[tuple[int, int]]):
        firsts = [first for first, _ in stages]
        if not stages or firsts[0] != 0 or any(b <= a for a, b in itertools.pairwise(firsts)):
            raise ConfigError(
                f"batch stages {tuple(stages)}: first steps must ascend from 0, as in ((0, 512), (50000, 1024))"
            )
        if bad := [rows for _, rows in stages if rows < 1]:
            raise ConfigError(f"batch stages {tuple(stages)}: {bad[0]} rows a step; it must be at least 1")
        self.stages = tuple((int(first), int(rows)) for first, rows in stages)
        self._firsts = firsts
        self._rows_before = [0]
        for (first, rows), (following, _) in itertools.pairwise(self.stages):
            self._rows_before.append(self._rows_before[-1] + (following - first) * rows)

    def rows(self, step: int) -> int:
        """Rows of this step."""
        return self.stages[self._stage(step)][1]

    def first_row(self, step: int, skips: Skips = ()) -> int:
        """Rows of all steps before this one, and those skipped up to it: the global number of this step's first row."""
        stage = self._stage(step)
        first, rows = self.stages[stage]
        skipped = sum(count for from_step, count in skips if from_step <= step)
        return self._rows_before[stage] + (step - first) * rows + skipped

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different batch sizes, in the order of their first steps: one compiled program each."""
        return tuple(dict.fromkeys(rows for _, rows in self.stages))

    def _stage(self, step: int) -> int:
        if step < 0:
            raise ConfigError(f"step {step} is negative")
        return bisect.bisect_right(self._firsts, step) - 1


@section
class FixedBatch(BatchSizePart):
    """The same number of rows every step; a plain int in `DatasetConfig.batch_size` means this."""

    rows: int

    def build(self) -> Ramp:
        return Ramp(((0, self.rows),))


@section
class BatchRamp(BatchSizePart):
    """Batch sizes by stages of (first step, rows).

    PaLM 540B (section 5): ((0, 512), (50_000, 1024), (115_000, 2048)).
    """

    stages: tuple[tuple[int, int], ...]

    def build(self) -> Ramp:
        return Ramp(self.stages)


@section
class LinearBatchRamp(BatchSizePart):
    """From `first` to `last` rows by `increment`, spread evenly over the first `over_rows` rows of training.

    The meaning is that of Megatron-LM's `--rampup-batch-size first increment over_rows`: a step that begins after c
    rows has first + increment * floor(c * increments / over_rows) rows. BLOOM-176B: 192 to 2048 by 16 over 9,765,625.
    """

    first: int
    last: int
    increment: int
    over_rows: int

    def build(self) -> Ramp:
        span = self.last - self.first
        if self.increment < 1 or span < self.increment or span % self.increment or self.over_rows < 1 or self.first < 1:
            raise ConfigError(
                f"a linear batch ramp from {self.first} to {self.last} by {self.increment} over {self.over_rows} rows: "
                "the increment must divide the difference, and all must be positive"
            )
        increments = span // self.increment
        stages, step, consumed = [], 0, 0
        for nth in range(increments):
            rows = self.first + nth * self.increment
            # The first consumed count at which the next increment holds: c * increments >= (nth + 1) * over_rows.
            until = -(-(nth + 1) * self.over_rows // increments)
            steps = max(0, -(-(until - consumed) // rows))
            if steps:
                stages.append((step, rows))
            step, consumed = step + steps, consumed + steps * rows
        return Ramp((*stages, (step, self.last)))


def ramp_of(batch_size: int | BatchSizePart) -> Ramp:
    """The Ramp of `DatasetConfig.batch_size`."""
    return batch_size.build() if isinstance(batch_size, BatchSizePart) else FixedBatch(rows=batch_size).build()


def integer_weights(rates: Sequence[float]) -> tuple[int, ...]:
    """Rates, of any sum, as integers that sum to WEIGHT_TOTAL (largest remainder); a positive rate stays at least 1."""
    if not rates or any(not math.isfinite(rate) or rate <= 0 for rate in rates):
        raise ConfigError(f"mixture rates {tuple(rates)} must be positive numbers")
    exact = [rate / math.fsum(rates) * WEIGHT_TOTAL for rate in rates]
    weights = [max(1, math.floor(x)) for x in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: weights[i] - exact[i])
    missing = WEIGHT_TOTAL - sum(weights)
    if missing >= 0:
        for i in by_remainder[:missing]:
            weights[i] += 1
    else:  # many rates below one part in a million were raised to it: the largest gives
        weights[max(range(len(rates)), key=weights.__getitem__)] += missing
    return tuple(weights)


def split(rows: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Deals global rows out to sources in proportion to integer weights, as evenly as whole rows allow.

    The largest source takes row g where floor((g+1)a/b) steps up from floor(g a/b), a its weight and b the sum
    (Bresenham's line); what it leaves, numbered anew from 0, goes to the others the same way. Among any first G rows
    each of k sources is within 2 + ln k rows of its share, and its rows are numbered 0, 1, 2, ... as they come.

    rows: int64 [n]. Returns (source, number within the source), int64 [n] each.
    """
    if rows.size and (rows.min() < 0 or rows.max() >= MAX_ROW):
        raise ConfigError(f"global row {int(rows.max())} is out of range: rows are numbered from 0 to 2^42")
    by_weight = sorted(range(len(weights)), key=lambda i: -weights[i])
    source = np.full(rows.shape, by_weight[-1], np.int64)
    left = np.asarray(rows, np.int64).copy()
    open_ = np.ones(rows.shape, bool)
    total = sum(weights)
    for index in by_weight[:-1]:
        weight = weights[index]
        mine = left * weight // total
        taken = open_ & ((left + 1) * weight // total > mine)
        source[taken] = index
        left = np.where(taken, mine, np.where(open_, left - mine, left))
        open_ &= ~taken
        total -= weight
    return source, left


_GOLDEN = 0x9E3779B97F4A7C15
_UINT64 = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of uint64, every bit depending on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, keys: np.ndarray, rounds: int = 8) -> np.ndarray:
    """A keyed permutation of range(size), evaluated at index: a Feistel network over a x b >= size with cycle walking.

    index: int [n] within range(size). keys: uint64 [n], the key for each (equal keys: the same permutation).
    Returns int64 [n]. No table is made: any row of any epoch is found at once.
    """
    if size < 2:
        return np.zeros(index.shape, np.int64)
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    out = np.asarray(index).astype(np.uint64)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), out.shape)
    left_size, right_size = np.uint64(a), np.uint64(b)
    salts = [np.uint64(_GOLDEN * (nth + 1) & _UINT64) for nth in range(rounds)]
    pending = np.arange(out.size)
    while pending.size:  # a * b - size < a, so hardly any number needs a second walk
        left, right, key = out[pending] // right_size, out[pending] % right_size, keys[pending]
        for nth in range(0, rounds, 2):
            left = (left + _mix(_mix(key + salts[nth]) ^ right) % left_size) % left_size
            right = (right + _mix(_mix(key + salts[nth + 1]) ^ left) % right_size) % right_size
        out[pending] = left * right_size + right
        pending = pending[out[pending] >= size]
    return out.astype(np.int64)


def epoch_keys(seed: int, source: int, epoch: np.ndarray) -> np.ndarray:
    """uint64 keys [n] of the permutations of a source's epochs [n]; seed and source are any integers."""
    base = np.array([seed & _UINT64, source & _UINT64], np.uint64)
    golden = np.uint64(_GOLDEN)
    return _mix(_mix(_mix(base[:1] + golden) ^ base[1:]) + np.asarray(epoch).astype(np.uint64) * golden)


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a dataset's rows.

    ramp: rows a step. weights: integer share of each source. row_counts: rows in each source.
    source_keys: an integer for each source that marks its shuffles (a hash of its name, so that adding a source to a
    mixture leaves the others' shuffles alone). shuffle: False reads each source in its own order, epoch after epoch.
    """

    ramp: Ramp
    weights: tuple[int, ...]
    row_counts: tuple[int, ...]
    source_keys: tuple[int, ...]
    seed: int
    shuffle: bool

    def of_step(self, step: int, skips: Skips = (), rows: slice | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(source, row within the source), int64 [n] each, of a step's batch or of its part `rows`, a slice."""
        first = self.ramp.first_row(step, skips)
        return self.of_global(first + np.arange(self.ramp.rows(step), dtype=np.int64)[rows or slice(None)])

    def of_global(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row within the source), int64 [n] each, of global row numbers int64 [n]."""
        source, nth = split(rows, self.weights)
        within = np.empty_like(nth)
        for index, (count, key) in enumerate(zip(self.row_counts, self.source_keys, strict=True)):
            mine = source == index
            epoch, row = np.divmod(nth[mine], count)
            within[mine] = permute(row, count, epoch_keys(self.seed, key, epoch)) if self.shuffle else row
        return source, within
