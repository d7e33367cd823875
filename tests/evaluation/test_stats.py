"""Error bars and paired tests, against published figures, scipy, and numpy written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from palmjax.evaluation import score, stats

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (7, 25), (120, 120), (60, 120)])
def test_wilson_is_scipys(successes: int, n: int) -> None:
    expected = scipy_stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert stats.wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_all_right_is_no_certainty() -> None:
    found = stats.ratio(np.ones(120), np.ones(120), [str(i) for i in range(120)])
    assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(0.969, abs=5e-4)


def test_independent_documents_have_the_standard_error_of_a_mean() -> None:
    values = RNG.normal(size=50)
    found = stats.ratio(values, np.ones(50), [str(i) for i in range(50)])
    assert found.error == pytest.approx(scipy_stats.sem(values), rel=1e-12)
    low, high = scipy_stats.t.interval(0.95, 49, values.mean(), scipy_stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)


def test_clustered_error_counts_what_documents_share() -> None:
    """Miller 2024, equation 4: the square of a cluster's summed residuals; copies of a document say nothing new."""
    values = RNG.normal(size=30)
    clusters = [str(i) for i in range(30)]
    once = stats.ratio(values, np.ones(30), clusters)
    thrice = stats.ratio(np.tile(values, 3), np.ones(90), clusters * 3)
    assert thrice.error == pytest.approx(once.error, rel=1e-12) and thrice.clusters == 30
    naive = stats.ratio(np.tile(values, 3), np.ones(90), [str(i) for i in range(90)])
    assert naive.error < 0.6 * once.error
    sums = np.array([(values[:2] - values.mean()).sum(), *(values[2:] - values.mean())])
    expected = math.sqrt(29 / 28 * (sums**2).sum()) / 30
    assert stats.ratio(values, np.ones(30), ["0", "0", *clusters[2:]]).error == pytest.approx(expected, rel=1e-12)


def test_one_cluster_has_no_error_bar() -> None:
    found = stats.ratio(np.array([1.0, 0.0]), np.ones(2), ["a", "a"])
    assert found.value == 0.5 and math.isnan(found.error) and math.isnan(found.low)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits = [0, 0]
    for _ in range(400):
        right = (RNG.random(60) < 0.8).astype(float)
        found = stats.ratio(right, np.ones(60), [str(i) for i in range(60)])
        hits[0] += found.low <= 0.8 <= found.high
        shared = np.repeat(RNG.normal(size=20), 3) + 0.1 * RNG.normal(size=60)
        found = stats.ratio(shared, np.ones(60), [str(i // 3) for i in range(60)])
        hits[1] += found.low <= 0 <= found.high
    assert all(0.91 <= hit / 400 <= 0.985 for hit in hits), hits


def test_bootstrap_is_repeatable_and_agrees_with_theory() -> None:
    values, clusters = RNG.normal(size=80), [str(i) for i in range(80)]
    first, again = (stats.bootstrap(lambda pick: float(values[pick].mean()), clusters) for _ in range(2))
    assert first == again
    assert first.error == pytest.approx(scipy_stats.sem(values), rel=0.1)
    other = stats.bootstrap(lambda pick: float(values[pick].mean()), clusters, seed=1)
    assert other != first and other.value == first.value


@pytest.mark.parametrize(("first", "second"), [(0, 0), (13, 3), (3, 13), (5, 5), (1, 0)])
def test_mcnemar_is_the_exact_binomial(first: int, second: int) -> None:
    n = first + second
    expected = scipy_stats.binomtest(first, n).pvalue if n else 1.0
    assert stats.mcnemar(first, second) == pytest.approx(min(1.0, expected), abs=1e-12)


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    ability = RNG.normal(size=300)
    a = (ability + 0.3 * RNG.normal(size=300) > 0).astype(float)
    b = (ability + 0.3 * RNG.normal(size=300) > -0.35).astype(float)
    clusters, ones = [str(i) for i in range(300)], np.ones(300)
    found = stats.paired((a, ones), (b, ones), clusters)
    assert found.difference.value == pytest.approx(b.mean() - a.mean())
    assert found.difference.error == pytest.approx(scipy_stats.sem(b - a), rel=1e-12)
    apart = math.hypot(*(stats.ratio(x, ones, clusters).error for x in (a, b)))
    assert found.difference.error < 0.8 * apart and found.decided
    assert (found.first_only, found.second_only) == (int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum()))
    assert not stats.paired((a, ones), (a[::-1].copy(), ones), clusters).decided
    same = stats.paired((a, ones), (a, ones), clusters)
    assert same.difference.value == 0 and same.p == 1.0 and not same.decided


def test_a_ratio_of_sums_is_paired_by_its_residuals() -> None:
    sizes = RNG.integers(10, 90, 40).astype(float)
    a = sizes * (1 + 0.1 * RNG.normal(size=40))
    b = a - 0.05 * sizes
    found = stats.paired((a, sizes), (b, sizes), [str(i) for i in range(40)])
    assert found.difference.value == pytest.approx(-0.05) and found.decided and found.p is None
    assert found.difference.error < 1e-12


# --- values ----------------------------------------------------------------------------------------------------------


def test_ties_share_the_credit_and_are_counted() -> None:
    values = score.choice_values([-1.0, -2.0, -1.0], [0.0, 0.0, 1.0], [" a", " b", " c"], [1, 1, 1], None)
    assert values["acc"] == 0.5 and values["gap_acc"] == 0
    assert score.choice_values([-1.0, -2.5], [1.0, 0.0], [" a", " bc"], [1, 1], None)["gap_acc"] == 1.5
    assert score.choice_values([-1.0, -2.5], [1.0, 0.0], [" a", " bc"], [1, 1], None)["gap_acc_per_char"] == 0.25


def test_every_normalisation_by_hand() -> None:
    # " ab": 2 characters, 2 bytes, 3 tokens; " ßß": 2 characters, 4 bytes, 1 token
    values = score.choice_values([-6.0, -8.0], [0.0, 1.0], [" ab", " ßß"], [3, 1], [-1.0, -9.0])
    assert values["acc"] == 0.0  # -6 > -8
    assert values["acc_per_char"] == 0.0  # -3 > -4
    assert values["acc_per_byte"] == 1.0  # -3 < -2
    assert values["acc_per_token"] == 0.0  # -2 > -8
    assert values["acc_unconditional"] == 1.0  # -5 < 1
    p = 1 / (1 + math.exp(2.0))  # of the right one
    assert values["mass"] == pytest.approx(p) and values["confidence"] == pytest.approx(1 - p)
    assert values["brier"] == pytest.approx(2 * (1 - p) ** 2)


def test_calibration_error_by_hand() -> None:
    confidence, correct = np.array([0.95, 0.95, 0.55, 0.6]), np.array([1.0, 0.0, 1.0, 0.0])
    # bin (0.9, 1]: 0.95 against 0.5, two documents; bin (0.5, 0.6]: 0.575 against 0.5, two documents
    assert score.calibration_error(confidence, correct) == pytest.approx(0.5 * 0.45 + 0.5 * 0.075)
    assert score.calibration_error(np.array([1.0]), np.array([1.0])) == 0.0


@pytest.mark.parametrize(
    ("output", "answer", "value"),
    [("the cat sat", "The cat, sat!", 1.0), ("a cat", "dog", 0.0), ("cat", "black cat", 2 / 3), ("", "", 1.0)],
)
def test_f1_counts_words_as_squad_does(output: str, answer: str, value: float) -> None:
    assert score.f1(score.normalised(output), score.normalised(answer)) == pytest.approx(value)
