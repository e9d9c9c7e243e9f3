"""How soon runs reached a target, where some never did: their times are censored at the end of the run.

A mean that counts a run at its end, as if it had reached the target there, is too low; a t-test of such means is wrong.
Ranks need no time of a run that is only known to be later than all others.
"""

from typing import NamedTuple

import numpy as np

from kdjax.extras import extra
from kdjax.significance.means import Values


class Times(NamedTuple):
    """The median time, infinite where it is later than the end of the runs, and how many of n reached the target."""

    median: float
    reached: int
    n: int


class Sooner(NamedTuple):
    """How probable it is that a run of the first arm is sooner than one of the second (ties count half), and p."""

    probability: float
    p: float
    n: tuple[int, int]


def median_time(times: Values, reached: Values) -> Times:
    """The median time to a target, by Kaplan and Meier, of runs that are censored where they end.

    Args:
      times: when each run reached the target, or else ended.
      reached: whether it did, 0 or 1.

    Raises:
      ValueError: without any run, or if a run has no flag.

    References:
      Kaplan and Meier, Nonparametric estimation from incomplete observations, 1958.
    """
    with extra("report"):
        from scipy import stats

    times, reached = _censored("median_time", times, reached)
    found = (int(reached.sum()), reached.size)
    if not found[0]:
        return Times(float("inf"), *found)
    survival = stats.ecdf(stats.CensoredData.right_censored(times, ~reached)).sf
    below = survival.quantiles[survival.probabilities <= 0.5]
    return Times(float(below[0]) if below.size else float("inf"), *found)


def sooner(times_a: Values, reached_a: Values, times_b: Values, reached_b: Values) -> Sooner:
    """The Mann-Whitney test of which arm reaches a target sooner; runs that never did are later than all that did.

    Runs of both arms must end at the same time if they do not reach the target.

    Args:
      times_a: of the first arm, as in :func:`median_time`.
      reached_a: of the first arm.
      times_b: of the second arm.
      reached_b: of the second arm.

    Raises:
      ValueError: with fewer than three runs in an arm, or if a run has no flag.

    References:
      Mann and Whitney, On a test of whether one of two random variables is stochastically larger than the other, 1947.
      Gehan, A generalized Wilcoxon test for comparing arbitrarily singly-censored samples, 1965.
    """
    with extra("report"):
        from scipy import stats

    arms = [_censored("sooner", *arm) for arm in ((times_a, reached_a), (times_b, reached_b))]
    if min(times.size for times, _ in arms) < 3:
        raise ValueError("sooner needs three runs or more in each arm; run more seeds.")
    late = np.concatenate([np.where(reached, times, np.inf) for times, reached in arms])
    ranks, n = stats.rankdata(late), (arms[0][0].size, arms[1][0].size)
    if np.ptp(ranks) == 0:  # no run is sooner than another
        return Sooner(0.5, 1.0, n)
    test = stats.mannwhitneyu(ranks[n[0] :], ranks[: n[0]])
    return Sooner(float(test.statistic) / (n[0] * n[1]), float(test.pvalue), n)


def _censored(test: str, times: Values, reached: Values) -> tuple[np.ndarray, np.ndarray]:
    times, reached = np.asarray(times, np.float64), np.asarray(reached)
    if (
        times.ndim != 1
        or times.shape != reached.shape
        or not times.size
        or not np.isin(reached, (0, 1)).all()
    ):
        raise ValueError(
            f"{test} needs a time and a flag, 0 or 1, per run, got shapes {times.shape} and {reached.shape}."
        )
    return times, reached.astype(bool)
