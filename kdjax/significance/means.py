"""The means of one arm or two over a handful of seeds: intervals, tests, equivalence, and how many seeds to run."""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kdjax.extras import extra

Values = Sequence[float] | np.ndarray
Key = TypeVar("Key", bound=Hashable)

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
    """Difference of two means with its confidence interval, two-sided p, the repeats of each arm, and the test."""

    difference: float
    low: float
    high: float
    p: float
    n: tuple[int, int]
    test: str = "Welch"


class Margin(NamedTuple):
    """Difference of two means with its 1 - 2 alpha interval, and the p of its lying beyond the margin ``delta``.

    ``power`` is how often the test would find so many repeats of so much spread equivalent if their means were equal.
    """

    difference: float
    low: float
    high: float
    p: float
    delta: float
    n: tuple[int, int]
    power: float


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
    a, b = _arms("welch", a, b)
    return _compared(a, b, confidence, paired=False)


def paired(a: Values, b: Values, *, confidence: float = 0.95) -> Comparison:
    """Student's t-test of mean(a) - mean(b) for pairs: repeats that share what else decides their number.

    Args:
      a: one number per repeat of the first arm.
      b: one number per repeat of the second arm, in the same order: equal seeds stand side by side.
      confidence: of the interval around the difference. If no pair differs by more or less than another, it has no
        width, and p is 1 where the means agree and 0 where they do not.

    Raises:
      ValueError: with fewer than three pairs, arms of different lengths, or values that are not finite.

    References:
      Student, The probable error of a mean, 1908.
    """
    a, b = _arms("paired", a, b)
    if len(a) != len(b):
        raise ValueError(f"paired needs as many repeats of each arm, got {len(a)} and {len(b)}.")
    return _compared(a, b, confidence, paired=True)


def compare(a: Mapping[int, float], b: Mapping[int, float], *, confidence: float = 0.95) -> Comparison:
    """Compares two arms by seed: :func:`paired` over the seeds of both, or :func:`welch` if these are fewer than three.

    Runs of equal seed are a pair by design: they share their first weights, where their networks are equal, the order
    of the images, and the teacher. A seed that one arm lacks, such as one that diverged, is left out of the pairs.

    Args:
      a: seed → number of the first arm.
      b: seed → number of the second arm.
      confidence: of the interval around the difference.

    Raises:
      ValueError: with fewer than three repeats in an arm, or values that are not finite.
    """
    shared = [seed for seed in a if seed in b]
    if len(shared) < FEWEST:
        return welch([*a.values()], [*b.values()], confidence=confidence)
    return paired([a[seed] for seed in shared], [b[seed] for seed in shared], confidence=confidence)


def equivalence(a: Values, b: Values, *, delta: float, alpha: float = 0.05, pairs: bool = False) -> Margin:
    """Two one-sided tests (TOST) of whether the means of two arms differ by less than ``delta``.

    Args:
      a: one number per repeat of the first arm.
      b: one number per repeat of the second arm; the lengths may differ.
      delta: the smallest difference that would matter, in the metric's unit, chosen before the runs.
      alpha: level of the test, which fixes the interval.
      pairs: whether repeats are pairs, as in :func:`paired`; else they are independent, as in :func:`welch`.

    Returns:
      The difference mean(a) - mean(b), its 1 - 2 ``alpha`` interval, p, and the power. The arms are equivalent where p
      is at most ``alpha``, which is where the interval lies within ``delta`` of zero. A larger p does not mean that
      they differ; with little power it means nothing.

    Raises:
      ValueError: with fewer than three repeats in an arm, one that is not finite, or no spread, or a ``delta`` ≤ 0.

    References:
      Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
      equivalence of average bioavailability, 1987.
    """
    with extra("report"):
        from scipy import stats

    _fraction("alpha", alpha, below=0.5)
    if not 0 < delta < float("inf"):
        raise ValueError(f"equivalence needs a positive delta in the metric's unit, got {delta}.")
    a, b = _arms("equivalence", a, b)
    spreads = [a - b] if pairs and len(a) == len(b) else [a, b]
    if all(_constant(values, of=a) for values in spreads):
        raise ValueError(
            "equivalence found no spread in either arm, and without one there is no test. Report the difference "
            "itself, and check that the seed reaches the runs."
        )
    compared = (paired if pairs else welch)(a, b, confidence=1 - 2 * alpha)
    error, df = _standard_error(spreads)
    p = stats.t.sf((delta - abs(compared.difference)) / error, df)
    power = 2 * stats.t.cdf(delta / error - stats.t.isf(alpha, df), df) - 1
    return Margin(*compared[:3], float(p), delta, compared.n, max(0.0, float(power)))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's adjusted p of each comparison: at most alpha of all tables then call any arm different by chance.

    Args:
      p_values: what was compared, such as an arm with the baseline → its p, of every comparison that was made.

    Raises:
      ValueError: if a p is not between 0 and 1.

    References:
      Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    outside = [f"{key}: {p}" for key, p in p_values.items() if not 0 <= p <= 1]
    if outside:
        raise ValueError(f"holm needs p-values between 0 and 1, got {', '.join(outside)}.")
    # statsmodels' multipletests would do, but it collects garbage in each call: .1 s in a process that holds figures.
    adjusted, largest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min((len(p_values) - rank) * p_values[key], 1.0))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


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


def _compared(a: np.ndarray, b: np.ndarray, confidence: float, *, paired: bool) -> Comparison:
    """The t-test of checked repeats."""
    _fraction("confidence", confidence)
    n, name = (len(a), len(b)), "paired t" if paired else "Welch"
    difference = float(np.mean(a) - np.mean(b))
    if _constant(a - b, of=a) if paired else np.ptp(a) == 0 and np.ptp(b) == 0:
        return Comparison(difference, difference, difference, float(difference == 0), n, name)
    with extra("report"):
        from scipy import stats

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # one arm may be constant
        test: Any = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    low, high = map(float, test.confidence_interval(confidence))
    return Comparison(difference, low, high, float(test.pvalue), n, name)


def _standard_error(samples: Sequence[np.ndarray]) -> tuple[float, float]:
    """Of the difference of independent means, or of one mean, and its degrees of freedom by Welch."""
    variances = np.array([sample.var(ddof=1) / sample.size for sample in samples])
    df = variances.sum() ** 2 / np.sum(variances**2 / [sample.size - 1 for sample in samples])
    return float(np.sqrt(variances.sum())), float(df)


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


def _constant(values: np.ndarray, *, of: np.ndarray | None = None) -> bool:
    """Whether all values are equal, up to the rounding of the numbers ``of`` which they are differences."""
    return bool(np.ptp(values) <= ROUNDING * np.abs(values if of is None else of).max())


def _fraction(name: str, value: float, *, below: float = 1) -> None:
    if not 0 < value < below:
        raise ValueError(f"{name} is a fraction between 0 and {below:g}, got {value}; five percent is 0.05.")
