"""Statistics for a handful of seeds: confidence intervals, and tests of the difference between two arms.

The tests are those of scipy and statsmodels; data that do not suit a test are refused.

* :func:`summarise`, :func:`t_interval`: the mean of one arm.
* :func:`welch`: two arms, each trained with several seeds.
* :func:`mcnemar`: two students on the same test examples, one run of each.
* :func:`equivalence`: whether two arms are equally good. A large p of :func:`welch` does not show that.
* :func:`holm`: corrects the p-values of all arms of a table.
* :func:`seeds_needed`: how many seeds would show a difference of a given size. To be asked before the runs.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.extras import extra

Values = Sequence[float] | np.ndarray

FEWEST = 3  # repeats per arm, for any test or interval
ROUNDING = 1e-12  # a spread below this part of the largest value is rounding error


class Summary(NamedTuple):
    """Mean, sample standard deviation (n - 1) and number of repeats."""

    mean: float
    sd: float
    n: int


class Interval(NamedTuple):
    """A mean of n repeats with its confidence interval."""

    estimate: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """Difference of two means with its confidence interval, two-sided p, and the repeats of each arm."""

    difference: float
    low: float
    high: float
    p: float
    n: tuple[int, int]


class Margin(NamedTuple):
    """Difference of two means with its 1 - 2 alpha interval, and the p of its lying beyond the margin ``delta``."""

    difference: float
    low: float
    high: float
    p: float
    delta: float
    n: tuple[int, int]


class McNemar(NamedTuple):
    """On how many of n test examples only one student is right, and the two-sided p of equal accuracy.

    ``p`` is exact and conservative. ``mid_p`` has more power, and in practice it keeps its level too.
    """

    only_a: int
    only_b: int
    p: float
    mid_p: float
    n: int


def summarise(values: Values) -> Summary:
    """Mean, standard deviation and n of one arm's repeats; sd is nan for a single one.

    Raises:
      ValueError: without any value, or if they are not a flat list.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"summarise needs a flat list of at least one number, got shape {array.shape}.")
    sd = float(array.std(ddof=1)) if array.size > 1 else float("nan")
    return Summary(float(array.mean()), sd, array.size)


def t_interval(values: Values) -> Interval:
    """Student's 95 % t-interval of the mean, for roughly normal repeats; equal ones give no width.

    Raises:
      ValueError: with fewer than three values, or one that is not finite.

    References:
      Student, The probable error of a mean, 1908.
    """
    with extra("report"):
        from scipy import stats

    (array,) = _arms("t_interval", values)
    mean = float(array.mean())
    if _constant(array):
        return Interval(mean, mean, mean, array.size)
    test: Any = stats.ttest_1samp(array, 0)
    low, high = map(float, test.confidence_interval(0.95))
    return Interval(mean, low, high, array.size)


def welch(a: Values, b: Values, *, confidence: float = 0.95) -> Comparison:
    """Welch's t-test of mean(a) - mean(b), for independent repeats whose variances may differ.

    Args:
      a: one number per repeat of the first arm.
      b: one number per repeat of the second arm; the lengths may differ.
      confidence: of the interval around the difference. If neither arm varies, it has no width, and p is 1 where the
        means agree and 0 where they do not.

    Raises:
      ValueError: with fewer than three repeats in an arm, or values that are not finite.

    References:
      Welch, The generalization of Student's problem when several different population variances are involved, 1947.
    """
    _fraction("confidence", confidence)
    a, b = _arms("welch", a, b)
    difference = float(np.mean(a) - np.mean(b))
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return Comparison(difference, difference, difference, float(difference == 0), (len(a), len(b)))
    with extra("report"):
        from scipy import stats

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # one arm may be constant
        test: Any = stats.ttest_ind(a, b, equal_var=False)
    low, high = map(float, test.confidence_interval(confidence))
    return Comparison(difference, low, high, float(test.pvalue), (len(a), len(b)))


