"""Names and formats of metrics, and the finding of a result in sentences.

One arm "beats" another only where p, after Holm's correction for all comparisons of the family, is below .05; otherwise
no difference "was found", with its interval. Teachers are references: listed, but never tested.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax import significance
from kdjax.report.comparisons import (
    ALPHA,
    Result,
    competitors,
    family,
    is_reference,
    primary_of,
    runs_of,
)

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
    "agreement_right": Metric("agreement where the teacher is right", "%", 1, True),
    "agreement_wrong": Metric("agreement where it is wrong", "%", 1),
    "class_separation": Metric("class separation", "", 3),
    "mutual_information": Metric("mutual information, nats", "", 2),
    "corrected": Metric("wrong labels corrected", "%", 1, True),
    "memorised": Metric("wrong labels memorised", "%", 1, False),
    "exaggeration": Metric("confidence over the teacher's", "", 2),
    "best_weight": Metric("best weight of the labels", "", 2),
    "closed_form_weight": Metric("closed form", "", 2),
    "one_shot_weight": Metric("one-shot estimate", "", 2),
    "excess": Metric("excess error", "%", 0, False),
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


def metric_of(name: str) -> Metric:
    """Looks up a metric, also by a known name that it begins or ends with, as ``validation_accuracy`` does."""
    if name in METRICS:
        return METRICS[name]
    for known in sorted(METRICS, key=len, reverse=True):
        if name.endswith("_" + known) or name.startswith(known + "_"):
            title = name.replace(known, METRICS[known].title).replace("_", " ")
            return METRICS[known]._replace(title=title)
    return Metric(name.replace("_", " "))


def finding(result: Result) -> str:
    """One sentence with the main finding: the ratios of a benchmark, else the first comparison, else the means.

    If the result has no ``comparisons``, every arm is compared with the first one on the first metric.
    """
    if result.get("ratios"):
        return _ratio_sentence(result["ratios"])
    tested = family(result)
    return comparison_sentence(result, tested[0]) if tested else _untested_sentence(result)


def comparison_sentence(result: Result, comparison: Mapping[str, Any]) -> str:
    """One comparison of the family as a sentence: "kd beats scratch in accuracy by 2.3 points (95 % ...)."."""
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
    test, count = comparison.get("test", "Welch"), comparison.get("family", 1)
    corrected = f" after Holm's correction for {count}" if count > 1 else ""
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
    n = min((len(result["arms"][arm][metric]) for arm in competitors(result, metric)), default=0)
    reason = f"{n} run{'s' * (n != 1)} per arm, too few for a test" if 0 < n < 3 else "nothing to compare"
    return f"{capital(metric_of(metric).title)}: {listing(found)} ({reason})."


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
