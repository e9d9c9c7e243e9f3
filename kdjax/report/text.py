"""Names and formats of metrics, and the finding of a result in sentences.

One arm "beats" another only where p, after Holm's correction for all comparisons of the family, is below .05; otherwise
no difference "was found", with its interval. Teachers are references: listed, but never tested.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax import results, significance

Result = Mapping[str, Any]
ALPHA = 0.05
RATIOS_IN_WORDS = 6  # with more, a sentence counts the peers instead of naming each


class Metric(NamedTuple):
    """Title, unit and decimals of a metric; ``higher`` says whether more is better, None where neither is."""

    title: str
    unit: str = ""
    decimals: int | None = None
    higher: bool | None = None

    @property
    def scale(self) -> float:
        """Factor from the stored value to the printed one."""
        return 100.0 if self.unit == "%" else 1.0


METRICS = {
    "accuracy": Metric("accuracy", "%", 1, True),
    "error": Metric("error", "%", 1, False),
    "errors": Metric("test errors", "", 0, False),
    "errors_on_omitted": Metric("errors on the omitted class", "", 0, False),
    "bias_shift": Metric("bias raised by", "", 1),
    "precision": Metric("precision", "%", 1, True),
    "recall": Metric("recall", "%", 1, True),
    "f1": Metric("F1", "%", 1, True),
    "ece": Metric("calibration error", "%", 1, False),
    "agreement": Metric("agreement with the teacher", "%", 1, True),
    "loss": Metric("loss", "", 3, False),
    "teacher_kl": Metric("KL from the teacher", "", 3, False),
    "exact": Metric("exact", "", 0),
    "refused": Metric("refused", "", 0),
    "wrong": Metric("wrong", "", 0),
    "bitwise_equal": Metric("bitwise equal", "%", 0, True),
    "times_killed": Metric("times killed", "", 1),
    "parameters": Metric("parameters", "", 0, False),
    "bytes": Metric("bytes", "", 0, False),
    "seconds": Metric("time", "s", higher=False),
    "ms": Metric("time", "ms", higher=False),
    "epochs_per_second": Metric("epochs per second", higher=True),
    "images_per_second": Metric("images per second", higher=True),
}
TIMES = ("steps_to_", "paid_to_")  # metrics that are censored where reached_X is 0


def metric_of(name: str) -> Metric:
    """Looks up a metric, also by a known name that it begins or ends with, as ``validation_accuracy`` does."""
    if name in METRICS:
        return METRICS[name]
    for known in sorted(METRICS, key=len, reverse=True):
        if name.endswith("_" + known) or name.startswith(known + "_"):
            title = name.replace(known, METRICS[known].title).replace("_", " ")
            return METRICS[known]._replace(title=title)
    return Metric(name.replace("_", " "))


def is_reference(arm: str) -> bool:
    """Whether an arm is a teacher: neither tested against the baseline nor bold."""
    return arm == "teacher" or arm.endswith("_teacher")


def finding(result: Result) -> str:
    """One sentence with the main finding: the ratios of a benchmark, else the first comparison, else the means.

    If the result has no ``comparisons``, every arm is compared with the first one on the first metric.
    """
    if result.get("ratios"):
        return _ratio_sentence(result["ratios"])
    tested = comparisons(result)
    return comparison_sentence(result, tested[0]) if tested else _untested_sentence(result)


def comparison_sentence(result: Result, comparison: Mapping[str, Any]) -> str:
    """One of :func:`comparisons` as a sentence, such as "kd beats scratch in accuracy by 2.3 points (95 % ...)."."""
    name, a, b = (str(comparison[k]) for k in ("metric", "a", "b"))
    metric, p = metric_of(name), comparison["p"]
    if p >= ALPHA:
        return f"No difference in {metric.title} between {a} and {b} was found: {difference_text(result, comparison)}."
    winner, loser = (a, b) if (comparison["difference"] > 0) == (metric.higher is not False) else (b, a)
    verb = "beats" if metric.higher is not None else "exceeds"
    size = difference_text(result, comparison, sign=False)
    return f"{winner} {verb} {loser} in {metric.title} by {size}."


def difference_text(
    result: Result, comparison: Mapping[str, Any], *, sign: bool = True, tested: bool = True
) -> str:
    """The size of a difference with its interval, and how it was ``tested``, such as "+2.3 points (95 % interval ...)".

    Without its ``sign`` a difference is told from the side of the larger arm.
    """
    name = str(comparison["metric"])
    metric, decimals = metric_of(name), decimals_of(result, name)
    unit = " points" if metric.unit == "%" else f" {metric.unit}" if metric.unit else ""
    size, low, high = (metric.scale * comparison[k] for k in ("difference", "low", "high"))
    if not sign and size < 0:
        size, low, high = -size, -high, -low
    interval = f"95 % interval {number(low, decimals, sign=sign)} to {number(high, decimals, sign=sign)}"
    how = f", {_test_text(comparison)}" if tested else ""
    return f"{number(size, decimals, sign=sign)}{unit} ({interval}{how})"


def _test_text(comparison: Mapping[str, Any]) -> str:
    """How a comparison was made, such as "p = .02 after Holm's correction for 3, paired t, n = 5"."""
    n = comparison.get("n", ())
    n = list(n) if isinstance(n, Sequence) else [n]
    test, family = comparison.get("test", "Welch"), comparison.get("family", 1)
    corrected = f" after Holm's correction for {family}" if family > 1 else ""
    repeats = f", n = {' + '.join(map(str, n if test == 'Welch' else n[:1]))}" if n else ""
    return f"{p_text(comparison['p'])}{corrected}, {test}{repeats}"


def _ratio_sentence(ratios: Mapping[str, Mapping[str, float]]) -> str:
    """Names each peer with its ratio; of many it counts those on each side of one, with the range of their medians."""
    sides: dict[str, list[tuple[str, float]]] = {"ahead of": [], "behind": [], "level with": []}
    for peer, ratio in ratios.items():
        median, low, high = ratio["median"], ratio["low"], ratio["high"]
        side = "ahead of" if low > 1 else "behind" if high < 1 else "level with"
        if side == "behind":
            median, low, high = 1 / median, 1 / high, 1 / low
        sides[side].append((f"{peer} ({times(median)}, {times(low)} to {times(high)})", median))
    sides = {side: found for side, found in sides.items() if found}
    if len(ratios) <= RATIOS_IN_WORDS:
        parts = [f"{side} {listing([peer for peer, _ in found])}" for side, found in sides.items()]
        return f"kdjax is {'; '.join(parts)}."
    parts = []
    for side, found in sides.items():
        medians = [median for _, median in found]
        span = "" if side == "level with" else f" ({times(min(medians))} to {times(max(medians))})"
        parts.append(f"{side.split()[0]} in {len(found)}{span}")
    return f"Of {len(ratios)} comparisons kdjax is {listing(parts)}."


def _untested_sentence(result: Result) -> str:
    metric = primary_of(result)
    if metric is None:
        return "This result holds no measured arms."
    found = [f"{arm} {mean_text(result, arm, metric)}" for arm, m in result["arms"].items() if metric in m]
    n = min((len(result["arms"][arm][metric]) for arm in _competitors(result, metric)), default=0)
    reason = f"{n} run{'s' * (n != 1)} per arm, too few for a test" if 0 < n < 3 else "nothing to compare"
    return f"{capital(metric_of(metric).title)}: {listing(found)} ({reason})."


def comparisons(result: Result) -> list[dict[str, Any]]:
    """The family of comparisons that a result is about, with p after Holm's correction for their number.

    They are those that the result names, made anew from its numbers, or every arm against the baseline.
    """
    named = list(result.get("comparisons", ()))
    if not named:
        metric = primary_of(result)
        named = [{"metric": metric, "a": a, "b": b} for a, b in _family(result)]
    found = []
    for one in named:
        test = None if result.get("ratios") else compare(result, one["metric"], one["a"], one["b"])
        if test is not None or "p" in one:
            found.append({**one, **({} if test is None else test._asdict())})
    adjusted = significance.holm({str(i): one["p"] for i, one in enumerate(found)})
    return [{**one, "p": adjusted[str(i)], "family": len(found)} for i, one in enumerate(found)]


def compare(result: Result, metric: str | None, a: str, b: str) -> significance.Comparison | None:
    """Tests arm a against b, by seed; accuracies also by test example where the result holds the answers.

    None for fewer than three seeds or constant values.
    """
    own, other = (_by_seed(result, arm, metric) for arm in (a, b))
    vary = any(np.ptp([*values.values()]) > 0 for values in (own, other) if values)
    if min(len(own), len(other)) < significance.FEWEST or not vary:
        return None
    answers = result.get("correct", {}).get("arms", {})
    if metric != "accuracy" or not {a, b} <= set(answers):
        return significance.compare(own, other)
    shared = [seed for seed in own if seed in other]
    pairs = len(shared) >= significance.FEWEST
    rows = ([[*of].index(seed) for seed in shared] if pairs else slice(None) for of in (own, other))
    tables = (results.correct_of(result, arm)[row] for arm, row in zip((a, b), rows, strict=True))
    return significance.compare_accuracies(*tables, pairs=pairs)


def _by_seed(result: Result, arm: str | None, metric: str | None) -> dict[int, float]:
    values = result["arms"].get(arm, {}).get(metric, [])
    return dict(zip(result.get("arm_seeds", {}).get(arm, result["seeds"]), values, strict=False))


def adjusted_p(result: Result, metric: str) -> dict[str, float]:
    """The p of every arm that is compared with the baseline, after Holm's correction for all of the family."""
    if result.get("ratios"):
        return {}
    family = {str(i): pair for i, pair in enumerate(_family(result))}
    p = {i: _p_of(result, metric, *pair) for i, pair in family.items()}
    adjusted = significance.holm({i: value for i, value in p.items() if value is not None})
    baseline = baseline_of(result)
    with_it = {i: pair for i, pair in family.items() if i in adjusted and baseline in pair}
    return {b if a == baseline else a: adjusted[i] for i, (a, b) in with_it.items()}


