"""Accuracies as means over test examples: of two students, and of several seeds of two arms.

An accuracy over seeds has two sources of chance: which seeds were run, and which examples the test split holds. The
standard deviation over seeds shows the first alone.
"""

from typing import Any, NamedTuple

import numpy as np

from kdjax.extras import extra
from kdjax.significance.means import Comparison, Interval


class McNemar(NamedTuple):
    """On how many of n test examples only one student is right, and the two-sided p of equal accuracy.

    ``p`` is exact and conservative. ``mid_p`` has more power, and in practice it keeps its level too.
    """

    only_a: int
    only_b: int
    p: float
    mid_p: float
    n: int


def mcnemar(correct_a: Any, correct_b: Any, *, ids_a: Any, ids_b: Any) -> McNemar:
    """McNemar's test of two students on the same test examples, by the examples on which only one is right.

    It compares these two trained students. To compare two methods, train several seeds of each and use
    :func:`compare_accuracies`. Choose ``p`` or ``mid_p`` before looking at either.

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
            "different splits are compared by compare."
        )
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    if only_a == only_b == 0:
        return McNemar(0, 0, 1.0, 1.0, a.size)
    table = [[int(np.sum(a & b)), only_a], [only_b, int(np.sum(~a & ~b))]]
    test: Any = contingency_tables.mcnemar(table, exact=True)
    exact, point = float(test.pvalue), float(stats.binom.pmf(only_a, only_a + only_b, 0.5))
    mid = 1 - point / 2 if only_a == only_b else exact - point
    return McNemar(only_a, only_b, exact, mid, a.size)


def accuracy_interval(correct: Any, *, confidence: float = 0.95) -> Interval:
    """The accuracy of an arm with an interval for other seeds and other test examples.

    Args:
      correct: whether the student of a seed is right on an example, bool[seeds, examples]. With a single seed the
        interval is for other examples alone, and says nothing of other trainings.
      confidence: of the interval.

    Raises:
      ValueError: if ``correct`` is not a table of at least one seed and two examples.
    """
    estimate, error, df = _crossed([_table("accuracy_interval", correct)])
    low, high = _limits(estimate, error, df, confidence)
    return Interval(estimate, low, high, len(correct))


def compare_accuracies(a: Any, b: Any, *, pairs: bool = True, confidence: float = 0.95) -> Comparison:
    """Tests accuracy(a) - accuracy(b) for other seeds *and* other test examples.

    A difference is modelled as the sum of random effects of the seed, of the example and of both together. Their mean
    squares give its variance (the analysis of variance of two crossed factors, as for readers by cases in radiology),
    and Satterthwaite's rule its degrees of freedom.

    Args:
      a: whether the first arm's student of a seed is right on an example, bool[seeds, examples].
      b: the same for the second arm, on the same examples in the same order.
      pairs: whether row i of both is one seed, as in :func:`kdjax.significance.paired`.
      confidence: of the interval around the difference. If nothing differs, it has no width.

    Raises:
      ValueError: if the tables have other examples, or other numbers of seeds though they are ``pairs``.

    References:
      Satterthwaite, An approximate distribution of estimates of variance components, 1946.
      Gallas, Bandos, Samuelson and Wagner, A framework for random-effects ROC analysis, 2009, for the crossed design.
    """
    a, b = (_table("compare_accuracies", correct) for correct in (a, b))
    if a.shape[1] != b.shape[1] or (pairs and len(a) != len(b)):
        raise ValueError(
            f"compare_accuracies needs both arms on the same test examples{' and seeds' * pairs}, got {a.shape[1]} and "
            f"{b.shape[1]} examples of {len(a)} and {len(b)} seeds."
        )
    with extra("report"):
        from scipy import stats

    difference, error, df = _crossed([a - b] if pairs else [a, -b])
    n, name = (len(a), len(b)), "seeds and test examples"
    if error == 0:
        return Comparison(difference, difference, difference, float(difference == 0), n, name)
    low, high = _limits(difference, error, df, confidence)
    return Comparison(difference, low, high, float(2 * stats.t.sf(abs(difference) / error, df)), n, name)


def _crossed(arms: list[np.ndarray]) -> tuple[float, float, float]:
    """The sum of the means of tables of independent rows and common columns, its standard error and degrees of freedom.

    The variance between the means of columns holds that of the cells once, and so does the one between rows.
    """
    columns = np.sum([arm.mean(0) for arm in arms], axis=0)
    parts = [(columns.var(ddof=1) / columns.size, columns.size - 1)]
    for arm in arms:
        n, m = arm.shape
        if n == 1:
            continue
        rows = arm.mean(1)
        cells = np.sum((arm - rows[:, None] - arm.mean(0) + arm.mean()) ** 2) / ((n - 1) * (m - 1)) / (n * m)
        between = rows.var(ddof=1) / n
        if between > cells:  # else it is all that of the examples, by chance or in truth
            parts += [(between, n - 1), (-cells, (n - 1) * (m - 1))]
    variances, freedoms = (np.array(values, np.float64) for values in zip(*parts, strict=True))
    variance = max(variances.sum(), 0.0)
    df = variance**2 / max(np.sum(variances**2 / freedoms), np.finfo(float).tiny)
    return float(columns.mean()), float(np.sqrt(variance)), float(max(df, 1.0))


def _limits(estimate: float, error: float, df: float, confidence: float) -> tuple[float, float]:
    with extra("report"):
        from scipy import stats

    half = stats.t.isf((1 - confidence) / 2, df) * error
    return float(estimate - half), float(estimate + half)


def _table(test: str, correct: Any) -> np.ndarray:
    """Answers as zeros and ones, checked."""
    table = np.asarray(correct)
    if table.ndim != 2 or len(table) < 1 or table.shape[1] < 2 or not np.isin(table, (0, 1)).all():
        raise ValueError(
            f"{test} needs True or False of each seed and test example, as [seeds, examples], got {table.dtype} of "
            f"shape {table.shape}."
        )
    return table.astype(np.float64)


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
            "mcnemar needs each test example once, got an id twice. Test one run of each student, or compare all "
            "runs by compare_accuracies."
        )
    return correct[order].astype(bool), ids


def _some(keys: Any) -> str:
    """The first few keys, as text."""
    first = sorted(map(str, keys))
    more = f" and {len(first) - 3} more" if len(first) > 3 else ""
    return (", ".join(first[:3]) or "none") + more
