"""Tests of finished arms as sentences: the notes of a result."""

from collections.abc import Mapping, Sequence

import numpy as np

from kdjax import results, significance
from kdjax.run import Trained

Arms = Mapping[str, Sequence[Trained]]
"""Arm → one finished run per seed."""

Pairs = Sequence[tuple[str, str]]


def comparison_notes(arms: Arms, *, pairs: Pairs, factors: Mapping[str, Pairs] | None = None) -> list[str]:
    """The difference in accuracy of each pair of arms, by seed, and the main effect of each factor.

    These are comparisons beside those that a study is about; Holm's method corrects them for their own number.

    Args:
      arms: arm → one finished run per seed; tests of an arm that is not there, or has fewer than three, are left out.
      pairs: of arms.
      factors: factor → pairs of arms that differ in it, as in :func:`main_effect_note`.
    """

    def there(*names: str) -> bool:
        return all(len(arms.get(name, ())) >= significance.FEWEST for name in names)

    tests = {f"{a} against {b}": _compared(arms, a, b) for a, b in pairs if there(a, b)}
    adjusted = significance.holm({name: test.p for name, test in tests.items()})
    return [
        f"{name}: {100 * test.difference:+.2f} points of accuracy (95 % interval {100 * test.low:+.2f} to "
        f"{100 * test.high:+.2f}, p = {adjusted[name]:.2g} after Holm's correction for {len(tests)}, {test.test})."
        for name, test in tests.items()
    ] + [
        main_effect_note(factor, among, arms)
        for factor, among in (factors or {}).items()
        if there(*(name for pair in among for name in pair))
    ]


def equivalence_note(arms: Arms, *, pairs: Pairs, margin: float) -> str:
    """Which pairs of arms are equally accurate within a margin, by two one-sided tests over pairs of seeds.

    Args:
      arms: arm → one finished run per seed.
      pairs: of arms, with three or more seeds in common.
      margin: the smallest difference that would matter, as a fraction.
    """
    found, flat = {}, []
    for a, b in pairs:
        own, other = _by_seed(arms[a]), _by_seed(arms[b])
        shared = [seed for seed in own if seed in other]
        values = [[of[seed] for seed in shared] for of in (own, other)]
        if (
            len(shared) < significance.FEWEST
            or np.ptp(np.subtract(values[0], values[1])) < significance.ROUNDING
        ):
            flat.append(f"{a} and {b}")
        else:
            found[f"{a} and {b}"] = significance.equivalence(*values, delta=margin, pairs=True)
    adjusted = significance.holm({name: test.p for name, test in found.items()})
    said = [
        f"{name} {'are equal' if adjusted[name] < 0.05 else 'are not shown to be'} (difference "
        f"{100 * test.difference:+.2f}, 90 % interval {100 * test.low:+.2f} to {100 * test.high:+.2f}, p = "
        f"{adjusted[name]:.2g}; power {test.power:.2f})"
        for name, test in found.items()
    ]
    left_out = f" Not tested, for want of seeds or spread: {', '.join(flat)}." if flat else ""
    return (
        f"Equality within {100 * margin:g} points of accuracy, by two one-sided tests with Holm's correction for "
        f"{len(found)}; the power is that of finding equality where it holds: {'; '.join(said) or 'no pair'}.{left_out}"
    )


def mcnemar_note(packed: Mapping[str, Sequence[str]], arms: Arms, *, pairs: Pairs, examples: int) -> str:
    """How many students of each pair of arms differ from that of the same seed, by McNemar's test.

    Args:
      packed: arm → one text per run: whether it is right on each example, as :func:`kdjax.results.pack` packs it.
      arms: arm → one finished run per seed.
      pairs: of arms.
      examples: of the split.
    """

    def differing(a: str, b: str) -> str:
        right = [
            {run.seed: results.unpack(one, examples) for run, one in zip(arms[arm], packed[arm], strict=True)}
            for arm in (a, b)
        ]
        shared, ids = [seed for seed in right[0] if seed in right[1]], np.arange(examples)
        tests = [significance.mcnemar(*(of[seed] for of in right), ids_a=ids, ids_b=ids) for seed in shared]
        return f"{a} and {b} {sum(test.mid_p < 0.05 for test in tests)} of {len(tests)}"

    return (
        "Students that differ from that of the same seed by McNemar's test on the same images (mid-p below .05, not "
        f"corrected): {', '.join(differing(*pair) for pair in pairs)}."
    )


def main_effect_note(factor: str, pairs: Pairs, arms: Arms) -> str:
    """The mean difference in accuracy over pairs of arms that differ in one factor, with its interval over seeds."""
    each = np.mean([np.subtract(accuracies(arms[b]), accuracies(arms[a])) for a, b in pairs], axis=0)
    found = significance.t_interval((100 * each).tolist())
    return (
        f"Main effect of {factor} over {len(pairs)} pairs of arms: {found.estimate:+.2f} points of accuracy (95 % "
        f"interval {found.low:+.2f} to {found.high:+.2f} over {len(each)} seeds)."
    )


def accuracies(runs: Sequence[Trained]) -> list[float]:
    """The test accuracy of each run."""
    return [run.metrics["accuracy"] for run in runs]


def _by_seed(runs: Sequence[Trained]) -> dict[int, float]:
    return {run.seed: run.metrics["accuracy"] for run in runs}


def _compared(arms: Arms, a: str, b: str) -> significance.Comparison:
    return significance.compare(_by_seed(arms[a]), _by_seed(arms[b]))