def _p_of(result: Result, metric: str, a: str, b: str) -> float | None:
    if metric.startswith(TIMES):
        return _p_sooner(result, metric, a, b)
    found = compare(result, metric, a, b)
    return None if found is None else found.p


def _p_sooner(result: Result, metric: str, a: str, b: str) -> float | None:
    """The rank test of times, in which runs that never reached the target are the last."""
    arms = [censored(result["arms"].get(arm, {}), metric) for arm in (a, b)]
    if min(len(times) for times, _ in arms) < significance.FEWEST:
        return None
    return significance.sooner(*arms[0], *arms[1]).p


def censored(measured: Mapping[str, Sequence[float]], metric: str) -> tuple[Sequence[float], Sequence[float]]:
    """Times of an arm, and whether each run reached the target; all did where nothing is said of it."""
    times = measured.get(metric, [])
    target = next(metric.removeprefix(start) for start in TIMES if metric.startswith(start))
    return times, measured.get(f"reached_{target}", [1.0] * len(times))


def measured(result: Result) -> list[str]:
    """All metrics of the arms, in order of appearance."""
    return list(dict.fromkeys(metric for metrics in result["arms"].values() for metric in metrics))


def primary_of(result: Result) -> str | None:
    """The metric of the first comparison, else the first metric of the arms."""
    known = measured(result)
    first = [c["metric"] for c in result.get("comparisons", [])[:1] if c["metric"] in known]
    return next(iter(first + known), None)


