"""Error bars and paired tests. Pure numpy and scipy; deterministic.

Intervals: Wilson for proportions of independent documents, clustered standard errors (Miller 2024, "Adding error bars
to evals", section 2.2) with Student's t otherwise, and a seeded bootstrap over clusters for what is no mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

LEVEL = 0.95
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its standard error and 95 % interval, from n documents in `clusters` independent groups.

    error, low and high are NaN where one group is all there is.
    """

    value: float
    error: float
    low: float
    high: float
    n: int
    clusters: int

    def transformed(self, f: Callable[[float], float]) -> Estimate:
        """Of f(value), f increasing: the interval's ends are f's, the error by f's slope between them."""
        low, high, middle = f(self.low), f(self.high), f(self.value)
        slope = (high - low) / (self.high - self.low) if self.high > self.low else 0.0
        return dataclasses.replace(self, value=middle, error=self.error * slope, low=low, high=high)


def normal_quantile(level: float = LEVEL) -> float:
    return float(special.ndtri(0.5 + level / 2))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    return float(special.stdtrit(freedom, 0.5 + level / 2))


def wilson(successes: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): inside [0, 1], and not a point at 0 or n of n."""
    z = normal_quantile(level)
    share, denominator = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(max(share * (1 - share), 0.0) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _by_cluster(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Sums over each cluster, in the clusters' sorted order: float64 [clusters, ...]."""
    names, which = np.unique(np.asarray(clusters, object).astype(str), return_inverse=True)
    out = np.zeros((len(names), *values.shape[1:]))
    np.add.at(out, which, values)
    return out


def ratio(top: np.ndarray, bottom: np.ndarray, clusters: Sequence[str]) -> Estimate:
    """sum(top) / sum(bottom), float64 [n] each, with the clustered standard error of a ratio of sums.

    For bottom = 1 and clusters of one document that is the standard error of the mean. Sums are exact (`math.fsum`), so
    the value does not depend on the order. A share of independent documents (all 0 or 1) has Wilson's interval.
    """
    n = len(top)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0)
    total = math.fsum(bottom)
    value = math.fsum(top) / total if total else math.nan
    residuals = _by_cluster(top - value * bottom, clusters)
    count = len(residuals)
    if count < 2:
        return Estimate(value, math.nan, math.nan, math.nan, n, count)
    error = math.sqrt(count / (count - 1) * math.fsum(residuals**2)) / total
    if count == n and (bottom == 1).all() and np.isin(top, (0.0, 1.0)).all():
        low, high = wilson(math.fsum(top), n)
    else:
        half = t_quantile(count - 1) * error
        low, high = value - half, value + half
    return Estimate(value, error, low, high, n, count)


def bootstrap(
    statistic: Callable[[np.ndarray], float], clusters: Sequence[str], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """The percentile interval of a statistic of document indices, over clusters drawn with replacement (Efron 1979)."""
    names = np.asarray(clusters, object).astype(str)
    order = np.argsort(names, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(np.unique(names, return_inverse=True)[1][order])) + 1)
    value, rng = statistic(np.arange(len(names))), np.random.default_rng(seed)
    if len(groups) < 2:
        return Estimate(value, math.nan, math.nan, math.nan, len(names), len(groups))
    drawn = [
        statistic(np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(value, float(np.std(drawn, ddof=1)), float(low), float(high), len(names), len(groups))


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p-value that two models are right equally often, from the documents that only one got right: exact,
    by the binomial distribution (McNemar 1947).
    """
    n = first_only + second_only
    if n == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(first_only, second_only), n, 0.5)))


@dataclasses.dataclass(frozen=True)
class Paired:
    """Second minus first over the same documents. first_only, second_only: documents that only one got right, and
    `p` McNemar's; None where the metric is not right or wrong.
    """

    difference: Estimate
    bootstrap: Estimate
    first_only: int | None = None
    second_only: int | None = None
    p: float | None = None

    @property
    def decided(self) -> bool:
        """Whether both intervals leave out 0: otherwise there is no ranking."""
        intervals = ((e.low, e.high) for e in (self.difference, self.bootstrap))
        return all(low > 0 or high < 0 for low, high in intervals)


def paired(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], clusters: Sequence[str], seed: int = 0
) -> Paired:
    """Compares two models by (top, bottom), float64 [n] each, of the same documents in the same order.

    The difference of two ratios of sums with one bottom (equal documents) is one ratio: (top2 - top1) / bottom. Where
    the bottoms differ, the residuals of both ratios are paired within clusters.
    """
    (top1, bottom1), (top2, bottom2) = first, second
    total1, total2 = math.fsum(bottom1), math.fsum(bottom2)
    value1, value2 = math.fsum(top1) / total1, math.fsum(top2) / total2
    residuals = _by_cluster((top2 - value2 * bottom2) / total2 - (top1 - value1 * bottom1) / total1, clusters)
    count, difference = len(residuals), value2 - value1
    if count < 2:
        found = Estimate(difference, math.nan, math.nan, math.nan, len(top1), count)
    else:
        error = math.sqrt(count / (count - 1) * math.fsum(residuals**2))
        half = t_quantile(count - 1) * error
        found = Estimate(difference, error, difference - half, difference + half, len(top1), count)

    def statistic(pick: np.ndarray) -> float:
        return float(top2[pick].sum() / bottom2[pick].sum() - top1[pick].sum() / bottom1[pick].sum())

    drawn = bootstrap(statistic, clusters, seed)
    both = np.concatenate([top1, top2])
    if not (np.isin(both, (0.0, 1.0)).all() and (bottom1 == 1).all() and (bottom2 == 1).all()):
        return Paired(found, drawn)
    ours, theirs = int(((top1 == 1) & (top2 == 0)).sum()), int(((top1 == 0) & (top2 == 1)).sum())
    return Paired(found, drawn, ours, theirs, mcnemar(ours, theirs))
