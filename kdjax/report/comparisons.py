"""Which arms of a result are compared, and how: one family of comparisons, with one p wherever it is printed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax import results, significance

Result = Mapping[str, Any]
ALPHA = 0.05
TIMES = ("steps_to_", "paid_to_")  # metrics that are censored where reached_X is 0


def is_reference(arm: str) -> bool:
    """Whether an arm is a teacher: neither tested against the baseline nor bold."""
    return arm == "teacher" or arm.endswith(("_teacher", ", teacher"))


def family(result: Result) -> list[dict[str, Any]]:
    """The family of comparisons that a result is about, with p after Holm's correction for their number.

    They are those that the result names, made anew from its numbers; where it names none and does not say that there
    are none, every arm against the baseline.
    """
    named = list(result.get("comparisons", ()))
    if "comparisons" not in result:
        metric = primary_of(result)
        named = [{"metric": metric, "a": a, "b": b} for a, b in _pairs(result)]
    found = []
    for one in named:
        test = None if result.get("ratios") else compare(result, one["metric"], one["a"], one["b"])
        if test is not None or "p" in one:
            found.append({**one, **({} if test is None else test._asdict())})
    adjusted = significance.holm({i: one["p"] for i, one in enumerate(found)})
    return [{**one, "p": adjusted[i], "family": len(found)} for i, one in enumerate(found)]


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


def corrected(result: Result, metric: str) -> dict[tuple[str, str], float]:
    """The p of every pair of arms that a result is about in one metric, after Holm's correction for all of them."""
    if result.get("ratios"):
        return {}
    p = {pair: p_of(result, metric, *pair) for pair in _pairs(result)}
    return significance.holm({pair: value for pair, value in p.items() if value is not None})


def adjusted_p(result: Result, metric: str) -> dict[str, float]:
    """The p of every arm that is compared with the baseline, after Holm's correction for all of the family."""
    baseline, found = baseline_of(result), corrected(result, metric)
    return {b if a == baseline else a: p for (a, b), p in found.items() if baseline in (a, b)}


def p_of(result: Result, metric: str, a: str, b: str) -> float | None:
    """The p of two arms in one metric, not corrected; of times by rank. None where :func:`compare` has none."""
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


def _pairs(result: Result) -> list[tuple[str, str]]:
    """The pairs of arms that a result is about: those of its comparisons, else every arm with the baseline."""
    arms, baseline = result["arms"], baseline_of(result)
    named = [(str(one["a"]), str(one["b"])) for one in result.get("comparisons", ())]
    if "comparisons" in result:
        return [pair for pair in dict.fromkeys(named) if set(pair) <= set(arms)]
    return [
        (arm, baseline) for arm in arms if baseline is not None and arm != baseline and not is_reference(arm)
    ]


def family_size(result: Result) -> int:
    """The number of comparisons that p is corrected for."""
    return len(_pairs(result))


def runs_of(result: Result, arm: str) -> int:
    """The number of runs of an arm."""
    return len(result.get("arm_seeds", {}).get(arm, result["seeds"]))


def competitors(result: Result, metric: str | None) -> list[str]:
    """The arms that have a metric and are no references."""
    return [arm for arm, metrics in result["arms"].items() if metric in metrics and not is_reference(arm)]


def baseline_of(result: Result) -> str | None:
    """The declared baseline; else the arm that most comparisons are with, or the first arm that is no reference."""
    if result.get("plan") and result["plan"][-1]["baseline"] in result["arms"]:
        return result["plan"][-1]["baseline"]
    others = [one["b"] for one in result.get("comparisons", ()) if one["b"] in result["arms"]]
    named = sorted(dict.fromkeys(others), key=lambda arm: -others.count(arm))
    return next(iter(named + [arm for arm in result["arms"] if not is_reference(arm)]), None)


def best_arm(
    result: Result, metric: str, *, higher: bool | None, against_baseline: Mapping[str, float]
) -> str | None:
    """The arm with the best mean, if tests tell it from each other arm after Holm's correction.

    ``higher`` says whether more is better, None that neither is. ``against_baseline`` is :func:`adjusted_p`, which must
    not say otherwise.
    """
    arms = competitors(result, metric)
    if higher is None or len(arms) < 2 or result.get("ratios") or not _pairs(result):
        return None
    mean = {arm: np.mean(result["arms"][arm][metric]) for arm in arms}
    best = (max if higher else min)(arms, key=lambda arm: mean[arm])
    p = {arm: p_of(result, metric, best, arm) for arm in arms if arm != best}
    known = {arm: value for arm, value in p.items() if value is not None}
    corrected = [*significance.holm(known).values(), against_baseline.get(best, 0.0)]
    told = len(known) == len(p) and max(corrected) < ALPHA
    return best if told else None