def _family(result: Result) -> list[tuple[str, str]]:
    """The pairs of arms that a result is about: those of its comparisons, else every arm with the baseline."""
    arms, baseline = result["arms"], baseline_of(result)
    named = [(str(one["a"]), str(one["b"])) for one in result.get("comparisons", ())]
    if named:
        return [pair for pair in dict.fromkeys(named) if set(pair) <= set(arms)]
    return [
        (arm, baseline) for arm in arms if baseline is not None and arm != baseline and not is_reference(arm)
    ]


def family_size(result: Result) -> int:
    """The number of comparisons that p is corrected for."""
    return len(_family(result))


def runs_of(result: Result, arm: str) -> int:
    """The number of runs of an arm."""
    return len(result.get("arm_seeds", {}).get(arm, result["seeds"]))


def counts(result: Result) -> str:
    """How many runs, teachers, training and test images stand behind the numbers, as far as the result says."""
    parts = [f"n = {len(result['seeds'])}"]
    teachers = [runs_of(result, arm) for arm in result["arms"] if is_reference(arm)]
    if teachers and len(teachers) < len(result["arms"]):
        parts += [f"{max(teachers)} {'teachers' if max(teachers) > 1 else 'teacher'}"]
    examples = dict(result.get("examples", {}))
    if not examples and result.get("confusion"):  # an older result, whose counts are pooled over the runs
        arm, matrix = next(iter(result["confusion"].items()))
        examples["test"] = round(np.sum(matrix) / runs_of(result, arm))
    parts += [f"{count:,} {split} images" for split, count in examples.items()]
    return ", ".join(parts)


def _competitors(result: Result, metric: str | None) -> list[str]:
    """The arms that have a metric and are no references."""
    return [arm for arm, metrics in result["arms"].items() if metric in metrics and not is_reference(arm)]


