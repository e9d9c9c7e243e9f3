"""What may be concluded from a handful of seeds: means with intervals, and whether two arms differ.

The statistics are those of scipy and statsmodels. This module only decides which of them is honest for which data, and
refuses the others.

* :func:`summarise`, :func:`t_interval`, :func:`bootstrap_interval`: one arm.
* :func:`welch`: two arms with seeds of their own. :func:`paired`: two numbers per seed, where that is real.
* :func:`mcnemar`: two students on the same test examples, one run of each.
* :func:`equivalence`, :func:`non_inferiority`: "as good as" and "no worse than", which a large p of Welch is not.
* :func:`holm`: p-values of all arms of a table. :func:`hedges_g`: a difference in standard deviations.
* :func:`seeds_needed`: before the runs, how many would show a difference of a given size.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.extras import extra

Values = Sequence[float] | np.ndarray

FEWEST = 3  # repeats of an arm below which nothing here is said about it
ROUNDING = 1e-12  # of the largest value: a spread below this is that of the arithmetic


class Summary(NamedTuple):
    """Mean, sample standard deviation (n - 1) and number of repeats."""

    mean: float
    sd: float
    n: int


class Interval(NamedTuple):
    """An estimate from n repeats, with its confidence interval."""

    estimate: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """Difference of two means with its confidence interval and two-sided p."""

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
    """How many of n test examples one student alone gets right, and the two-sided p of both being equally accurate.

    ``p`` is exact and never too small; ``mid_p`` is less wasteful, and of the level that it claims in practice.
    """

    only_a: int
    only_b: int
    p: float
    mid_p: float
    n: int


def summarise(values: Values) -> Summary:
    """Mean, standard deviation and n of one arm's repeats; sd is nan for a single one."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"summarise needs a flat list of at least one number, got shape {array.shape}.")
    return Summary(
        float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else float("nan"), array.size
    )


