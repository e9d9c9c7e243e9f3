"""Names and formats of metrics, and the finding of a result in sentences.

One arm "beats" another only where p < .05; otherwise no difference "was found", with its interval. The teacher is a
reference: it is listed, but never tested.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax import significance

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
# Arms that are not tested against the baseline and never bold.
REFERENCES = ("teacher",)


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
    tested = comparisons(result)
    return comparison_sentence(result, tested[0]) if tested else _untested_sentence(result)


def comparison_sentence(result: Result, comparison: Mapping[str, Any]) -> str:
    """One comparison as a sentence, such as "kd beats scratch in accuracy by 2.3 points (95 % interval ...)."."""
    name, a, b = (str(comparison[k]) for k in ("metric", "a", "b"))
    metric, decimals = metric_of(name), decimals_of(result, name)
    unit = " points" if metric.unit == "%" else f" {metric.unit}" if metric.unit else ""
    difference, low, high = (metric.scale * comparison[k] for k in ("difference", "low", "high"))
    n = comparison.get("n", ())
    repeats = " + ".join(map(str, n if isinstance(n, Sequence) else [n]))
    test = f"{p_text(comparison['p'])}, {comparison.get('test', 'Welch')}"
    test += f", n = {repeats}" if repeats else ""
    if comparison["p"] >= ALPHA:
        interval = f"95 % interval {number(low, decimals, sign=True)} to {number(high, decimals, sign=True)}"
        gap = number(difference, decimals, sign=True) + unit
        return f"No difference in {metric.title} between {a} and {b} was found: {gap} ({interval}, {test})."
    if difference < 0:
        difference, low, high = -difference, -high, -low
    winner, loser = (a, b) if (comparison["difference"] > 0) == (metric.higher is not False) else (b, a)
    verb = "beats" if metric.higher is not None else "exceeds"
    interval = f"95 % interval {number(low, decimals)} to {number(high, decimals)}"
    size = number(difference, decimals) + unit
    return f"{winner} {verb} {loser} in {metric.title} by {size} ({interval}, {test})."


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


def comparisons(result: Result) -> list[Mapping[str, Any]]:
    """The result's own comparisons, else Welch's test of every arm against the baseline on the first metric."""
    if result.get("comparisons"):
        return list(result["comparisons"])
    b, metric = baseline_of(result), primary_of(result)
    return [{"metric": metric, "a": a, "b": b} | t._asdict() for a, t in _tests(result, metric, b).items()]


def _tests(result: Result, metric: str | None, baseline: str | None) -> dict[str, significance.Comparison]:
    """Welch's test of every arm against the baseline, where there is one."""
    arms = [arm for arm in _competitors(result, metric) if arm != baseline]
    tests = {arm: welch(result, metric, arm, baseline) for arm in arms}
    return {arm: test for arm, test in tests.items() if test is not None}


def welch(result: Result, metric: str | None, a: str, b: str | None) -> significance.Comparison | None:
    """Welch's test; None for fewer than three seeds, constant values, or the timings of a benchmark."""
    values = [result["arms"].get(arm, {}).get(metric, []) for arm in (a, b)]
    if result.get("ratios") or min(map(len, values)) < 3 or not any(np.ptp(v) > 0 for v in values):
        return None
    return significance.welch(*values)


def adjusted_p(result: Result, metric: str, baseline: str | None) -> dict[str, float]:
    """Welch's p of every arm against the baseline on a metric, with Holm's correction for their number."""
    return significance.holm({arm: test.p for arm, test in _tests(result, metric, baseline).items()})


def measured(result: Result) -> list[str]:
    """All metrics of the arms, in order of appearance."""
    return list(dict.fromkeys(metric for metrics in result["arms"].values() for metric in metrics))


def primary_of(result: Result) -> str | None:
    """The metric of the first comparison, else the first metric of the arms."""
    known = measured(result)
    first = [c["metric"] for c in result.get("comparisons", [])[:1] if c["metric"] in known]
    return next(iter(first + known), None)


def _competitors(result: Result, metric: str | None) -> list[str]:
    return [arm for arm, metrics in result["arms"].items() if arm not in REFERENCES and metric in metrics]


def baseline_of(result: Result) -> str | None:
    """The second arm of the first comparison, else the first arm that is not a reference."""
    first = [c["b"] for c in result.get("comparisons", [])[:1] if c["b"] in result["arms"]]
    return next(iter(first + [arm for arm in result["arms"] if arm not in REFERENCES]), None)


def best_arm(result: Result, metric: str) -> str | None:
    """The arm with the best mean, if Welch's p against the runner-up is below .05."""
    higher = metric_of(metric).higher
    arms = _competitors(result, metric)
    if higher is None or len(arms) < 2:
        return None
    first, second, *_ = sorted(arms, key=lambda arm: np.mean(result["arms"][arm][metric]), reverse=higher)
    test = welch(result, metric, first, second)
    return first if test is not None and test.p < ALPHA else None


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
