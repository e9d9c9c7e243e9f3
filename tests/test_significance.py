"""Statistics against published examples, against scipy and statsmodels, and against their own claims by simulation."""

import gc
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression import mixed_linear_model
from statsmodels.stats import multitest, weightstats

from kdjax import significance

TABLES = 2000

# Hours of sleep gained by ten patients with each of two drugs: Student 1908, R's data set `sleep`.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def monte_carlo(rate: float, n: int = TABLES) -> float:
    """Three standard errors of a simulated rate."""
    return 3 * (rate * (1 - rate) / n) ** 0.5


def flags(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Flags of two students that agree and differ so often."""
    counts = [both, only_a, only_b, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.fixture
def quick_gc() -> Iterator[None]:
    """Hides from statsmodels, which collects garbage in every Holm correction, the many objects of JAX."""
    gc.freeze()
    yield
    gc.unfreeze()


# One arm.


def test_summary_uses_the_sample_deviation():
    assert significance.summarise([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(1.5275252), 3)
    assert np.isnan(significance.summarise([1.0]).sd)
    with pytest.raises(ValueError, match="at least one"):
        significance.summarise([])


def test_t_interval_on_a_published_example():
    # R, t.test(extra ~ 1, sleep): mean 1.54, 95 percent interval 0.5955845 to 2.4844155.
    found = significance.t_interval(FIRST + SECOND)
    assert found == (pytest.approx(1.54), pytest.approx(0.5955845), pytest.approx(2.4844155), 20)


@pytest.mark.once
def test_t_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(3, 2, (500, 5))
    found = [significance.t_interval(draw) for draw in draws]
    inside = np.mean([f.low <= 3 <= f.high for f in found])
    assert abs(inside - 0.95) <= monte_carlo(0.95, 500)


def test_an_arm_that_never_varies_has_an_interval_without_width():
    assert significance.t_interval([2.0, 2.0, 2.0]) == (2, 2, 2, 3)


# Two arms.


def test_welch_on_a_published_example():
    # R, t.test(extra ~ group, sleep): t = -1.8608, df = 17.776, p = .07939, interval -3.365 to 0.205.
    found = significance.welch(FIRST, SECOND)
    assert found.difference == pytest.approx(-1.58)
    assert found.p == pytest.approx(0.07939, abs=1e-5)
    assert (found.low, found.high) == (
        pytest.approx(-3.3654832, abs=1e-6),
        pytest.approx(0.2054832, abs=1e-6),
    )
    assert found.n == (10, 10)


@pytest.mark.once
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


def test_pairs_on_a_published_example():
    # Student 1908, R's t.test(extra ~ group, sleep, paired = TRUE): t = -4.0621, df = 9, p = .002833, interval
    # -2.4598858 to -0.7001142. The ten patients are pairs, which Welch's test does not see.
    found = significance.paired(FIRST, SECOND)
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert (found.low, found.high) == (
        pytest.approx(-2.4598858, abs=1e-6),
        pytest.approx(-0.7001142, abs=1e-6),
    )
    assert (found.n, found.test) == ((10, 10), "paired t")


def test_arms_are_compared_by_seed():
    first, second = dict(enumerate(FIRST)), dict(reversed([*enumerate(SECOND)]))
    assert significance.compare(first, second) == significance.paired(FIRST, SECOND)
    others = {seed + 8: value for seed, value in second.items()}  # two seeds in common
    assert significance.compare(first, others) == significance.welch(FIRST, SECOND[::-1])
    del second[4]  # it diverged
    without = [values[:4] + values[5:] for values in (FIRST, SECOND)]
    assert significance.compare(first, second) == significance.paired(*without)


def test_pairs_that_all_differ_alike():
    assert significance.paired([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]).p == 1
    # Rounding makes differences of equal size differ by 1e-17.
    found = significance.paired([0.1 + 0.2, 0.2 + 0.2, 0.3 + 0.2], [0.1, 0.2, 0.3])
    assert (found.low, found.high, found.p) == (pytest.approx(0.2), pytest.approx(0.2), 0)
    with pytest.raises(ValueError, match="as many repeats of each arm, got 3 and 4"):
        significance.paired([1, 2, 3], [1, 2, 3, 4])


# Test examples.


def draws(rng, shape, *, seeds=0.0, examples=0.0, both=0.0, accuracy=0.8):
    """Answers of one arm: 0 or 1, with chance by seed, by example and by both, in units of a normal score."""
    n, m = shape
    effects = (
        seeds * rng.normal(size=(n, 1)) + examples * rng.normal(size=(1, m)) + both * rng.normal(size=shape)
    )
    return effects < stats.norm.ppf(accuracy) * np.sqrt(seeds**2 + examples**2 + both**2)


def test_accuracies_by_seed_and_example_are_those_of_a_mixed_model():
    found = draws(np.random.default_rng(0), (6, 40), seeds=1.2, examples=1.2, both=0.7, accuracy=0.6)
    n, m = found.shape
    frame = pd.DataFrame(
        {"y": found.ravel() * 1.0, "s": np.repeat(range(n), m), "e": np.tile(range(m), n), "one": 1}
    )
    parts = {"s": "0 + C(s)", "e": "0 + C(e)"}
    fitted = mixed_linear_model.MixedLM.from_formula("y ~ 1", frame, groups="one", vc_formula=parts).fit()
    assert (fitted.vcomp > 0).all()  # where the analysis of variance and REML agree
    interval = significance.accuracy_interval(found)
    (error,) = fitted.bse_fe
    df = significance.examples._crossed([found * 1.0])[2]
    assert interval.estimate == pytest.approx(found.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(stats.t.isf(0.025, df) * error, rel=2e-3)


def test_one_seed_has_the_interval_of_its_examples():
    found = draws(np.random.default_rng(1), (1, 50), both=1.0)
    mean = stats.ttest_1samp(found[0] * 1.0, 0)
    low, high = mean.confidence_interval(0.95)
    assert significance.accuracy_interval(found) == (found.mean(), pytest.approx(low), pytest.approx(high), 1)


def test_examples_that_all_students_answer_alike_leave_the_seeds():
    # Every example is answered by all or none of the seeds' students, so only examples differ, and in pairs nothing.
    same = np.repeat(draws(np.random.default_rng(2), (1, 30), both=1.0), 4, axis=0)
    assert significance.compare_accuracies(same, same)[:4] == (0, 0, 0, 1)
    alone, one = significance.accuracy_interval(same), significance.accuracy_interval(same[:1])
    assert alone[:3] == pytest.approx(one[:3])


@pytest.mark.once
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(("seeds", "examples"), [(0.3, 0.8), (0.05, 0.8), (0.4, 0.1)])
def test_intervals_by_seed_and_example_cover_the_difference(pairs, seeds, examples):
    rng, inside, alone = np.random.default_rng(3), 0, 0
    for _ in range(600):
        shared = rng.normal(size=200)  # how hard an example is for both arms
        a, b = (
            0.9 + examples * shared + 0.5 * rng.normal(size=200) + seeds * rng.normal(size=(5, 1))
            > rng.normal(size=(5, 200))
            for _ in range(2)
        )
        found = significance.compare_accuracies(a, b, pairs=pairs)
        inside += found.low <= 0 <= found.high
        seed_by_seed = a.mean(1) - b.mean(1)
        half = stats.t.isf(0.025, 4) * seed_by_seed.std(ddof=1) / 5**0.5
        alone += abs(seed_by_seed.mean()) <= half
    assert inside / 600 >= 0.95 - monte_carlo(0.95, 600)
    # Where seeds hardly differ, their spread holds less than the chance of the examples.
    assert inside > alone + 6 or seeds > 0.1


def test_accuracies_refuse_other_examples_and_what_is_no_answer():
    ok = np.zeros((3, 10), bool)
    with pytest.raises(
        ValueError, match="same test examples and seeds, got 10 and 9 examples of 3 and 3 seeds"
    ):
        significance.compare_accuracies(ok, ok[:, :9])
    with pytest.raises(ValueError, match="same test examples, got 10 and 9"):
        significance.compare_accuracies(ok, ok[:2, :9], pairs=False)
    significance.compare_accuracies(ok, ok[:2], pairs=False)
    for wrong in (np.zeros(10), np.full((3, 10), 0.5), np.zeros((3, 1))):
        with pytest.raises(
            ValueError, match=r"True or False of each seed and test example, as \[seeds, examples\]"
        ):
            significance.accuracy_interval(wrong)


# Times to a target.


def test_median_time_on_a_published_example():
    # Freireich et al. 1963, weeks of remission with 6-mercaptopurine and with placebo: medians 23 and 8 (R, survfit).
    weeks = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    ended = [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert significance.median_time(weeks, ended) == (23, 9, 21)
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    assert significance.median_time(placebo, [1] * 21) == (8, 21, 21)


def test_median_of_runs_of_which_most_never_got_there():
    assert significance.median_time([10, 90, 90], [1, 0, 0]) == (np.inf, 1, 3)
    assert significance.median_time([90, 90, 90], [0, 0, 0]) == (np.inf, 0, 3)
    assert significance.median_time([10, 20, 90], [1, 1, 0]) == (20, 2, 3)


def test_runs_that_never_got_there_are_later_than_all_that_did():
    sooner, later = [10, 20, 30, 40], [25, 90, 90, 90]
    found = significance.sooner(sooner, [1] * 4, later, [1, 0, 0, 0])
    # Of 16 pairs the first arm is sooner in 14, later in 2.
    assert found == (14 / 16, pytest.approx(stats.mannwhitneyu(sooner, [25, 91, 91, 91]).pvalue), (4, 4))
    # How long the others would have needed does not matter, and the mean would say otherwise.
    assert significance.sooner(sooner, [1] * 4, [25, 5, 5, 5], [1, 0, 0, 0]) == found
    turned = significance.sooner(later, [1, 0, 0, 0], sooner, [1] * 4)
    assert (turned.probability, turned.p) == (2 / 16, pytest.approx(found.p))
    assert significance.sooner([9, 9, 9], [0, 0, 0], [9, 9, 9], [0, 0, 0])[:2] == (0.5, 1)


def test_times_need_a_flag_each():
    with pytest.raises(ValueError, match=r"a time and a flag, 0 or 1, per run, got shapes \(3,\) and \(2,\)"):
        significance.median_time([1, 2, 3], [1, 0])
    with pytest.raises(ValueError, match="a flag, 0 or 1"):
        significance.sooner([1, 2, 3], [1, 0, 2], [1, 2, 3], [1, 1, 1])
    with pytest.raises(ValueError, match="three runs or more"):
        significance.sooner([1, 2], [1, 0], [1, 2, 3], [1, 1, 1])


# One student against another.


def test_mcnemar_on_published_examples():
    # Airway hyper-responsiveness before and after a transplant: Fagerland, Lydersen and Laake 2013, table 1, whose
    # equations 1 and 2 give 2 (1 + 8) / 2⁸ and 8 / 2⁸ less.
    a, b = flags(1, 1, 7, 12)
    found = significance.mcnemar(a, b, ids_a=range(21), ids_b=range(21))
    assert found == (1, 7, pytest.approx(18 / 256), pytest.approx(10 / 256), 21)
    # Approval of a prime minister in two surveys: Agresti, Categorical data analysis, 2002, table 10.1.
    a, b = flags(794, 150, 86, 570)
    found = significance.mcnemar(a, b, ids_a=range(1600), ids_b=range(1600))
    assert found[:2] == (150, 86)
    assert found.p == pytest.approx(stats.binomtest(86, 236).pvalue, rel=1e-9)


def test_mcnemar_where_the_students_are_level():
    a, b = flags(5, 2, 2, 1)
    # Fagerland et al.: 1 less half the probability of two heads in four throws of a coin.
    assert significance.mcnemar(a, b, ids_a=range(10), ids_b=range(10)) == (2, 2, 1, 1 - 6 / 16 / 2, 10)
    assert significance.mcnemar(a, a, ids_a=range(10), ids_b=range(10)) == (0, 0, 1, 1, 10)


def test_mcnemar_finds_partners_by_id():
    a, b = flags(40, 9, 3, 8)
    ids = np.array([f"image {i}" for i in range(60)])
    order = np.random.default_rng(0).permutation(60)
    direct = significance.mcnemar(a, b, ids_a=ids, ids_b=ids)
    assert significance.mcnemar(a, b[order], ids_a=ids, ids_b=ids[order]) == direct


def test_mcnemar_refuses_what_is_no_pair():
    a, b = flags(3, 1, 1, 1)
    with pytest.raises(
        ValueError, match=r"5 only for the first and 6 only for the second.*Test both on one split"
    ):
        significance.mcnemar(a, b, ids_a=range(6), ids_b=[0, 1, 2, 3, 4, 6])
    with pytest.raises(ValueError, match="3, 4, 5 only for the first and none only for the second"):
        significance.mcnemar(a, b[:3], ids_a=range(6), ids_b=range(3))
    with pytest.raises(ValueError, match="an id twice"):
        significance.mcnemar(a, b, ids_a=[0, 0, 1, 2, 3, 4], ids_b=[0, 0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"shapes \(6,\) and \(5,\)"):
        significance.mcnemar(a, b, ids_a=range(5), ids_b=range(6))
    with pytest.raises(ValueError, match="predicted == labels"):
        significance.mcnemar(0.9 * a, b, ids_a=range(6), ids_b=range(6))


@pytest.mark.once
def test_mid_p_is_of_its_level_and_exact_p_below():
    rng, ids, found = np.random.default_rng(3), np.arange(100), []
    for _ in range(TABLES):
        # Students of equal accuracy that disagree on three images in ten.
        counts = rng.multinomial(100, [0.6, 0.15, 0.15, 0.1])
        found.append(significance.mcnemar(*flags(*counts), ids_a=ids, ids_b=ids))
    mid, exact = np.mean([f.mid_p <= 0.05 for f in found]), np.mean([f.p <= 0.05 for f in found])
    assert abs(mid - 0.05) <= 0.01
    assert exact < mid
    assert exact <= 0.05


# As good as, no worse than.


def test_equivalence_on_a_published_example():
    # TOSTER's introduction takes bounds of ±0.5 for the sleep data and finds t = -1.272, df = 17.78, p = .89, against
    # the lower, and -2.45, p = .012, against the upper; 90 % interval -3.0534 to -0.1066.
    found = significance.equivalence(FIRST, SECOND, delta=0.5)
    assert found.p == pytest.approx(stats.t.sf(-1.272, 17.776), abs=1e-4)
    assert (found.low, found.high) == (pytest.approx(-3.0534, abs=1e-4), pytest.approx(-0.1066, abs=1e-4))
    assert (found.difference, found.delta, found.n) == (pytest.approx(-1.58), 0.5, (10, 10))


def test_p_of_equivalence_agrees_with_its_interval():
    rng, seen = np.random.default_rng(5), set()
    for _ in range(200):
        found = significance.equivalence(*rng.normal(0, 1, (2, 5)), delta=1.2, alpha=0.1)
        assert (found.p <= 0.1) == (found.low >= -1.2 and found.high <= 1.2)
        seen.add(found.p <= 0.1)
    assert seen == {True, False}


@pytest.mark.parametrize("pairs", [True, False])
def test_equivalence_is_that_of_statsmodels(pairs):
    rng = np.random.default_rng(7)
    a, b = rng.normal(0, 1, (2, 8)) + 3 * rng.normal(0, 1, 8) * pairs
    found = significance.equivalence(a, b, delta=1.1, pairs=pairs)
    theirs = (
        weightstats.ttost_paired(a, b, -1.1, 1.1)
        if pairs
        else weightstats.ttost_ind(a, b, -1.1, 1.1, usevar="unequal")
    )
    assert found.p == pytest.approx(theirs[0], rel=1e-9)


@pytest.mark.once
def test_power_of_equivalence_is_how_often_equal_arms_are_called_so():
    rng, found = np.random.default_rng(9), []
    for _ in range(500):
        found.append(significance.equivalence(*rng.normal(0, 1, (2, 10)), delta=1.5))
    assert abs(np.mean([f.p <= 0.05 for f in found]) - np.mean([f.power for f in found])) < 0.05
    assert significance.equivalence([1, 2, 3], [1, 2, 4], delta=0.1).power == 0


@pytest.mark.once
def test_at_the_margin_one_table_in_twenty_is_called_equivalent():
    draws = np.random.default_rng(6).normal(0, 1, (500, 2, 5))
    p = np.array([significance.equivalence(a + 6, b, delta=6).p for a, b in draws])
    assert abs(np.mean(p <= 0.05) - 0.05) <= monte_carlo(0.05, 500)


def test_margins_are_positive():
    for delta in (0, -0.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive delta in the metric's unit"):
            significance.equivalence(FIRST, SECOND, delta=delta)


# Many arms.


def test_holm_on_published_examples():
    # The example of pingouin's documentation of `multicomp`, method "holm".
    found = significance.holm({"a": 0.5, "b": 0.003, "c": 0.32, "d": 0.054, "e": 0.0003})
    assert found == pytest.approx({"a": 0.64, "b": 0.012, "c": 0.64, "d": 0.162, "e": 0.0015})
    assert list(found) == ["a", "b", "c", "d", "e"]
    # Fifteen end points of a trial: Benjamini and Hochberg 1995, section 4, where procedures of this kind reject three.
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.324,
        0.4262,
        0.5719,
        0.6528,
        0.759,
        1,
    ]
    adjusted = significance.holm({str(i): value for i, value in enumerate(p)})
    assert [i for i, value in adjusted.items() if value <= 0.05] == ["0", "1", "2"]


@pytest.mark.usefixtures("quick_gc")
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_holm_is_that_of_statsmodels(n):
    p = np.random.default_rng(n).uniform(0, 0.4, n).round(1)  # some are equal, some grow beyond 1
    adjusted = significance.holm({str(i): value for i, value in enumerate(p)})
    np.testing.assert_allclose([*adjusted.values()], multitest.multipletests(p, method="holm")[1], atol=1e-12)


def test_holm_of_no_arms_and_of_what_is_no_p():
    assert significance.holm({}) == {}
    assert significance.holm({"kd": 0.04}) == {"kd": 0.04}
    with pytest.raises(ValueError, match=r"between 0 and 1, got kd: 1\.5, fitnet: nan"):
        significance.holm({"scratch": 0.5, "kd": 1.5, "fitnet": float("nan")})


@pytest.mark.parametrize("real", [0, 2, 4])
@pytest.mark.once
def test_holm_errs_in_no_more_than_one_table_of_twenty(real):
    # Five arms against one baseline, of which the first few really differ.
    rng = np.random.default_rng(8)
    arms = rng.normal(0, 1, (TABLES, 5, 5)) + 4 * (np.arange(5) < real)[:, None]
    baseline = rng.normal(0, 1, (TABLES, 1, 5))
    p = np.asarray(stats.ttest_ind(arms, baseline, axis=-1, equal_var=False).pvalue)
    assert p[0, 0] == pytest.approx(significance.welch(arms[0, 0], baseline[0, 0]).p)
    adjusted = np.array([[*significance.holm(dict(zip("abcde", row, strict=True))).values()] for row in p])
    limit = 0.05 + monte_carlo(0.05)
    assert np.mean((adjusted[:, real:] <= 0.05).any(1)) <= limit
    assert np.mean((p[:, real:] <= 0.05).any(1)) > limit or real == 4  # what it is for
    assert real == 0 or np.mean(adjusted[:, :real] <= 0.05) > 0.8


# Sizes.


def test_seeds_needed_on_published_examples():
    # Cohen 1988, table 2.4.1, two-sided .05, power .80: 64, 26 and 17 for d of .5, .8 and 1.
    assert [significance.seeds_needed(1, d) for d in (0.5, 0.8, 1.0)] == [64, 26, 17]
    # R's documentation, power.t.test(power = .90, delta = 1): n = 22.02110.
    assert significance.seeds_needed(1, 1, power=0.9) == 23
    # The unit does not matter, and three is the least that any test here accepts.
    assert significance.seeds_needed(0.004, 0.002) == 64
    assert significance.seeds_needed(0.001, 0.05) == 3


def test_seeds_needed_are_the_fewest():
    def power_of(n: int) -> float:
        return float(stats.ncf.sf(stats.f.isf(alpha, 1, 2 * n - 2), 1, 2 * n - 2, n * delta**2 / 2))

    for delta in (0.01, 0.1, 1.0, 2.5, 4.0):  # of an sd of one
        for power, alpha in ((0.8, 0.05), (0.9, 0.01), (0.99, 0.001)):
            n = significance.seeds_needed(1, delta, power=power, alpha=alpha)
            assert power_of(n) >= power > power_of(n - 1)


@pytest.mark.once
def test_so_many_seeds_find_the_difference_as_often_as_asked():
    n, rng = significance.seeds_needed(1, 1.5), np.random.default_rng(10)
    p = stats.ttest_ind(
        rng.normal(1.5, 1, (TABLES, n)), rng.normal(0, 1, (TABLES, n)), axis=1, equal_var=False
    ).pvalue
    assert 0.8 - monte_carlo(0.8) <= np.mean(p <= 0.05) <= 0.87


def test_seeds_needed_refuses_what_has_no_answer():
    for sd, delta in ((0, 1), (1, 0), (float("nan"), 1), (1, float("inf"))):
        with pytest.raises(ValueError, match="positive sd and a positive delta"):
            significance.seeds_needed(sd, delta)
    with pytest.raises(ValueError, match="a power above alpha"):
        significance.seeds_needed(1, 1, power=0.05)
    with pytest.raises(ValueError, match="power is a fraction between 0 and 1, got 80"):
        significance.seeds_needed(1, 1, power=80)


# Misuse that all refuse alike.

OF_TWO = {
    "welch": significance.welch,
    "paired": significance.paired,
    "equivalence": lambda a, b: significance.equivalence(a, b, delta=0.1),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_refuses_two_repeats_and_what_is_not_finite(name):
    with pytest.raises(ValueError, match=f"{name} needs three repeats or more in each arm, got 2 and 5"):
        OF_TWO[name]([1, 2], [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match=f"{name} needs finite numbers, got 1 that is not.*diverged"):
        OF_TWO[name]([1, 2, 3], [1, 2, float("inf")])
    with pytest.raises(ValueError, match=r"one number per repeat, got shape \(3, 1\) and \(3,\)"):
        OF_TWO[name](np.ones((3, 1)), [1, 2, 3])


def test_an_interval_refuses_them_too():
    with pytest.raises(ValueError, match="three repeats or more in each arm, got 2"):
        significance.t_interval([1, 2])
    with pytest.raises(ValueError, match="got 2 that are not"):
        significance.t_interval([1, 2, 3, float("nan"), float("nan")])
    with pytest.raises(
        ValueError, match=r"confidence is a fraction between 0 and 1, got 95; five percent is 0\.05"
    ):
        significance.welch([1, 2, 3], [1, 2, 3], confidence=95)


def test_equivalence_needs_some_spread():
    with pytest.raises(ValueError, match="equivalence found no spread in either arm"):
        significance.equivalence([0.9, 0.9, 0.9], [0.85, 0.85, 0.85], delta=0.1)
    significance.equivalence([0.9, 0.9, 0.9], [0.84, 0.85, 0.86], delta=0.1)  # one is enough
