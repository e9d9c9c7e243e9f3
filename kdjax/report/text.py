"""Numbers into words: how metrics are called and printed, and what was found, in sentences.

Words are careful: one arm "beats" another only where p < .05, and otherwise no difference "was found", with the
interval that the data allow. The teacher is a reference: it is named, but never tested.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax import significance

Result = Mapping[str, Any]
ALPHA = 0.05
RATIOS_IN_WORDS = 6  # up to which each peer is named


class Metric(NamedTuple):
    """How a metric is called and printed. ``higher`` says whether more is better, None where neither is."""

    title: str
    unit: str = ""
    decimals: int | None = None
    higher: bool | None = None

    @property
    def scale(self) -> float:
        """What a stored value is multiplied by to be printed."""
        return 100.0 if self.unit == "%" else 1.0


METRICS = {
    "accuracy": Metric("accuracy", "%", 1, True),
    "top5_accuracy": Metric("top-5 accuracy", "%", 1, True),
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
    "nll": Metric("negative log-likelihood", "", 3, False),
    "brier": Metric("Brier score", "", 3, False),
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
    "us": Metric("time", "µs", higher=False),
    "epochs_per_second": Metric("epochs per second", higher=True),
    "steps_per_second": Metric("steps per second", higher=True),
    "images_per_second": Metric("images per second", higher=True),
    "examples_per_second": Metric("examples per second", higher=True),
}
# Arms that mark a ceiling and do not compete: neither tested against the baseline nor set in bold.
REFERENCES = ("teacher",)


def metric_of(name: str) -> Metric:
    """Looks a metric up by its name, or by the known name that it starts or ends with (``validation_accuracy``)."""
    if name in METRICS:
        return METRICS[name]
    for known in sorted(METRICS, key=len, reverse=True):
        if name.endswith("_" + known) or name.startswith(known + "_"):
            title = name.replace(known, METRICS[known].title).replace("_", " ")
            return METRICS[known]._replace(title=title)
    return Metric(name.replace("_", " "))


def finding(result: Result) -> str:
    """What was found, in one sentence: of the ratios in a benchmark, else of the first comparison, else of the means.

    Without ``comparisons`` the arms are compared with the baseline of :func:`markdown_table` on the first metric.
    """
    if result.get("ratios"):
        return _ratio_sentence(result["ratios"])
    tested = comparisons(result)
    return comparison_sentence(result, tested[0]) if tested else _untested_sentence(result)


def comparison_sentence(result: Result, comparison: Mapping[str, Any]) -> str:
    """One comparison in words, such as "kd beats scratch in accuracy by 2.3 points (95 % interval ...)."."""
    name, a, b = (str(comparison[k]) for k in ("metric", "a", "b"))
    metric, decimals = metric_of(name), decimals_of(result, name)
    unit = " points" if metric.unit == "%" else f" {metric.unit}" if metric.unit else ""
    difference, low, high = (metric.scale * comparison[k] for k in ("difference", "low", "high"))
    n = comparison.get("n", ())
    repeats = " + ".join(map(str, n if isinstance(n, Sequence) else [n]))
    test = f"{p_text(comparison['p'])}, {comparison.get('test', 'Welch')}" + f", n = {repeats}" * bool(
        repeats
    )
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
    sides: dict[str, list[str]] = {"ahead of": [], "behind": [], "level with": []}
    for peer, ratio in ratios.items():
        median, low, high = ratio["median"], ratio["low"], ratio["high"]
        side = "ahead of" if low > 1 else "behind" if high < 1 else "level with"
        if side == "behind":
            median, low, high = 1 / median, 1 / high, 1 / low
        sides[side].append(f"{peer} ({times(median)}, {times(low)} to {times(high)})")
    if len(ratios) > RATIOS_IN_WORDS:
        return _counted_sentence(ratios)
    return "kdjax is " + "; ".join(f"{side} {listing(peers)}" for side, peers in sides.items() if peers) + "."


def _counted_sentence(ratios: Mapping[str, Mapping[str, float]]) -> str:
    """Many ratios: how many are ahead and behind, and the range of each side's medians."""
    ahead = [r["median"] for r in ratios.values() if r["low"] > 1]
    behind = [1 / r["median"] for r in ratios.values() if r["high"] < 1]
    level = len(ratios) - len(ahead) - len(behind)
    said = [
        f"{side} in {len(medians)} ({times(min(medians))} to {times(max(medians))})"
        for side, medians in {"ahead": ahead, "behind": behind}.items()
        if medians
    ]
    said += [f"level in {level}"] if level else []
    return f"Of {len(ratios)} comparisons kdjax is {listing(said)}."


def _untested_sentence(result: Result) -> str:
    metric = primary_of(result)
    if metric is None:
        return "This result holds no measured arms."
    found = [f"{arm} {mean_text(result, arm, metric)}" for arm, m in result["arms"].items() if metric in m]
    n = min((len(result["arms"][arm][metric]) for arm in _competitors(result, metric)), default=0)
    reason = f"{n} run{'s' * (n != 1)} per arm, too few for a test" if 0 < n < 3 else "nothing to compare"
    return f"{capital(metric_of(metric).title)}: {listing(found)} ({reason})."


