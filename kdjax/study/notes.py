"""Tests of finished arms as sentences: the notes of a result."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import data, significance
from kdjax.run import Trained

Arms = Mapping[str, Sequence[Trained]]
"""Arm → one finished run per seed."""

DELTA = 0.01  # accuracies nearer than this are equivalent


def welch_note(a: str, b: str, arms: Arms) -> str:
    """Welch's test of the accuracies of two arms, and the interval of their differences seed by seed.

    Two students of one seed share their first weights and the order of images, which widens the first interval and not
    the second.
    """
    ours, theirs = accuracies(arms[a]), accuracies(arms[b])
    found = significance.welch(ours, theirs)
    paired = significance.t_interval((100 * np.subtract(ours, theirs)).tolist())
    return (
        f"{a} against {b}: {100 * found.difference:+.2f} points of accuracy (95 % interval {100 * found.low:+.2f} to "
        f"{100 * found.high:+.2f}, p = {found.p:.2g}, Welch, not corrected; {paired.low:+.2f} to {paired.high:+.2f} "
        "seed by seed)."
    )


def tost_note(arms: Arms, *, baseline: str) -> str:
    """Which arms two one-sided tests find equivalent to the baseline, in accuracy."""
    plain = accuracies(arms[baseline])
    others = {name: accuracies(runs) for name, runs in arms.items() if name != baseline}
    p = {name: significance.equivalence(own, plain, delta=DELTA).p for name, own in others.items()}
    found = ", ".join(f"{name} (p = {value:.2g})" for name, value in p.items() if value < 0.05)
    return (
        f"Equal to {baseline} within {100 * DELTA:g} point of accuracy by two one-sided tests: {found or 'no arm'}; "
        "not shown for the others, which are better, worse or vary too much."
    )


def mcnemar_note(dataset: data.Dataset, arms: Arms, *, baseline: str, split: str) -> str:
    """How many students of each arm differ from the baseline's student of the same seed, by McNemar's test."""
    ids, network = dataset.splits[split], arms[baseline][0].network

    @functools.partial(jax.jit, static_argnums=0)
    def right(normalisation, weights, images, labels):
        inputs = data.normalise(images, **normalisation._asdict())
        outputs, _ = network.apply(weights.params, weights.model_state, inputs, train=False)
        return jnp.argmax(outputs.logits, -1) == labels

    def correct(run: Trained) -> np.ndarray:
        return np.asarray(right(run.normalisation, run.weights, dataset.images[ids], dataset.labels[ids]))

    plain = [correct(run) for run in arms[baseline]]

    def differing(name: str) -> int:
        pairs = zip(map(correct, arms[name]), plain, strict=True)
        return sum(significance.mcnemar(a, b, ids_a=ids, ids_b=ids).mid_p < 0.05 for a, b in pairs)

    counts = ", ".join(f"{name} {differing(name)}" for name in arms if name != baseline)
    return (
        f"Students out of {len(plain)} that differ from that of the same seed of {baseline} by McNemar's test on the "
        f"same images (mid-p below .05): {counts}."
    )


def main_effect_note(factor: str, pairs: Sequence[tuple[str, str]], arms: Arms) -> str:
    """The mean difference in accuracy over pairs of arms that differ in one factor, with its interval over seeds."""
    each = np.mean([np.subtract(accuracies(arms[b]), accuracies(arms[a])) for a, b in pairs], axis=0)
    found = significance.t_interval((100 * each).tolist())
    return (
        f"Main effect of {factor} over {len(pairs)} pairs of arms: {found.estimate:+.2f} points of accuracy (95 % "
        f"interval {found.low:+.2f} to {found.high:+.2f} over {len(each)} seeds)."
    )


def comparison_notes(
    arms: Arms, *, pairs: Sequence[tuple[str, str]], factors: Mapping[str, Sequence[tuple[str, str]]]
) -> list[str]:
    """Welch's test of each pair of arms, and the main effect of each factor.

    Args:
      arms: arm → one finished run per seed; tests of an arm that is not there, or has fewer than three, are left out.
      pairs: of arms, as in :func:`welch_note`.
      factors: factor → pairs of arms, as in :func:`main_effect_note`.
    """

    def there(*names: str) -> bool:
        return all(len(arms.get(name, ())) >= 3 for name in names)

    return [welch_note(a, b, arms) for a, b in pairs if there(a, b)] + [
        main_effect_note(factor, among, arms)
        for factor, among in factors.items()
        if there(*(name for pair in among for name in pair))
    ]


def accuracies(runs: Sequence[Trained]) -> list[float]:
    """The test accuracy of each run."""
    return [run.metrics["accuracy"] for run in runs]