def baseline_of(result: Result) -> str | None:
    """The declared baseline; else the arm that most comparisons are with, or the first arm that is no reference."""
    if result.get("plan") and result["plan"][-1]["baseline"] in result["arms"]:
        return result["plan"][-1]["baseline"]
    others = [one["b"] for one in result.get("comparisons", ()) if one["b"] in result["arms"]]
    named = sorted(dict.fromkeys(others), key=lambda arm: -others.count(arm))
    return next(iter(named + [arm for arm in result["arms"] if not is_reference(arm)]), None)


def best_arm(result: Result, metric: str) -> str | None:
    """The arm with the best mean, if tests tell it from each other arm after Holm's correction."""
    higher, arms = metric_of(metric).higher, _competitors(result, metric)
    if higher is None or len(arms) < 2 or result.get("ratios"):
        return None
    mean = {arm: np.mean(result["arms"][arm][metric]) for arm in arms}
    best = (max if higher else min)(arms, key=lambda arm: mean[arm])
    p = {arm: _p_of(result, metric, best, arm) for arm in arms if arm != best}
    known = {arm: value for arm, value in p.items() if value is not None}
    against_baseline = adjusted_p(result, metric).get(best, 0.0)  # what its own cell says
    told = len(known) == len(p) and max([*significance.holm(known).values(), against_baseline]) < ALPHA
    return best if told else None


def decimals_of(result: Result, name: str) -> int | None:
    """Decimals of a metric, one more where the standard deviation over seeds would print as zero."""
    metric = metric_of(name)
    runs = [m[name] for m in result["arms"].values() if name in m and np.ptp(m[name]) > 0]
    smallest = min((metric.scale * significance.summarise(values).sd for values in runs), default=1.0)
    return metric.decimals + (smallest < 10**-metric.decimals) if metric.decimals else metric.decimals


def number(value: float, decimals: int | None, *, sign: bool = False) -> str:
    """Prints a number with a real minus; three significant digits where ``decimals`` is None."""
    decimals = places(value) if decimals is None else decimals
    printed = f"{round(value, decimals) + 0.0:{'+' if sign else ''},.{decimals}f}"
    return printed.replace("-", "\N{MINUS SIGN}")


def places(value: float) -> int:
    """Decimals that show three significant digits."""
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2


def p_text(p: float) -> str:
    """Prints p with enough digits that rounding never moves it across .05."""
    if p < 0.001 or p > 0.99:
        return "p < .001" if p < 0.001 else "p > .99"
    texts = (f"{p:.{digits}f}" for digits in range(3 if p < 0.1 else 2, 18))
    return "p = " + next(t for t in texts if (float(t) < ALPHA) == (p < ALPHA)).lstrip("0")


def stars(p: float) -> str:
    """One star for p below .05, two below .01, three below .001."""
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))


def times(ratio: float) -> str:
    """Prints a ratio, such as "2.41×" or "24.1×"."""
    return f"{ratio:,.{0 if ratio >= 100 else 1 if ratio >= 10 else 2}f}×"


def listing(texts: Sequence[str]) -> str:
    """Joins texts as "a, b and c"."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def mean_sd(values: Sequence[float] | np.ndarray, metric: Metric, decimals: int | None = None) -> str:
    """Prints the mean and standard deviation of stored values, such as "97.3 ± 0.4"."""
    scaled = metric.scale * np.asarray(values, np.float64)
    mean, sd, n = significance.summarise(scaled.tolist())
    decimals = metric.decimals if decimals is None else decimals
    decimals = places(mean) if decimals is None else decimals
    spread = n > 1 and (decimals > 0 or np.ptp(scaled) > 0)
    return number(mean, decimals) + (f" ± {number(sd, decimals)}" if spread else "")


def mean_text(result: Result, arm: str, name: str) -> str:
    """An arm's mean with its unit, such as "97.3 %"."""
    metric = metric_of(name)
    mean = metric.scale * significance.summarise(result["arms"][arm][name]).mean
    return with_unit(mean, metric._replace(decimals=decimals_of(result, name)))


def with_unit(value: float, metric: Metric) -> str:
    """Prints a scaled value with its unit."""
    return f"{number(value, metric.decimals)} {metric.unit}".rstrip()


def capital(words: str) -> str:
    """Makes the first letter a capital."""
    return words[:1].upper() + words[1:]


def axis_title(metric: Metric) -> str:
    """The metric with its unit, such as "accuracy, %"."""
    return metric.title + (f", {metric.unit}" if metric.unit else "")
