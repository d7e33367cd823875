"""From log-likelihoods and texts to a document's values, and from those to metrics. Pure: numpy, no jax.

A document's values are numbers by name; a metric says how they become one number with its error. So everything that is
ever asked of a run (each normalisation, calibration, a paired comparison) comes from the values that one run stored.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from palmjax.evaluation import stats

Values = Mapping[str, float]
"""A document's values by name."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """sum(top) / sum(bottom) over documents, then `transform` (increasing). bottom None: the mean over documents.

    percent: shown as a percentage; where all values are from 0 to 1 the interval is too. better: 1 if more is better,
    -1 if less is.
    """

    name: str
    top: str
    bottom: str | None = None
    transform: Callable[[float], float] = float
    percent: bool = False
    better: int = 1

    def estimate(self, rows: Sequence[Values], clusters: Sequence[str]) -> stats.Estimate:
        """Value, standard error and 95 % interval; of documents that have `top`."""
        kept = [(row, cluster) for row, cluster in zip(rows, clusters, strict=True) if self.top in row]
        top = np.array([row[self.top] for row, _ in kept])
        bottom = np.array([1.0 if self.bottom is None else row[self.bottom] for row, _ in kept])
        found = stats.ratio(top, bottom, [cluster for _, cluster in kept])
        if self.percent and ((top >= 0) & (top <= 1)).all():  # Student's t knows no bounds
            found = dataclasses.replace(
                found, low=float(np.maximum(found.low, 0)), high=float(np.minimum(found.high, 1))
            )
        return found if self.transform is float else found.transformed(self.transform)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Expected calibration error (Guo et al. 2017): over ten bins of confidence, the mean of |accuracy - confidence|,
    weighted by documents. The interval is a seeded bootstrap over clusters.
    """

    name: str = "ece"
    percent: bool = False
    better: int = -1

    def estimate(self, rows: Sequence[Values], clusters: Sequence[str]) -> stats.Estimate:
        pairs = np.array([(row["confidence"], row["acc"]) for row in rows])
        return stats.bootstrap(lambda pick: calibration_error(pairs[pick, 0], pairs[pick, 1]), clusters)


AnyMetric = Metric | Calibration


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """ECE of float [n] confidences and correctness, both in [0, 1]; a confidence on an edge goes in the bin below."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    gap = np.bincount(which, correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / max(count.sum(), 1))


def softmax(log_likelihoods: Sequence[float]) -> np.ndarray:
    """Probabilities among the choices, float64 [n]."""
    values = np.asarray(log_likelihoods, np.float64)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def credit(values: Sequence[float], scores: Sequence[float]) -> tuple[float, float]:
    """(worth of the choice of the highest value, by how much that is above the next). Equals share the credit evenly,
    and are 0 apart.
    """
    best, second = sorted(values)[:-3:-1]
    tied = [score for value, score in zip(values, scores, strict=True) if value == best]
    return math.fsum(tied) / len(tied), best - second


GAP = "gap_"
"""Before the name of an accuracy: the value of a document that says how far its choice was from the next one."""
NEAR = 0.01
"""Choices less than that apart are nearly tied: other devices or another precision may choose otherwise (bfloat16 moves
log-likelihoods by up to 0.1 nats where tensor parallelism splits a sum).
"""


ACCURACIES = ("acc", "acc_per_char", "acc_per_byte", "acc_per_token", "acc_unconditional")
CHOICE_METRICS: tuple[AnyMetric, ...] = (
    *(Metric(name, name, percent=True) for name in ACCURACIES),
    Metric("mass", "mass", percent=True),
    Metric("brier", "brier", better=-1),
    Calibration(),
)


def choice_values(
    log_likelihoods: Sequence[float],
    scores: Sequence[float],
    continuations: Sequence[str],
    tokens: Sequence[int],
    unconditional: Sequence[float] | None,
) -> dict[str, float]:
    """A multiple-choice document under every normalisation. Ties share the credit.

    acc: worth of the choice of highest log-likelihood; _per_char, _per_byte, _per_token: of highest log-likelihood a
    character, UTF-8 byte, token (Brown et al. 2020 use tokens, lm-eval's acc_norm characters); _unconditional: minus
    its log-likelihood without the question (Brown et al. 2020, section 2.4). Lengths leave out space at the front.
    gap_<accuracy>: how far the chosen one is above the next in that figure (nats, or nats a character, byte, token).
    mass: the worth, weighted by the probabilities among the choices (TruthfulQA's MC2 where worths are 0 and 1).
    brier: sum over choices of (probability - share of the worth)^2. confidence: of the likeliest choice.
    """
    lengths = {
        "acc": [1] * len(scores),
        "acc_per_char": [len(text.lstrip()) for text in continuations],
        "acc_per_byte": [len(text.lstrip().encode()) for text in continuations],
        "acc_per_token": list(tokens),
    }
    values: dict[str, float] = {}
    for name, by in lengths.items():
        values[name], values[GAP + name] = credit([x / n for x, n in zip(log_likelihoods, by, strict=True)], scores)
    if unconditional is not None:
        gained = [x - y for x, y in zip(log_likelihoods, unconditional, strict=True)]
        values["acc_unconditional"], values[f"{GAP}acc_unconditional"] = credit(gained, scores)
    probabilities, worth = softmax(log_likelihoods), np.asarray(scores, np.float64)
    values["mass"] = math.fsum(probabilities * worth)
    values["confidence"] = float(probabilities.max())
    if (worth >= 0).all():  # else the worths are no shares of anything
        values["brier"] = math.fsum((probabilities - worth / worth.sum()) ** 2)
    return values


# --- texts -----------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, no punctuation, articles or doubled space: the rule of SQuAD and TriviaQA (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(output: str, answer: str) -> float:
    """Harmonic mean of the precision and recall of words, in [0, 1] (Rajpurkar et al. 2016, section 6.1)."""
    ours, theirs = output.split(), answer.split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * shared / (len(ours) + len(theirs))