def mcnemar(correct_a: Any, correct_b: Any, *, ids_a: Any, ids_b: Any) -> McNemar:
    """McNemar's test of two students on the same test examples, by the examples on which only one is right.

    It compares these two trained students. To compare two methods, train several seeds of each and use :func:`welch`.
    Choose ``p`` or ``mid_p`` before looking at either.

    Args:
      correct_a: one flag per test example: whether the first student is right.
      correct_b: the same for the second student.
      ids_a: the id of each test example in ``correct_a``, a number or name.
      ids_b: the ids of ``correct_b``: the same examples, in any order.

    Returns:
      How often only one student is right, the exact binomial p, and the mid-p, which counts half the probability of
      the observed table. Both are 1 where the students never disagree.

    Raises:
      ValueError: if the examples differ, one is listed twice, or a flag is neither True nor False.

    References:
      McNemar, Note on the sampling error of the difference between correlated proportions or percentages, 1947.
      Fagerland, Lydersen and Laake, The McNemar test for binary matched-pairs data: mid-p and asymptotic are better
      than exact conditional, 2013, for the mid-p.
    """
    with extra("report"):
        from scipy import stats
        from statsmodels.stats import contingency_tables

    (a, ids_a), (b, ids_b) = _flags(correct_a, ids_a), _flags(correct_b, ids_b)
    if not np.array_equal(ids_a, ids_b):
        first, second = set(ids_a.tolist()), set(ids_b.tolist())
        raise ValueError(
            f"mcnemar needs both students on the same test examples, got {_some(first - second)} only for the first "
            f"and {_some(second - first)} only for the second. Test both on one split. Accuracies of several seeds on "
            "different splits are compared by welch."
        )
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    if only_a == only_b == 0:
        return McNemar(0, 0, 1.0, 1.0, a.size)
    table = [[int(np.sum(a & b)), only_a], [only_b, int(np.sum(~a & ~b))]]
    test: Any = contingency_tables.mcnemar(table, exact=True)
    exact, point = float(test.pvalue), float(stats.binom.pmf(only_a, only_a + only_b, 0.5))
    mid = 1 - point / 2 if only_a == only_b else exact - point
    return McNemar(only_a, only_b, exact, mid, a.size)