def comparisons(result: Result) -> list[Mapping[str, Any]]:
    """The result's own comparisons, else Welch of every competing arm against the baseline on the first metric."""
    if result.get("comparisons"):
        return list(result["comparisons"])
    baseline, metric = baseline_of(result), primary_of(result)
    arms = [arm for arm in _competitors(result, metric) if arm != baseline]
    tests = {arm: welch(result, metric, arm, baseline) for arm in arms}
    return [
        {"metric": metric, "a": a, "b": baseline} | t._asdict() for a, t in tests.items() if t is not None
    ]


def welch(result: Result, metric: str | None, a: str, b: str | None) -> significance.Comparison | None:
    """Welch's test, or None where it would say nothing: too few seeds, a constant, timings of a benchmark."""
    values = [result["arms"].get(arm, {}).get(metric, []) for arm in (a, b)]
    if result.get("ratios") or min(map(len, values)) < 3 or not any(np.ptp(v) > 0 for v in values):
        return None
    return significance.welch(*values)


def adjusted_p(result: Result, metric: str, baseline: str | None) -> dict[str, float]:
    """Welch's p of every arm that competes with the baseline on a metric, corrected by Holm for their number."""
    arms = [arm for arm in _competitors(result, metric) if arm != baseline]
    tests = {arm: welch(result, metric, arm, baseline) for arm in arms}
    return significance.holm({arm: test.p for arm, test in tests.items() if test is not None})


def measured(result: Result) -> list[str]:
    """All metrics of the arms, in order of appearance."""
    return list(dict.fromkeys(metric for metrics in result["arms"].values() for metric in metrics))


def primary_of(result: Result) -> str | None:
    """The metric that the first comparison is about, else the first of the arms."""
    known = measured(result)
    first = [c["metric"] for c in result.get("comparisons", [])[:1] if c["metric"] in known]
    return next(iter(first + known), None)


def _competitors(result: Result, metric: str | None) -> list[str]:
    return [arm for arm, metrics in result["arms"].items() if arm not in REFERENCES and metric in metrics]


def baseline_of(result: Result) -> str | None:
    """The arm that the first comparison is against, else the first competing arm."""
    first = [c["b"] for c in result.get("comparisons", [])[:1] if c["b"] in result["arms"]]
    return next(iter(first + [arm for arm in result["arms"] if arm not in REFERENCES]), None)


def best_arm(result: Result, metric: str) -> str | None:
    """The arm with the best mean, where Welch tells it from the runner-up."""
    higher = metric_of(metric).higher
    arms = _competitors(result, metric)
    if higher is None or len(arms) < 2:
        return None
    first, second, *_ = sorted(arms, key=lambda arm: np.mean(result["arms"][arm][metric]), reverse=higher)
    test = welch(result, metric, first, second)
    return first if test is not None and test.p < ALPHA else None


def decimals_of(result: Result, name: str) -> int | None:
    """Decimals of a metric, one more where the spread over seeds would otherwise print as zero."""
    metric = metric_of(name)
    runs = [m[name] for m in result["arms"].values() if name in m and np.ptp(m[name]) > 0]
    smallest = min((metric.scale * significance.summarise(values).sd for values in runs), default=1.0)
    return metric.decimals + (smallest < 10**-metric.decimals) if metric.decimals else metric.decimals


def number(value: float, decimals: int | None, *, sign: bool = False) -> str:
    """Prints a number with a real minus; three significant digits where ``decimals`` is None."""
    decimals = places(value) if decimals is None else decimals
    text = f"{round(value, decimals) + 0.0:{'+' if sign else ''},.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def places(value: float) -> int:
    """Decimals that show three significant digits."""
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2


def p_text(p: float) -> str:
    """Prints p with enough digits that it never seems to stand on the other side of .05."""
    if p < 0.001 or p > 0.99:
        return "p < .001" if p < 0.001 else "p > .99"
    texts = (f"{p:.{digits}f}" for digits in range(3 if p < 0.1 else 2, 18))
    return "p = " + next(t for t in texts if (float(t) < ALPHA) == (p < ALPHA)).lstrip("0")


def stars(p: float) -> str:
    """Prints how far p lies below .05: * there, ** below .01, *** below .001."""
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))


def times(ratio: float) -> str:
    """Prints a ratio, such as "2.41×" or "24.1×"."""
    return f"{ratio:,.{0 if ratio >= 100 else 1 if ratio >= 10 else 2}f}×"


def listing(texts: Sequence[str]) -> str:
    """Joins texts as "a, b and c"."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def mean_text(result: Result, arm: str, name: str) -> str:
    """An arm's mean with its unit, such as "97.3 %"."""
    metric = metric_of(name)
    mean = metric.scale * significance.summarise(result["arms"][arm][name]).mean
    return f"{number(mean, decimals_of(result, name))} {metric.unit}".rstrip()


def capital(text: str) -> str:
    """Begins a text with a capital and leaves the rest alone."""
    return text[:1].upper() + text[1:]


def axis_title(metric: Metric) -> str:
    """The metric with its unit, such as "accuracy, %"."""
    return metric.title + (f", {metric.unit}" if metric.unit else "")
