"""What may be concluded from a handful of seeds: means with intervals, and whether two arms differ.

The statistics are scipy's. This module only decides which test is honest for which data.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Values = Sequence[float] | np.ndarray


class Summary(NamedTuple):
    """Mean, sample standard deviation (n - 1) and number of repeats."""

    mean: float
    sd: float
    n: int


class Comparison(NamedTuple):
    """Difference of two means with its confidence interval and two-sided p."""

    difference: float
    low: float
    high: float
    p: float
    n: tuple[int, int]


def summarise(values: Values) -> Summary:
    """Mean, standard deviation and n of one arm's repeats; sd is nan for a single one."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"summarise needs a flat list of at least one number, got shape {array.shape}.")
    return Summary(
        float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else float("nan"), array.size
    )


def welch(a: Values, b: Values, *, confidence: float = 0.95) -> Comparison:
    """Welch's t-test of mean(a) - mean(b), for independent repeats whose variances may differ.

    Args:
      a: one number per repeat of the first arm.
      b: likewise of the second arm; the lengths may differ.
      confidence: of the interval around the difference.

    Returns:
      The difference, its interval, and the two-sided p. Where neither arm varies at all the interval has no width
      and p is 1 or 0 as the means agree or not.

    Raises:
      ValueError: with fewer than three repeats in an arm, where the test says nothing.

    References:
      Welch, The generalization of Student's problem when several different population variances are involved, 1947.
    """
    from scipy import stats

    if min(len(a), len(b)) < 3:
        raise ValueError(
            f"welch needs three repeats or more in each arm, got {len(a)} and {len(b)}; run more seeds."
        )
    difference = float(np.mean(a) - np.mean(b))
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return Comparison(difference, difference, difference, float(difference == 0), (len(a), len(b)))
    test: Any = stats.ttest_ind(a, b, equal_var=False)  # scipy's annotation lacks its fields
    interval = test.confidence_interval(confidence)
    return Comparison(
        difference, float(interval.low), float(interval.high), float(test.pvalue), (len(a), len(b))
    )