def equivalence(a: Values, b: Values, *, delta: float, alpha: float = 0.05) -> Margin:
    """Two one-sided Welch tests (TOST) of whether the means of independent repeats differ by less than ``delta``.

    Args:
      a: one number per repeat of the first arm.
      b: one number per repeat of the second arm; the lengths may differ.
      delta: the smallest difference that would matter, in the metric's unit, chosen before the runs.
      alpha: level of the test, which fixes the interval.

    Returns:
      The difference mean(a) - mean(b), its 1 - 2 ``alpha`` interval, and p. The arms are equivalent where p is at most
      ``alpha``, which is where the interval lies within ``delta`` of zero. A larger p does not mean that they differ.

    Raises:
      ValueError: with fewer than three repeats in an arm, one that is not finite, or no spread, or a ``delta`` ≤ 0.

    References:
      Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
      equivalence of average bioavailability, 1987.
    """
    with extra("report"):
        from statsmodels.stats import weightstats

    _fraction("alpha", alpha, below=0.5)
    if not 0 < delta < float("inf"):
        raise ValueError(f"equivalence needs a positive delta in the metric's unit, got {delta}.")
    a, b = _arms("equivalence", a, b)
    if _constant(a) and _constant(b):
        raise ValueError(
            "equivalence found no spread in either arm, and without one there is no test. Report the difference "
            "itself, and check that the seed reaches the runs."
        )
    compared = welch(a, b, confidence=1 - 2 * alpha)
    p = weightstats.ttost_ind(a, b, -delta, delta, usevar="unequal")[0]
    return Margin(*compared[:3], float(p), delta, compared.n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p of each arm: at most alpha of all tables then call any arm different by chance.

    Args:
      p_values: arm → p of its comparison with the baseline on one metric, of every arm that was tested.

    Raises:
      ValueError: if a p is not between 0 and 1.

    References:
      Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    outside = [f"{arm}: {p}" for arm, p in p_values.items() if not 0 <= p <= 1]
    if outside:
        raise ValueError(f"holm needs p-values between 0 and 1, got {', '.join(outside)}.")
    # statsmodels' multipletests would do, but it collects garbage in each call: .1 s in a process that holds figures.
    adjusted, largest = {}, 0.0
    for rank, arm in enumerate(sorted(p_values, key=lambda arm: p_values[arm])):
        largest = max(largest, min((len(p_values) - rank) * p_values[arm], 1.0))
        adjusted[arm] = largest
    return {arm: adjusted[arm] for arm in p_values}


def seeds_needed(sd: float, delta: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """How many seeds each of two arms needs to find a true difference of ``delta``; at least three.

    Args:
      sd: standard deviation of one arm over seeds, in the metric's unit; the root mean square if the arms differ.
        From five seeds it is uncertain: the true one may be .6 to 2.9 times as large (95 % interval).
      delta: the smallest true difference that should not be missed, in the same unit.
      power: probability of finding it.
      alpha: two-sided level of the test; for the first step of :func:`holm` over k arms, alpha / k.

    Raises:
      ValueError: if ``sd`` or ``delta`` is not positive, or ``power`` is not above ``alpha``.

    References:
      Cohen, Statistical power analysis for the behavioral sciences, 1988, chapter 2.
    """
    with extra("report"):
        from statsmodels.stats import power as power_analysis

    _fraction("power", power)
    _fraction("alpha", alpha)
    if not (0 < sd < float("inf") and 0 < delta < float("inf")):
        raise ValueError(f"seeds_needed needs a positive sd and a positive delta, got {sd} and {delta}.")
    if power <= alpha:
        raise ValueError(f"seeds_needed needs a power above alpha, got {power} and {alpha}; write power=0.8.")
    # An analysis of variance of two groups is the two-sided t-test. TTestIndPower loses the far tail to nan, and its
    # solver then returns too few: 26 for a power of .999 at alpha .001 and 1.5 standard deviations, which needs 39.
    test, effect = power_analysis.FTestAnovaPower(), delta / sd / 2
    if test.power(effect, 2 * FEWEST, alpha, k_groups=2) >= power:
        return FEWEST
    return int(np.ceil(test.solve_power(effect, power=power, alpha=alpha, k_groups=2) / 2))


def _arms(test: str, *arms: Values) -> list[np.ndarray]:
    """The repeats of each arm as float64, checked."""
    arrays = [np.asarray(arm, np.float64) for arm in arms]
    shapes, sizes = (" and ".join(str(of(array)) for array in arrays) for of in (np.shape, np.size))
    if any(array.ndim != 1 for array in arrays):
        raise ValueError(f"{test} needs a flat list of one number per repeat, got shape {shapes}.")
    if min(array.size for array in arrays) < FEWEST:
        raise ValueError(f"{test} needs three repeats or more in each arm, got {sizes}; run more seeds.")
    lost = sum(int(np.sum(~np.isfinite(array))) for array in arrays)
    if lost:
        raise ValueError(
            f"{test} needs finite numbers, got {lost} that {'is' if lost == 1 else 'are'} not. A run that diverged is "
            "a result: report how many did in each arm, and compare a metric that every run has, such as accuracy."
        )
    return arrays


def _constant(values: np.ndarray) -> bool:
    """Whether all values are equal, up to rounding."""
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def _flags(correct: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Flags and ids of one student, sorted by id."""
    correct, ids = np.asarray(correct), np.asarray(ids)
    if correct.ndim != 1 or correct.shape != ids.shape or correct.size == 0:
        raise ValueError(
            f"mcnemar needs a flag and an id per example, got shapes {correct.shape} and {ids.shape}."
        )
    if not np.isin(correct, (0, 1)).all():
        raise ValueError(
            "mcnemar needs True or False per example, got other values; write predicted == labels."
        )
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(
            "mcnemar needs each test example once, got an id twice. Test one run of each student, or compare the "
            "accuracies of all runs by welch."
        )
    return correct[order].astype(bool), ids


def _fraction(name: str, value: float, *, below: float = 1) -> None:
    if not 0 < value < below:
        raise ValueError(f"{name} is a fraction between 0 and {below:g}, got {value}; five percent is 0.05.")


def _some(keys: Any) -> str:
    """The first few keys, as text."""
    first = sorted(map(str, keys))
    more = f" and {len(first) - 3} more" if len(first) > 3 else ""
    return (", ".join(first[:3]) or "none") + more