def t_interval(values: Values, *, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean, for repeats that scatter roughly as a normal distribution.

    Args:
      values: one number per repeat.
      confidence: how often such intervals hold the true mean.

    Returns:
      The mean and its interval in the unit of the values. Where they are all equal it has no width; they then say
      nothing of how far the next repeat may be.

    Raises:
      ValueError: with fewer than three values, or one that is not finite.

    References:
      Student, The probable error of a mean, 1908.
    """
    with extra("experiments"):
        from scipy import stats

    _fraction("confidence", confidence)
    (array,) = _arms("t_interval", values)
    mean = float(array.mean())
    if _constant(array, array):
        return Interval(mean, mean, mean, array.size)
    test: Any = stats.ttest_1samp(array, 0)
    low, high = map(float, test.confidence_interval(confidence))
    return Interval(mean, low, high, array.size)


def bootstrap_interval(
    values: Values,
    *,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval, bias-corrected and accelerated, of a statistic whose distribution is not known.

    Meant for many values, such as one per test example. Five seeds hold too little to resample: the 95 % interval of
    their mean holds the true one in 84 % of cases, and that of :func:`t_interval` in 95 %.

    Args:
      values: one number per repeat or example.
      statistic: of an array along the keyword ``axis``, such as ``np.median``; no maximum or minimum, which resamples
        cannot exceed.
      confidence: how often such intervals hold the true value.
      resamples: how many are drawn.
      seed: of the draws; the same one gives the same interval.

    Returns:
      The statistic of the values and its interval. Where the values are all equal it has no width.

    Raises:
      ValueError: with fewer than three values, one that is not finite, or a statistic that resamples do not change.

    References:
      Efron, Better bootstrap confidence intervals, 1987.
    """
    with extra("experiments"):
        from scipy import stats

    _fraction("confidence", confidence)
    (array,) = _arms("bootstrap_interval", values)
    estimate = float(statistic(array, axis=0))
    if _constant(array, array):
        return Interval(estimate, estimate, estimate, array.size)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # refused below, in words
        options = {
            "n_resamples": resamples,
            "confidence_level": confidence,
            "rng": np.random.default_rng(seed),
        }
        found = stats.bootstrap((array,), statistic, method="BCa", vectorized=True, **options)
    low, high = map(float, found.confidence_interval)
    if not low <= high:
        raise ValueError(
            "bootstrap_interval found no interval: the statistic is the same, or not finite, in nearly all resamples; "
            "take more values, or a smoother statistic such as the mean."
        )
    return Interval(estimate, low, high, array.size)


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
      ValueError: with fewer than three repeats in an arm, where the test says nothing, or values that are not finite.

    References:
      Welch, The generalization of Student's problem when several different population variances are involved, 1947.
    """
    _fraction("confidence", confidence)
    a, b = _arms("welch", a, b)
    difference = float(np.mean(a) - np.mean(b))
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return Comparison(difference, difference, difference, float(difference == 0), (len(a), len(b)))
    test = _t_test(a, b, equal_var=False)
    low, high = map(float, test.confidence_interval(confidence))
    return Comparison(difference, low, high, float(test.pvalue), (len(a), len(b)))


def paired(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, confidence: float = 0.95
) -> Comparison:
    """Paired t-test of the mean of a - b, for two numbers of which each pair has something in common.

    A pair is real where its key fixes what moves both numbers: one run before and after quantisation, one fold of the
    data, one split that both arms were trained and tested on. Two networks that merely drew the same seed share
    nothing, and :func:`welch` is the test for them.

    Args:
      a: what makes the pair, such as a seed or fold → value of the first arm.
      b: likewise of the second arm, with the same keys.
      confidence: of the interval around the mean difference.

    Returns:
      The mean difference, its interval and the two-sided p. Where every pair agrees the interval has no width and p
      is 1.

    Raises:
      ValueError: if the keys differ, with fewer than three pairs or values that are not finite, or if the pairs differ
        but all by the same amount.

    References:
      Student, The probable error of a mean, 1908.
    """
    with extra("experiments"):
        from scipy import stats

    _fraction("confidence", confidence)
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        raise ValueError(
            "paired needs two mappings from what makes a pair, such as the seed or fold, to a value, "
            f"got {type(a).__name__} and {type(b).__name__}; for lists of independent runs write welch(a, b)."
        )
    if a.keys() != b.keys():
        raise ValueError(
            f"paired needs the same keys in both arms, got {_some(a.keys() - b.keys())} only in the first and "
            f"{_some(b.keys() - a.keys())} only in the second. Runs without a partner are independent: write "
            "welch(list(a.values()), list(b.values()))."
        )
    first, second = _arms("paired", list(a.values()), [b[key] for key in a])
    n, difference = len(a), float(np.mean(first - second))
    if _constant(first - second, first, second):
        if not _constant(np.array([0, difference]), first, second):
            raise ValueError(
                f"paired found the same difference of {difference:g} in all {n} pairs, and no spread to judge it by. "
                "Say the difference itself, and look whether the seed reaches the runs."
            )
        return Comparison(difference, difference, difference, 1.0, (n, n))
    test: Any = stats.ttest_rel(first, second)
    low, high = map(float, test.confidence_interval(confidence))
    return Comparison(difference, low, high, float(test.pvalue), (n, n))


def mcnemar(correct_a: Any, correct_b: Any, *, ids_a: Any, ids_b: Any) -> McNemar:
    """McNemar's test of two students on the same test examples: is one right more often where they disagree?

    It speaks of these two students and new examples. Whether the method behind one is better than that behind the
    other is a question to several seeds of each: :func:`welch`. Decide for ``p`` or ``mid_p`` before looking at either.

    Args:
      correct_a: one flag per test example, whether the first student is right.
      correct_b: likewise of the second student.
      ids_a: the test example of each flag of ``correct_a``, a number or name of its own.
      ids_b: likewise of ``correct_b``; the same examples, in any order.

    Returns:
      How often each student alone is right, the exact p, which is binomial, and the mid-p, which counts half the
      probability of what was seen. Both are 1 where the students never disagree.

    Raises:
      ValueError: if the students were tested on different examples, one is listed twice, or a flag is not True or
        False.

    References:
      McNemar, Note on the sampling error of the difference between correlated proportions or percentages, 1947.
      Fagerland, Lydersen and Laake, The McNemar test for binary matched-pairs data: mid-p and asymptotic are better
      than exact conditional, 2013, for the mid-p.
    """
    with extra("experiments"):
        from scipy import stats
        from statsmodels.stats import contingency_tables

    (a, ids_a), (b, ids_b) = _flags(correct_a, ids_a), _flags(correct_b, ids_b)
    if not np.array_equal(ids_a, ids_b):
        first, second = set(ids_a.tolist()), set(ids_b.tolist())
        raise ValueError(
            f"mcnemar needs both students on the same test examples, got {_some(first - second)} only for the first "
            f"and {_some(second - first)} only for the second. Test both on one split; accuracies of several seeds on "
            "splits of their own are compared by welch."
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
    """Two one-sided Welch tests: do the means of independent repeats lie within ``delta`` of each other?

    Args:
      a: one number per repeat of the first arm.
      b: likewise of the second arm; the lengths may differ.
      delta: the largest difference that would not matter, in the metric's unit, chosen before the runs.
      alpha: the level of the test, which fixes the interval.

    Returns:
      The difference mean(a) - mean(b), its 1 - 2 ``alpha`` interval, and p. The arms are equivalent where p is at most
      ``alpha``, which is where the interval lies within ``delta`` of zero. A larger p says that these runs do not
      show it, not that the arms differ.

    Raises:
      ValueError: as :func:`welch`; where neither arm varies; and if ``delta`` is not positive.

    References:
      Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
      equivalence of average bioavailability, 1987.
    """
    with extra("experiments"):
        from statsmodels.stats import weightstats

    a, b, compared = _against_margin("equivalence", a, b, delta, alpha)
    p = weightstats.ttost_ind(a, b, -delta, delta, usevar="unequal")[0]
    return Margin(*compared[:3], float(p), delta, compared.n)


def non_inferiority(
    a: Values, b: Values, *, delta: float, higher_is_better: bool, alpha: float = 0.05
) -> Margin:
    """One-sided Welch test of a being no worse than b by ``delta`` or more; it may be better by any amount.

    Args:
      a: one number per repeat of the arm that is to be no worse.
      b: likewise of the arm that it is compared with; the lengths may differ.
      delta: the smallest loss that would matter, in the metric's unit, chosen before the runs.
      higher_is_better: True for accuracy, False for a loss or a latency.
      alpha: the level of the test, which fixes the interval.

    Returns:
      The difference mean(a) - mean(b), its 1 - 2 ``alpha`` interval, and p. Arm a is no worse where p is at most
      ``alpha``, which is where the interval's low end is above -``delta``, or, where lower is better, its high end
      below ``delta``.

    Raises:
      ValueError: as :func:`equivalence`.

    References:
      Schuirmann 1987, one of the two one-sided tests.
    """
    a, b, compared = _against_margin("non_inferiority", a, b, delta, alpha)
    shifted, alternative = (a + delta, "greater") if higher_is_better else (a - delta, "less")
    test = _t_test(shifted, b, equal_var=False, alternative=alternative)
    return Margin(*compared[:3], float(test.pvalue), delta, compared.n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p of each arm, so that no arm is called different by chance in more than alpha of all tables.

    Args:
      p_values: arm → p of its comparison with the baseline on one metric. All that were tested belong in it, those
        that found nothing too.

    Returns:
      Arm → adjusted p, in the same order, to be compared with alpha as it is.

    Raises:
      ValueError: if a p is not between 0 and 1.

    References:
      Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    outside = [f"{arm}: {p}" for arm, p in p_values.items() if not 0 <= p <= 1]
    if outside:
        raise ValueError(f"holm needs p-values between 0 and 1, got {', '.join(outside)}.")
    # Not statsmodels' multipletests, which collects garbage in each call: .1 s of a process that holds figures.
    adjusted, largest = {}, 0.0
    for rank, arm in enumerate(sorted(p_values, key=lambda arm: p_values[arm])):
        largest = max(largest, min((len(p_values) - rank) * p_values[arm], 1.0))
        adjusted[arm] = largest
    return {arm: adjusted[arm] for arm in p_values}


def hedges_g(a: Values, b: Values, *, confidence: float = 0.95) -> Interval:
    """Hedges' g: mean(a) - mean(b) in pooled standard deviations, corrected for the bias of few repeats.

    It is Cohen's d times 1 - 3 / (4n - 9) for n repeats in all. The standard deviation is that between seeds, so a
    large g says that seeds hide the difference poorly, not that it matters to anyone.

    Args:
      a: one number per repeat of the first arm.
      b: likewise of the second arm; the lengths may differ.
      confidence: of the interval, which is exact for normal repeats of equal variance.

    Returns:
      g, the interval of the difference that it estimates, by the noncentral t distribution, and n of both arms.

    Raises:
      ValueError: as :func:`welch`, and where neither arm varies.

    References:
      Hedges, Distribution theory for Glass's estimator of effect size and related estimators, 1981.
      Steiger and Fouladi, Noncentrality interval estimation and the evaluation of statistical models, 1997.
    """
    with extra("experiments"):
        from scipy import special
        from statsmodels.stats import meta_analysis

    _fraction("confidence", confidence)
    a, b = _arms("hedges_g", a, b)
    _need_spread("hedges_g", a, b)
    n, tail = a.size + b.size, (1 - confidence) / 2
    g, _ = meta_analysis.effectsize_smd(*summarise(a), *summarise(b))
    test = _t_test(a, b, equal_var=True)
    ends = special.nctdtrinc(n - 2, np.array([1 - tail, tail]), test.statistic)
    low, high = ends * np.sqrt(1 / a.size + 1 / b.size)  # from t to standard deviations
    return Interval(float(g), float(low), float(high), n)


def seeds_needed(sd: float, delta: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """How many seeds each of two arms needs for a true difference of ``delta`` to be found.

    Args:
      sd: of one arm over seeds, in the metric's unit; of two unlike arms the root mean square. That of five seeds is
        vague: the true one may be .6 to 2.9 times as large (95 % interval), and the seeds needed go with its square.
      delta: the smallest true difference that should not be missed, in the same unit.
      power: how often it should then be found.
      alpha: the two-sided level of the test; for the first step of :func:`holm` over k arms, alpha / k.

    Returns:
      Seeds per arm, rounded up, three at least.

    Raises:
      ValueError: if ``sd`` or ``delta`` is not positive, or ``power`` is not above ``alpha``.

    References:
      Cohen, Statistical power analysis for the behavioral sciences, 1988, chapter 2.
    """
    with extra("experiments"):
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
    """The repeats of each arm as float64, or a refusal."""
    arrays = [np.asarray(arm, np.float64) for arm in arms]
    if any(array.ndim != 1 for array in arrays):
        shapes = " and ".join(str(array.shape) for array in arrays)
        raise ValueError(f"{test} needs a flat list of one number per repeat, got shape {shapes}.")
    if min(array.size for array in arrays) < FEWEST:
        sizes = " and ".join(str(array.size) for array in arrays)
        raise ValueError(f"{test} needs three repeats or more in each arm, got {sizes}; run more seeds.")
    lost = sum(int(np.sum(~np.isfinite(array))) for array in arrays)
    if lost:
        raise ValueError(
            f"{test} needs finite numbers, got {lost} that {'is' if lost == 1 else 'are'} not. A run that diverged is "
            "a result: say how many did in each arm, and compare a metric that every run has, such as accuracy."
        )
    return arrays


def _t_test(a: np.ndarray, b: np.ndarray, **options: Any) -> Any:
    """Runs scipy's t-test of two samples without its warning that one is constant, which is no fault."""
    with extra("experiments"):
        from scipy import stats

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        return stats.ttest_ind(a, b, **options)


def _constant(differences: np.ndarray, *values: np.ndarray) -> bool:
    """Whether differences of such values are all one, but for the rounding of the subtraction."""
    return bool(np.ptp(differences) <= ROUNDING * max(np.abs(value).max() for value in values))


def _need_spread(test: str, a: np.ndarray, b: np.ndarray) -> None:
    if _constant(a, a) and _constant(b, b):
        raise ValueError(
            f"{test} found no spread in either arm, and judges a difference by the spread. Say the difference itself, "
            "and look whether the seed reaches the runs."
        )


def _against_margin(
    test: str, a: Values, b: Values, delta: float, alpha: float
) -> tuple[np.ndarray, np.ndarray, Comparison]:
    """What the tests against a margin share: checks, and the interval that agrees with them."""
    _fraction("alpha", alpha, below=0.5)
    if not 0 < delta < float("inf"):
        raise ValueError(f"{test} needs a positive delta in the metric's unit, got {delta}.")
    first, second = _arms(test, a, b)
    _need_spread(test, first, second)
    return first, second, welch(first, second, confidence=1 - 2 * alpha)


def _flags(correct: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Flags and ids of one student in the order of the ids."""
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
            "mcnemar needs each test example once, got an id twice. Several runs make no new examples: test one run of "
            "each student, or compare the accuracies of all by welch."
        )
    return correct[order].astype(bool), ids


def _fraction(name: str, value: float, *, below: float = 1) -> None:
    if not 0 < value < below:
        raise ValueError(f"{name} is a fraction between 0 and {below:g}, got {value}; five percent is 0.05.")


def _some(keys: Any) -> str:
    """The first few keys, in words."""
    shown = sorted(map(str, keys))
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return (", ".join(shown[:3]) or "none") + more
