"""Statistics against a textbook and against scipy."""

import numpy as np
import pytest
from scipy import stats

from kdjax import significance


def test_welch_on_a_published_example():
    # R's sleep data (Student 1908), unpaired: t = -1.8608, df = 17.776, p = .07939, interval -3.365 to 0.205.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = significance.welch(first, second)
    assert found.difference == pytest.approx(-1.58)
    assert found.p == pytest.approx(0.07939, abs=1e-5)
    assert (found.low, found.high) == (
        pytest.approx(-3.3654832, abs=1e-6),
        pytest.approx(0.2054832, abs=1e-6),
    )
    assert found.n == (10, 10)


def test_interval_covers_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        found = significance.welch(rng.normal(1, 1, 5), rng.normal(0, 3, 5))
        inside += found.low <= 1 <= found.high
    assert stats.binomtest(inside, 1000, 0.95).pvalue > 1e-3


def test_arms_that_never_vary():
    assert significance.welch([1, 1, 1], [1, 1, 1]).p == 1
    assert significance.welch([2, 2, 2], [1, 1, 1])[:4] == (1, 1, 1, 0)


def test_refuses_two_repeats():
    with pytest.raises(ValueError, match="three repeats or more in each arm, got 2 and 5"):
        significance.welch([1, 2], [1, 2, 3, 4, 5])


def test_summary_uses_the_sample_deviation():
    assert significance.summarise([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(1.5275252), 3)
    assert np.isnan(significance.summarise([1.0]).sd)
    with pytest.raises(ValueError, match="at least one"):
        significance.summarise([])
